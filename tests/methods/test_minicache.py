"""MiniCache: two layers against its oracle, recorded merges of xKV's code, and what makes it MiniCache."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax.cache import Cache, Slots
from kvjax.cache.paired import angles, make_pair, polar, retained, slerp
from kvjax.cache.types import tree_nbytes
from kvjax.policies import attend_with
from tests import tiny
from tests.methods.layer import compress, spec, tokens
from tests.oracles import minicache
from tests.oracles.attention import rope
from tests.oracles.test_golden import golden

DIM, STEPS = 16, 5
LENGTHS = (30, 17)
TOLERANCE = 2e-5  # float32 against float64.
CONFIG = dataclasses.replace(tiny.CONFIG, layer_types=("full", "full"))


def policy(**changes) -> kvjax.Policy:
    return kvjax.policy("minicache", **{"start": 0, "gamma": 0.3, "most": 1.0, **changes})


@functools.cache
def layers():
    """Of two layers, of each row: q [4, T, D], k, v [2, T, D]; directions agree somewhat."""
    rng = np.random.default_rng(0)
    draw = lambda heads, n: rng.normal(size=(heads, n + STEPS, DIM)).astype(np.float32)  # noqa: E731
    lower = [(draw(4, n), draw(2, n), draw(2, n)) for n in LENGTHS]
    near = lambda x: (2 * x + rng.normal(size=x.shape) * rng.uniform(0, 3, (*x.shape[:2], 1))).astype(np.float32)  # noqa: E731
    return [lower, [tuple(near(x) for x in row) for row in lower]]


def cache_of(made_by, about=None) -> Cache:
    """The two prompts, merged, with room for what is decoded."""
    about = about or spec(DIM)
    plain = [compress(kvjax.policy("full"), about, tokens(rows, 0, list(LENGTHS))) for rows in layers()]
    cache = Cache(layers=tuple(plain), seen=jnp.asarray(LENGTHS), config=CONFIG, policy=made_by)
    return made_by.transform.apply(cache, made_by.layout).reserve(STEPS)


@functools.partial(jax.jit, static_argnames=("about",))
def decode(about, cache: Cache, news):
    """One token through both layers, and the cache with it merged."""
    shared, outputs, after = None, [], []
    for layer, new in zip(cache.layers, news, strict=True):
        out, layer, shared = attend_with(cache.policy)(about, layer, new, shared)
        outputs, after = [*outputs, out], [*after, layer]
    return outputs, cache.policy.transform.step(dataclasses.replace(cache, layers=tuple(after))), shared


def step(cache: Cache, t: int, about=None):
    news = []
    for rows in layers():
        ahead = [tuple(x[:, n + t : n + t + 1] for x in row) for row, n in zip(rows, LENGTHS, strict=True)]
        news.append(dataclasses.replace(tokens(ahead, 0, 1), pos=jnp.asarray(LENGTHS, jnp.int32)[:, None] + t))
    return decode(about or spec(DIM), cache, news)


@pytest.mark.parametrize("options", [{}, {"scale": 0.7, "softcap": 3.0}])
def test_decodes_like_its_oracle(options):
    """Ragged rows, grouped queries, retained tokens; decoded tokens are merged one after another."""
    about, outputs = spec(DIM, **options), []
    cache = cache_of(policy(), about)
    for t in range(STEPS):
        out, cache, shared = step(cache, t, about)
        assert shared is None  # The store is lent within a pass.
        outputs.append(out)
    for row, length in enumerate(LENGTHS):
        lower, upper = (rows[row] for rows in layers())
        want = minicache.minicache_decode(lower, upper, prompt=length, gamma=0.3, **options)
        for layer in range(2):
            found = np.concatenate([np.asarray(out[layer][row]) for out in outputs], 1)
            np.testing.assert_allclose(found, want[layer], atol=TOLERANCE)


def test_what_both_layers_read_back():
    """Own magnitudes on a direction that is shared; the retained are untouched."""
    cache = cache_of(policy())
    apart = cache.policy.transform.apart(cache)
    for row, length in enumerate(LENGTHS):
        for which in (1, 2):
            low, high = (rows[row][which][:, :length] for rows in layers())
            merged = minicache.merge(low, high, gamma=0.3)
            assert 0 < merged.retained.sum() < merged.retained.size / 2
            for layer, want in zip(apart, minicache.restore(merged, low, high), strict=True):
                found = np.asarray(layer.held(spec(DIM))[which])[row, :, :length]
                np.testing.assert_allclose(found, want, atol=TOLERANCE)


def test_recorded_merges():
    """Directions, threshold and restored vectors of xKV's code; its threshold is `1 - gamma` here."""
    data = golden("eviction_merging/minicache_slerp")
    x = [jnp.asarray(data[name])[None, None] for name in ("X1", "X2")]
    (norm1, lower), (norm2, upper) = (polar(one) for one in x)
    np.testing.assert_allclose(norm1[0, 0], data["norm1"], rtol=1e-5)
    np.testing.assert_allclose(norm2[0, 0], data["norm2"], rtol=1e-5)
    apart = np.delete(np.arange(96), (10, 11))  # Parallel rows: xKV leaves them unnormalised.
    for t in (0.5, 0.6):
        found, want = np.asarray(slerp(lower, upper, t))[0, 0], data[f"t{t}_g0.05_E"]
        error = np.linalg.norm(found - want, axis=-1)[apart] / np.linalg.norm(want, axis=-1)[apart]
        assert error.max() < 1e-3
        np.testing.assert_allclose(np.linalg.norm(found, axis=-1), 1.0, rtol=1e-5)
    pos = jnp.arange(96, dtype=jnp.int32)[None, None]
    for t, gamma in ((0.5, 0.05), (0.6, 0.05), (0.6, 0.5), (0.5, 1.0)):
        slot = retained(angles(lower, upper), pos >= 0, 1 - gamma, jnp.asarray([96]), 96)
        mask = np.isin(np.arange(96), np.asarray(slot))
        np.testing.assert_array_equal(mask, data[f"t{t}_g{gamma}_diverge_mask"].astype(bool))
    slots = [Slots(k=one, v=one, pos=pos) for one in x]
    pair = make_pair(*slots, t=0.6, gamma=0.0, most=0.0, codec=slots[0].codec)
    merged = data["t0.6_g0.05_diverge_mask"].astype(bool)  # It restores these, and leaves the others as they were.
    for layer, name in zip((pair[0], pair[1].with_store(pair[0].store)), ("E1", "E2"), strict=True):
        found, want = np.asarray(layer.held(spec(64))[1])[0, 0], data[f"t0.6_g0.05_{name}"]
        error = np.linalg.norm(found - want, axis=-1)[merged] / np.linalg.norm(want, axis=-1)[merged]
        assert error.max() < 1e-3


