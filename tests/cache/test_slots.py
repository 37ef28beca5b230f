"""Layers of a cache against plain lists of Python: what is held after any sequence of operations."""

import dataclasses

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from kvjax.cache import EMPTY, Packed, Plain, Scaled, Slots, Tokens, make_grouped, make_ring
from kvjax.cache.slots import in_tiles, put_slots, take_slots

B, H, T, D, CAPACITY = 2, 2, 3, 8, 7  # New tokens come three at a time, some of them padding.


def key_of(pos):
    """A token's key and value tell its position."""
    pos = np.asarray(pos, np.float32)
    return np.stack([pos + 0.5, *(pos * 0 + i for i in range(D - 1))], -1)


def tokens(starts, counts) -> Tokens:
    """counts[b] tokens from position starts[b] on, then padding."""
    pos = np.array(
        [[s + t if t < n else EMPTY for t in range(T)] for s, n in zip(starts, counts, strict=True)], np.int32
    )
    k = np.broadcast_to(key_of(pos)[:, None], (B, H, T, D))
    k = np.where(pos[:, None, :, None] == EMPTY, np.nan, k).astype(np.float32)
    return Tokens(q=k, k=k, v=-k, q_raw=k, k_raw=k, pos=pos)  # type: ignore[arg-type]


def empty(capacity=CAPACITY, **fields) -> Slots:
    zeros = jnp.zeros((B, H, capacity, D))
    return Slots(k=zeros, v=zeros + 0, pos=jnp.full((B, H, capacity), EMPTY, jnp.int32), **fields)


# Whatever runs often is compiled, for few shapes: operations one by one would take longer.
append = jax.jit(lambda layer, new, marks=None: layer.append(new, marks))
drop = jax.jit(lambda layer, slot, where: layer.drop(slot, where))
keep = jax.jit(lambda layer, index, valid: layer.keep(index, valid))


def assert_holds(layer: Slots, model, ordered=True):
    """model[b][h]: positions in slot order. Keys, values and marks have moved with them."""
    for b in range(B):
        for h in range(H):
            pos = np.asarray(layer.pos)[b, h if layer.pos.shape[1] == H else 0]
            n = len(model[b][h])
            assert (pos[n:] == EMPTY).all()
            found = pos[:n].tolist()
            assert found == model[b][h] if ordered else sorted(found) == sorted(model[b][h])
            np.testing.assert_array_equal(np.asarray(layer.k)[b, h, :n], key_of(found))
            np.testing.assert_array_equal(np.asarray(layer.v)[b, h, :n], -key_of(found))
            if layer.marks is not None:
                np.testing.assert_array_equal(np.asarray(layer.marks)[b, h, :n], np.array(found) * 10.0)


OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.lists(st.integers(0, T), min_size=B, max_size=B)),
        st.tuples(st.just("drop"), st.integers(0, 2**16), st.lists(st.booleans(), min_size=B * H, max_size=B * H)),
        st.tuples(st.just("keep"), st.integers(0, 2**16)),
    ),
    max_size=8,
)


@given(OPERATIONS)
@settings(max_examples=30)
def test_slots_are_a_list(operations):
    layer = empty(marks=jnp.zeros((B, H, CAPACITY)))
    model = [[[] for _ in range(H)] for _ in range(B)]
    seen = [0] * B
    for name, *arguments in operations:
        if name == "append":
            counts = arguments[0]
            new = tokens(seen, counts)
            marks = jnp.broadcast_to(new.pos[:, None] * 10.0, (B, H, T))
            layer = append(layer, new, marks)
            for b in range(B):
                for h in range(H):  # What does not fit is dropped.
                    model[b][h] = (model[b][h] + list(range(seen[b], seen[b] + counts[b])))[:CAPACITY]
                seen[b] += counts[b]
        elif name == "drop":
            seed, flags = arguments
            where = np.array(flags).reshape(B, H) & np.array([[len(x) > 0 for x in row] for row in model])
            slot = np.array([[seed % max(len(x), 1) for x in row] for row in model], np.int32)
            layer = drop(layer, slot, where)
            for b, h in zip(*np.nonzero(where), strict=True):
                held = model[b][h]
                held[slot[b, h]] = held[-1]  # The last one moves in.
                held.pop()
        else:
            rng = np.random.default_rng(arguments[0])
            index, valid = np.zeros((B, H, CAPACITY), np.int32), np.zeros((B, H, CAPACITY), bool)
            for b in range(B):
                for h in range(H):
                    held = model[b][h]
                    chosen = np.sort(rng.permutation(len(held))[: rng.integers(0, len(held) + 1)])
                    index[b, h, : len(chosen)], valid[b, h, : len(chosen)] = chosen, True
                    model[b][h] = [held[i] for i in chosen]
            layer = keep(layer, index, valid)
        assert_holds(layer, model)
        np.testing.assert_array_equal(layer.count, [[len(x) for x in row] for row in model])
        np.testing.assert_array_equal(layer.room, [CAPACITY - max(len(x) for x in row) for row in model])


