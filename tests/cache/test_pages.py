"""Heads of different lengths: pages hold what dense attention over each head's own tokens would see."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.cache import EMPTY, LayerSpec, Packed, Plain, Scaled, Tokens
from kvjax.cache.pages import Pages, Together, make_pages
from kvjax.cache.types import tree_nbytes

HEADS, GROUP, DIM, PAGE = 3, 2, 16, 4
SPEC = LayerSpec(scale=0.4, softcap=8.0)
COUNTS = np.array([[9, 4, 13], [3, 12, 0]])  # Tokens of each row and head; 26 and 15.
LENGTH = 20
SEEN = np.array([20, 16])  # Positions before the next token.


@functools.cache
def prompt():
    """k, v [2, 3, 20, 16] and positions: a random subset for each head, increasing, at the front."""
    rng = np.random.default_rng(0)
    k, v = rng.normal(size=(2, 2, HEADS, LENGTH, DIM)).astype(np.float32)
    pos = np.full((2, HEADS, LENGTH), EMPTY, np.int32)
    for row in range(2):
        for head in range(HEADS):
            n = COUNTS[row, head]
            pos[row, head, :n] = np.sort(rng.permutation(SEEN[row])[:n])
    return k, v, pos


# Whatever runs often is compiled: operations one by one would take longer.
make = functools.partial(jax.jit, static_argnames=("page", "tokens", "k_codec", "v_codec"))(make_pages)
attend = jax.jit(lambda layer, new: layer.attend(new, SPEC)[:2])
append = jax.jit(lambda layer, new: layer.append(new))
held = jax.jit(lambda layer: layer.held(SPEC))
rounded = jax.jit(lambda codec, pages: codec.decode(codec.encode(pages)), static_argnums=0)


def build(**codecs) -> Pages:
    return make(*map(jnp.asarray, prompt()), page=PAGE, tokens=26, **codecs)


def new_tokens(length: int, counts, seed: int = 1) -> Tokens:
    rng = np.random.default_rng(seed)
    draw = lambda heads: jnp.asarray(rng.normal(size=(2, heads, length, DIM)), jnp.float32)  # noqa: E731
    order = np.arange(length)
    pos = np.where(order < np.asarray(counts)[:, None], SEEN[:, None] + order, EMPTY)
    q, k = draw(HEADS * GROUP), draw(HEADS)
    return Tokens(q=q, k=k, v=draw(HEADS), q_raw=q, k_raw=k, pos=jnp.asarray(pos, jnp.int32))


def dense(new: Tokens, row: int, t: int) -> np.ndarray:
    """Output [H * G, D] of a query, over its head's tokens and the new ones up to it."""
    k, v, pos = prompt()
    out = []
    for head in range(HEADS * GROUP):
        h = head // GROUP
        n = COUNTS[row, h]
        keys = np.concatenate([k[row, h, :n], np.asarray(new.k)[row, h, : t + 1]])
        values = np.concatenate([v[row, h, :n], np.asarray(new.v)[row, h, : t + 1]])
        logits = 8 * np.tanh(0.4 * keys @ np.asarray(new.q)[row, head, t] / 8)
        weights = np.exp(logits - logits.max())
        out.append(weights @ values / weights.sum())
    return np.stack(out)


def content(layer: Pages, row: int, head: int):
    """Positions, keys and values of one head, by position."""
    pos, k, v = (np.asarray(x)[row, head] for x in held(layer))
    order = np.argsort(pos, kind="stable")[(pos == EMPTY).sum() :]
    return pos[order], k[order], v[order]


def test_each_head_holds_its_own_tokens():
    k, v, pos = prompt()
    layer = build()
    assert layer.owner.shape == (2, 6)  # 26 tokens in pages of four.
    np.testing.assert_array_equal(layer.owner, [[0, 0, 1, 2, 2, 2], [1, 1, 1, EMPTY, EMPTY, EMPTY]])
    np.testing.assert_array_equal(layer.count, COUNTS)
    for row in range(2):
        for head in range(HEADS):
            n = COUNTS[row, head]
            found = content(layer, row, head)
            for x, want in zip(found, (pos, k, v), strict=True):
                np.testing.assert_array_equal(x, want[row, head, :n])


def test_nothing_is_padded_beyond_a_page():
    layer = build()
    token = 2 * DIM * 4 + 4
    assert tree_nbytes(layer) == 2 * ((6 * PAGE + HEADS * PAGE) * token + 6 * 4)
    assert tree_nbytes(layer) <= 2 * ((26 + HEADS * PAGE) * token + 6 * 4)
    # A rectangle would be as long as the longest head.
    assert 26 + HEADS * PAGE < HEADS * COUNTS.max()


@pytest.mark.parametrize("length", [1, 5, 19])
def test_attention_is_that_of_each_heads_tokens(length):
    """However many tokens come at once."""
    counts = [length, max(length - 2, 1)]
    new = new_tokens(length, counts)
    layer = build().reserve(length)
    out, after = attend(layer, new)
    for row in range(2):
        for t in range(counts[row]):
            np.testing.assert_allclose(out[row, :, t], dense(new, row, t), atol=2e-5)
    np.testing.assert_array_equal(after.count, COUNTS + np.array(counts)[:, None])
    assert np.abs(np.asarray(out)[1, :, counts[1] :]).max(initial=0) == 0