def test_one_store_for_two_layers():
    """Bytes: a direction instead of two vectors, a magnitude for each layer, retained tokens twice; no more."""
    cache = kvjax.prefill(tiny.params(), tiny.CONFIG, policy(most=0.25), tiny.TOKENS)
    full = kvjax.prefill(tiny.params(), tiny.CONFIG, kvjax.policy("full"), tiny.TOKENS)
    rows, slots, heads, dim = 4, 48, 2, 16
    two_layers = 2 * 2 * rows * slots * heads * dim * 4
    spared = full.nbytes - cache.nbytes
    norms, kept = 2 * 2 * rows * heads * slots * 4, 2 * rows * heads * 12 * (2 * dim + 1) * 4
    waiting = 2 * rows * (2 * heads * dim + 1) * 4
    assert spared == two_layers // 2 - norms - kept - waiting
    assert cache.layers[2].store is None and tree_nbytes(cache.layers[2]) < tree_nbytes(cache.layers[0]) / 2


def test_only_from_the_middle_on_and_never_alone():
    transform = kvjax.policy("minicache").transform
    assert transform.pairs(8) == [(4, 5), (6, 7)]
    assert transform.pairs(5) == [(2, 3)]  # The last has no partner.
    assert policy(start=1).transform.pairs(8) == [(1, 2), (3, 4), (5, 6)]


def test_there_is_room_for_so_many_and_the_most_distinct_come_first():
    angle = jnp.asarray(np.random.default_rng(0).permutation(40)[None, None] + 1.0)
    there = jnp.arange(40)[None, None] < 32
    slot = np.asarray(retained(angle, there, 0.5, jnp.asarray([6]), 8))[0, 0]
    order = np.argsort(-np.asarray(angle)[0, 0, :32])
    np.testing.assert_array_equal(slot, [*order[:6], -1, -1])
    assert (np.asarray(retained(angle, there, 0.0, jnp.asarray([6]), 8)) == -1).all()