def test_reserve_adds_empty_slots():
    layer = append(
        empty(marks=jnp.zeros((B, H, CAPACITY))), tokens([0, 0], [3, 1]), jnp.tile(jnp.arange(3) * 10.0, (B, H, 1))
    )
    more = layer.reserve(4)
    assert more.capacity == CAPACITY + 4 and more.marks.shape[-1] == CAPACITY + 4
    assert_holds(more, [[[0, 1, 2]] * H, [[0]] * H])
    bounded = dataclasses.replace(layer, bound=9)
    assert bounded.room is not None and bounded.reserve(100).capacity == 9 and bounded.reserve(100).room is None
    assert layer.reserve(0) is layer


@pytest.mark.parametrize("slots, tiles", [(0, 0), (33, 33), (1065, 1088), (2049, 2112), (8193, 8320), (2**20, 2**20)])
def test_many_slots_fill_tiles(slots, tiles):
    """At most 3 % more."""
    assert in_tiles(slots) == tiles


COUNTS = st.lists(st.integers(0, T), min_size=B, max_size=B)  # New tokens of every row.
ring_of = jax.jit(make_ring, static_argnums=3, static_argnames=("sinks",))


@pytest.mark.parametrize("sinks, recent, limited", [(0, 1, False), (0, 3, True), (2, 1, False), (3, 4, True)])
@given(st.data())
@settings(max_examples=15)
def test_a_ring_holds_sinks_and_the_newest(sinks, recent, limited, data):
    size = sinks + recent
    lengths = data.draw(st.lists(st.integers(1, 6), min_size=B, max_size=B))
    limit = data.draw(st.lists(st.integers(sinks + 1, size), min_size=B, max_size=B)) if limited else None
    chunks = data.draw(st.lists(COUNTS, max_size=5))
    pos = np.array([[p if p < n else EMPTY for p in range(6)] for n in lengths], np.int32)
    k = np.broadcast_to(key_of(pos)[:, None], (B, H, 6, D))
    ring = ring_of(k, -k, pos, size, sinks=sinks, limit=np.array(limit, np.int32) if limited else None)
    ring = ring.reserve(size)
    assert ring.room is None and ring.capacity == size
    seen = list(lengths)

    def check():
        for b in range(B):
            newest = (size if limit is None else limit[b]) - sinks
            want = [p for p in range(seen[b]) if p < sinks or p >= seen[b] - newest]
            held = np.asarray(ring.pos)[b, 0]
            keys, values = np.asarray(ring.k)[b], np.asarray(ring.v)[b]
            assert sorted(held[held != EMPTY].tolist()) == want
            for h in range(H):
                np.testing.assert_array_equal(keys[h][held != EMPTY], key_of(held[held != EMPTY]))
                np.testing.assert_array_equal(values[h][held != EMPTY], -key_of(held[held != EMPTY]))

    check()
    for counts in chunks:
        ring = append(ring, tokens(seen, counts))
        seen = [s + n for s, n in zip(seen, counts, strict=True)]
        check()


GROUPS = {"bits": 8, "group": 4, "residual": 4, "scale_dtype": "float32"}
grouped = jax.jit(lambda k, v, pos: make_grouped(k, v, pos, **GROUPS))
look = jax.jit(
    lambda layer: (layer.k.decode(), layer.v.decode(), layer.k_recent, layer.v_recent, layer.order, layer.pos)
)


@given(st.lists(COUNTS, max_size=7), st.lists(st.integers(1, 11), min_size=B, max_size=B))
@settings(max_examples=20)
def test_groups_are_the_same_however_tokens_come(chunks, lengths):
    """Prompt, then tokens in ragged chunks: the state is that of packing all of them at once."""
    rng = np.random.default_rng(0)
    k, v = (rng.normal(size=(B, H, 24, D)).astype(np.float32) for _ in range(2))

    def bulk(counts, width):
        pos = np.array([[p if p < n else EMPTY for p in range(width)] for n in counts], np.int32)
        return grouped(k[:, :, :width], v[:, :, :width], pos[:, None])

    layer, seen = bulk(lengths, 11).reserve(13), np.array(lengths)
    for counts in chunks:
        counts = np.minimum(counts, 24 - 1 - seen)
        index = np.minimum(seen[:, None] + np.arange(T), 23)[:, None, :, None]
        new = tokens(seen, counts)
        new = dataclasses.replace(new, k=np.take_along_axis(k, index, 2), v=np.take_along_axis(v, index, 2))
        layer, seen = append(layer, new), seen + counts
    found, want = ([np.asarray(x) for x in look(y)] for y in (layer, bulk(seen, 24)))
    for b, n in enumerate(seen):
        keys, values = n - n % 4, max(n - 4, 0)
        np.testing.assert_allclose(found[0][b, :, :keys], want[0][b, :, :keys], atol=1e-6)
        np.testing.assert_allclose(found[1][b, :, :values], want[1][b, :, :values], atol=1e-6)
        for t in range(keys, n):
            np.testing.assert_array_equal(found[2][b, :, t % 4], k[b, :, t])
        for t in range(values, n):
            np.testing.assert_array_equal(found[3][b, :, t % 4], v[b, :, t])
        for held in (found[4][b, 0], found[5][b, 0]):
            assert sorted(held[held != EMPTY].tolist()) == list(range(n))


