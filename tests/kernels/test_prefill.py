"""Attention in blocks against a softmax written out in NumPy float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.cache import EMPTY
from kvjax.kernels.parts import masked_softmax, visible
from kvjax.kernels.prefill import causal_attention

B, HEADS, KV_HEADS, D = 2, 4, 2, 8


@functools.cache
def draw(length: int):
    rng = np.random.default_rng(length)
    q = rng.normal(size=(B, HEADS, length, D)).astype(np.float32)
    k, v = (rng.normal(size=(B, KV_HEADS, length, D)).astype(np.float32) for _ in range(2))
    return 2 * q, k, v


def naive(q, k, v, lengths, scale, window, softcap):
    """Output [B, heads, T, D] and column sums [B, heads, T], query by query."""
    length = q.shape[2]
    out, sums = np.zeros(q.shape), np.zeros(q.shape[:3])
    for b in range(B):
        for h in range(HEADS):
            for i in range(lengths[b]):
                low = max(0, i + 1 - window) if window else 0
                logits = scale * (k[b, h // 2, low : i + 1].astype(np.float64) @ q[b, h, i].astype(np.float64))
                logits = softcap * np.tanh(logits / softcap) if softcap else logits
                weights = np.exp(logits - logits.max())
                weights /= weights.sum()
                out[b, h, i] = weights @ v[b, h // 2, low : i + 1]
                sums[b, h, low : i + 1] += weights
    assert length >= max(lengths)
    return out, sums


CASES = [
    # length, block, window, softcap, lengths
    (1, 256, 0, 0.0, (1, 1)),
    (13, 256, 0, 0.0, (13, 6)),
    (13, 4, 0, 0.0, (13, 6)),  # Blocks that do not divide the length.
    (32, 4, 0, 5.0, (32, 17)),  # Eight groups of one block.
    (70, 4, 0, 0.0, (70, 1)),  # More than eight blocks: groups of several.
    (13, 256, 4, 0.0, (13, 6)),
    (32, 8, 8, 0.0, (32, 17)),
    (37, 8, 5, 3.0, (37, 20)),  # Keys of a block: its own and those before, cut at both ends.
    (37, 8, 1, 0.0, (37, 20)),
    (37, 8, 100, 0.0, (37, 20)),  # A window that hides nothing.
]


@pytest.mark.parametrize("length, block, window, softcap, lengths", CASES)
def test_causal_attention(length, block, window, softcap, lengths):
    q, k, v = draw(length)
    pos = np.where(np.arange(length) < np.array(lengths)[:, None], np.arange(length), EMPTY).astype(np.int32)
    padding = (pos == EMPTY)[:, None, :, None]
    # Padding holds large numbers, which nobody may see.
    args = [jnp.asarray(np.where(padding, 1e4, x)) for x in (q, k, v)]
    run = functools.partial(causal_attention, scale=0.4, window=window, softcap=softcap, block=block)
    out, sums = jax.jit(functools.partial(run, column_sums=True))(*args, jnp.asarray(pos))
    want, want_sums = naive(q, k, v, lengths, 0.4, window, softcap)
    np.testing.assert_allclose(out, want, atol=2e-6)
    np.testing.assert_allclose(sums, want_sums, atol=2e-5)
    if length == 13:
        alone, nothing = jax.jit(run)(*args, jnp.asarray(pos))
        assert nothing is None
        np.testing.assert_allclose(alone, out, atol=1e-7)


def test_bfloat16_accumulates_in_float32():
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in draw(70))
    pos = jnp.tile(jnp.arange(70, dtype=jnp.int32), (B, 1))
    out, sums = causal_attention(q, k, v, pos, scale=0.4, block=16, column_sums=True)
    want, want_sums = naive(*(np.asarray(x, np.float32) for x in (q, k, v)), (70, 70), 0.4, 0, 0.0)
    assert out.dtype == jnp.bfloat16 and sums.dtype == jnp.float32
    np.testing.assert_allclose(out.astype(jnp.float32), want, atol=0.05)
    np.testing.assert_allclose(sums.sum(-1), want_sums.sum(-1), rtol=1e-4)


def test_visible():
    q_pos, k_pos = np.array([2, EMPTY, 5]), np.array([0, 2, 4, EMPTY, 6])
    assert np.asarray(visible(q_pos, k_pos)).tolist() == [
        [True, True] + [False] * 3,
        [False] * 5,
        [True] * 3 + [False] * 2,
    ]
    assert np.asarray(visible(q_pos, k_pos, 2)).tolist() == [
        [False, True] + [False] * 3,
        [False] * 5,
        [False, False, True] + [False] * 2,
    ]


def test_a_row_that_sees_nothing_is_zero():
    weights = masked_softmax(jnp.array([[1.0, 2.0], [3.0, jnp.nan]]), jnp.array([[False, False], [True, False]]))
    assert np.asarray(weights).tolist() == [[0.0, 0.0], [1.0, 0.0]]