def test_parallel_and_opposite_and_zero_vectors():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 16)), jnp.float32)
    x = x.at[2].set(0.0)
    _, unit = polar(x)
    np.testing.assert_allclose(slerp(unit, unit, 0.6), unit, atol=1e-6)
    assert np.isfinite(slerp(unit, -unit, 0.6)).all()
    assert float(angles(unit, unit).max()) == 0.0 and np.isfinite(unit).all()


def test_rotation_changes_nothing():
    """Keys of both layers are turned by the same angles, so it does not matter when they are merged."""
    low, high = (np.asarray(rows[0][1], np.float64) for rows in layers())
    turned = [rope(x, np.arange(x.shape[1])) for x in (low, high)]
    before, after = minicache.merge(low, high), minicache.merge(*turned)
    np.testing.assert_allclose(rope(before.direction, np.arange(low.shape[1])), after.direction, atol=1e-9)
    np.testing.assert_array_equal(before.retained, after.retained)


def test_directions_are_rounded_once():
    """`minicache | int8`: merged in full precision, then rounded; `minicache | int4` is smaller still."""
    caches = {
        text: cache_of(kvjax.parse_policy(f"minicache(start=0, gamma=0.3, most=0.5){text}"))
        for text in ("", " | int8", " | int4(group=16)")
    }
    exact, near = (caches[text].policy.transform.apart(caches[text]) for text in ("", " | int8"))
    for want, found in zip(exact, near, strict=True):
        for x, y in zip(want.held(spec(DIM))[1:], found.held(spec(DIM))[1:], strict=True):
            length = np.linalg.norm(x, axis=-1, keepdims=True)
            assert 0 < np.abs(x - y).max() and (np.abs(x - y) <= length / 127 * 0.51 + 1e-6).all()
    sizes = [cache.nbytes for cache in caches.values()]
    assert sizes[0] > sizes[1] > sizes[2]
    out, after, _ = step(caches[" | int8"], 0)
    want, *_ = step(caches[""], 0)
    assert 0 < np.abs(out[1] - want[1]).mean() < 0.05
    np.testing.assert_array_equal(after.layers[1].count, np.asarray(LENGTHS) + 1)


def test_layers_that_agree_lose_nothing():
    """On a model: generation goes on in a compiled loop, and a token that does not fit is dropped."""
    cache = kvjax.prefill(tiny.params(), tiny.CONFIG, policy(), tiny.TOKENS, tiny.LENGTHS)
    out, count = kvjax.generate(
        tiny.params(), tiny.CONFIG, cache.policy, tiny.QUESTION[:, :2], cache=cache, max_new_tokens=3
    )
    assert out.shape == (4, 3) and (count == 3).all()
    same = Slots(k=jnp.ones((1, 2, 4, 16)), v=jnp.ones((1, 2, 4, 16)), pos=jnp.arange(4)[None, None])
    lower, _ = make_pair(same, same, t=0.6, gamma=0.05, most=0.5, codec=same.codec)
    np.testing.assert_allclose(lower.held(spec(16))[1], 1.0, rtol=1e-5)
    cache = cache_of(policy())
    full = dataclasses.replace(cache, layers=tuple(cache_of(policy()).layers))
    for t in range(STEPS):
        _, full, _ = step(full, t)
    _, beyond, _ = step(full, STEPS - 1)
    np.testing.assert_array_equal(beyond.layers[0].pos[0], full.layers[0].pos[0])
    assert int(beyond.layers[0].room[0]) == 0


def test_a_block_of_tokens_is_refused():
    with pytest.raises(ValueError, match="one token at a time"):
        cache_of(policy()).layers[0].append(tokens(layers()[0], 0, 3))
    with pytest.raises(ValueError, match="has not lent it"):
        cache_of(policy()).layers[1].held(spec(DIM))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("minicache(start=1.5)", "share of all layers"),
        ("minicache(t=2)", "t is between 0 and 1"),
        ("minicache(most=-0.1)", "most is between 0 and 1"),
        ("snapkv(0.5) | minicache", "must hold the same tokens"),
        ("minicache | quest(64)", "read as a whole"),
        ("minicache | kivi", "one by one"),
    ],
)
def test_refused(text, message):
    with pytest.raises(kvjax.PolicyError, match=message):
        kvjax.parse_policy(text)


def test_a_model_without_a_pair_is_refused():
    with pytest.raises(kvjax.PolicyError, match="2 full-attention layers"):
        kvjax.plan(policy(start=0.5), tiny.CONFIG, 48, jnp.float32)