def test_groups_lose_nothing_when_the_last_place_is_taken():
    """A residual that becomes full needs places to be packed into; room that does not have them is no room."""
    k = np.random.default_rng(0).normal(size=(B, H, 8, D)).astype(np.float32)
    layer, seen = grouped(k, k, np.tile(np.arange(8, dtype=np.int32), (B, 1, 1))), 8
    assert np.asarray(layer.room).tolist() == [3, 3]
    for _ in range(3):
        layer, seen = append(layer, tokens([seen] * B, [1] * B)), seen + 1
        held = np.asarray(layer.pos)[0, 0]
        assert sorted(held[held != EMPTY].tolist()) == list(range(seen))
    assert np.asarray(layer.room).tolist() == [0, 0]
    again = append(layer, tokens([seen] * B, [1] * B))
    for x, y in zip(jax.tree.leaves(layer), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(x, y)  # Beyond the end nothing is written.


put, take = jax.jit(put_slots), jax.jit(take_slots)


@pytest.mark.parametrize("heads", [1, H])
@given(st.data())
@settings(max_examples=15)
def test_put_and_take(heads, data):
    """An index of S or more writes nothing; one head of indices serves all heads."""
    index = data.draw(
        st.lists(st.lists(st.permutations(range(CAPACITY + 3)), min_size=heads, max_size=heads), min_size=B, max_size=B)
    )
    index = np.array(index, np.int32)[:, :, :T]
    leaf = np.zeros((B, H, CAPACITY, D), np.float32)
    value = np.arange(B * H * T * D, dtype=np.float32).reshape(B, H, T, D) + 1
    found = np.asarray(put(leaf, index, value))
    for b in range(B):
        for h in range(H):
            for t, i in enumerate(index[b, h if heads == H else 0]):
                if i < CAPACITY:
                    leaf[b, h, i] = value[b, h, t]
    np.testing.assert_array_equal(found, leaf)
    inside = np.minimum(index, CAPACITY - 1)
    taken = np.asarray(take(leaf, inside))
    for b in range(B):
        for h in range(H):
            np.testing.assert_array_equal(taken[b, h], leaf[b, h][inside[b, h if heads == H else 0]])
    one = take(leaf[:, :1], np.broadcast_to(inside, (B, H, T)))
    assert one.shape == (B, H, T, D)


CODECS = {
    Plain(): 0.0,
    Plain("bfloat16"): 2.0**-8,
    Scaled("int8"): 0.5 / 127,
    Scaled("float8_e4m3fn"): 1 / 16,
    Scaled("float8_e5m2"): 1 / 8,
    Packed(8, 16): 1 / 255 + 2.0**-10,
    Packed(4, 16): 1 / 15,
    Packed(2, 16): 1 / 3,
}


@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_codecs(codec, rng):
    """Error of at most so much of the largest number; `dot` and `mix` are products with what is decoded."""
    x = jnp.asarray(rng.normal(size=(B, H, 5, 32)), jnp.float32)
    q, p = (jnp.asarray(rng.normal(size=(B, H, 4, n)), jnp.float32) for n in (32, 5))
    codec.check(32)
    codes = codec.encode(x)
    decoded = np.asarray(codec.decode(codes), np.float64)
    assert (np.abs(decoded - x) <= CODECS[codec] * np.abs(x).max(-1, keepdims=True) + 1e-7).all()
    np.testing.assert_allclose(codec.dot(q, codes), np.einsum("bhnd,bhsd->bhns", q, decoded), atol=1e-4)
    np.testing.assert_allclose(codec.mix(p, codes), np.einsum("bhns,bhsd->bhnd", p, decoded), atol=2e-2)
    # Tokens are written one by one, so they can be moved and overwritten.
    part = codec.encode(x[:, :, 2:3])
    for whole, one in zip(jax.tree.leaves(codes), jax.tree.leaves(part), strict=True):
        assert whole.shape[:3] == (B, H, 5)
        np.testing.assert_array_equal(whole[:, :, 2:3], one)
    zeros = codec.decode(codec.encode(jnp.zeros((1, 1, 2, 32))))
    assert (np.asarray(zeros) == 0).all()


def test_a_codec_says_what_it_cannot_hold():
    with pytest.raises(ValueError, match="4-bit codes in groups of 12 need a head_dim that is a multiple of 8"):
        Packed(4, 12).check(32)