def test_single_steps_are_the_chunk():
    new = new_tokens(11, [11, 7])
    layer = build().reserve(11)
    out, chunk = attend(layer, new)
    for t in range(11):
        one = jax.tree.map(lambda x, t=t: x[..., t : t + 1] if x.ndim == 2 else x[:, :, t : t + 1], new)
        found, layer = attend(layer, one)
        live = np.asarray(one.pos)[:, 0] != EMPTY
        np.testing.assert_allclose(found[live, :, 0], out[live, :, t], atol=2e-5)
    for row in range(2):
        for head in range(HEADS):
            for x, want in zip(content(layer, row, head), content(chunk, row, head), strict=True):
                np.testing.assert_array_equal(x, want)


def test_room_is_how_many_tokens_fit():
    layer = build()
    free, tails = (layer.owner == EMPTY).sum(-1), COUNTS % PAGE
    for row in range(2):
        fits = 0
        while sum((tails[row] + fits + 1) // PAGE) <= free[row]:
            fits += 1
        assert layer.room[row] == fits
    assert (np.asarray(layer.reserve(7).room) >= np.asarray(layer.room) + 7).all()
    assert (layer.reserve(8).room == layer.room + 8).all()


def test_what_does_not_fit_is_dropped():
    """Nobody can add room inside `jit`. Each head gets as many as fit, the same ones, and keeps what it had."""
    layer = build()
    room = np.asarray(layer.room)
    after = append(layer, new_tokens(room.max() + 5, [room.max() + 5] * 2))
    np.testing.assert_array_equal(after.room, 0)
    np.testing.assert_array_equal(after.count, COUNTS + room[:, None])
    for row in range(2):
        for head in range(HEADS):
            before = content(layer, row, head)[0]
            want = [*before, *(SEEN[row] + np.arange(room[row]))]
            np.testing.assert_array_equal(content(after, row, head)[0], want)


def test_free_pages_may_hold_anything():
    layer = build().reserve(8)
    free = (layer.owner == EMPTY)[..., None, None]
    poisoned = dataclasses.replace(layer, k=jnp.where(free, jnp.nan, layer.k))
    new = new_tokens(2, [2, 2])
    np.testing.assert_array_equal(attend(poisoned, new)[0], attend(layer, new)[0])


def test_heads_without_a_page():
    """A pool of no pages: all tokens stand in the tails."""
    k, v, pos = (jnp.asarray(x)[:, :, :3] for x in prompt())
    pos = jnp.where(pos == EMPTY, 0, pos)
    layer = make(k, v, pos, page=PAGE, tokens=3)
    assert layer.owner.shape == (2, 0) and (layer.room == 0).all()
    out, layer = attend(layer.reserve(3), new_tokens(3, [3, 3]))
    np.testing.assert_array_equal(layer.count, 6)
    assert np.isfinite(out).all()


CODECS = {
    "int8": (Scaled(), Scaled()),
    "int4": (Packed(4, 16), Packed(4, 16)),
    "kivi8": (Together(8, 4, -2), Together(8, 16, -1)),
    "bfloat16": (Plain("bfloat16"), Plain("bfloat16")),
}


@pytest.mark.parametrize("name", CODECS)
def test_pages_are_written_by_their_codecs(name):
    """Tails stay exact; pages are what the codec makes of four tokens of their head."""
    k_codec, v_codec = CODECS[name]
    layer, plain = build(k_codec=k_codec, v_codec=v_codec), build()
    assert tree_nbytes(layer) < tree_nbytes(plain)
    new = new_tokens(5, [5, 3])
    near, layer = attend(layer.reserve(5), new)
    far, plain = attend(plain.reserve(5), new)
    assert 0 < np.abs(near - far).max() < 0.2
    for row in range(2):
        for head in range(HEADS):
            found, want = content(layer, row, head), content(plain, row, head)
            np.testing.assert_array_equal(found[0], want[0])
            n = len(want[0]) // PAGE * PAGE
            for x, y, codec in zip(found[1:], want[1:], (k_codec, v_codec), strict=True):
                np.testing.assert_array_equal(x[n:], y[n:])
                pages = np.zeros((1, 5, PAGE, DIM), np.float32)
                pages.reshape(-1, DIM)[:n] = y[:n]
                back = np.asarray(rounded(codec, pages), np.float32).reshape(-1, DIM)[:n]
                # In another program the last bit of a scale may differ, and with it a code.
                np.testing.assert_allclose(x[:n], back, atol=0.01 * np.ptp(y) if n else 0)


def test_codecs_of_whole_pages_check_head_dims():
    with pytest.raises(ValueError, match="multiple of 16"):
        Together(2, 8, -1).check(24)
    Together(2, 8, -2).check(24)
