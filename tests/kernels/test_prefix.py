"""Attention over shared prefixes equals attention of every row over its prefixes and then its own tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.kernels.choose import KernelError
from kvjax.kernels.decode import decode_attention
from kvjax.kernels.parts import NEG, merge, unfold
from kvjax.kernels.prefix import Prefixes, prefix_attention
from kvjax.kernels.vectors import Vectors

B, H, G, D, SCALE = 5, 2, 3, 16, 0.3


def draw(*shape: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def level(lengths: list[int], rows: list[list[int]], seed: int, slots: int = 12) -> Prefixes:
    """Prefixes of so many tokens (NaN beyond), shared by these rows."""
    there = (np.arange(slots) < np.array(lengths)[:, None])[:, None, :, None]
    k, v = (np.where(there, draw(len(lengths), H, slots, D, seed=seed + i), np.nan) for i in (0, 1))
    width = max(len(group) for group in rows)
    padded = [group + [-1] * (width - len(group)) for group in rows]
    return Prefixes(
        k=Vectors(codes=jnp.asarray(k)),
        v=Vectors(codes=jnp.asarray(v)),
        lengths=jnp.tile(jnp.array(lengths, jnp.int32)[:, None], (1, H)),
        rows=jnp.array(padded, jnp.int32),
    )


TREES = {
    "one for all": [([9], [[0, 1, 2, 3, 4]])],
    "groups of different size": [([9, 12, 4], [[3, 0], [1], [4, 2]])],
    "a group with padding and rows without a prefix": [([9, 5], [[3], [1, 0]])],
    "two levels": [([10], [[0, 1, 2, 3, 4]]), ([3, 7], [[4, 0, 2], [3]])],
    "three levels, the middle skipped by some": [
        ([10, 2], [[0, 1, 2], [3, 4]]),
        ([3], [[1, 4]]),
        ([1, 7], [[2], [0, 4, 3]]),
    ],
    "an empty prefix": [([0, 6], [[0, 1], [2, 3, 4]])],
}


def concatenated(q, levels, k, v, suffix: list[int], softcap: float):
    """[B, H * G, T, D] in float64, row by row."""
    out = np.zeros(q.shape)
    for b in range(B):
        found = [(one, p) for one in levels for p, rows in enumerate(np.asarray(one.rows)) if b in rows]
        parts = [(one.k.codes[p], one.v.codes[p], int(one.lengths[p, 0])) for one, p in found]
        parts.append((k[b], v[b], suffix[b]))
        keys, values = (
            np.concatenate([np.asarray(part[i], np.float64)[:, : part[2]] for part in parts], 1) for i in (0, 1)
        )
        logits = SCALE * np.einsum("hgtd,hsd->hgts", q[b].reshape(H, G, -1, D).astype(np.float64), keys)
        logits = softcap * np.tanh(logits / softcap) if softcap else logits
        p = np.exp(logits - logits.max(-1, keepdims=True))
        answer = np.einsum("hgts,hsd->hgtd", p / p.sum(-1, keepdims=True), values)
        out[b] = answer.reshape(H * G, -1, D)
    return out


@pytest.mark.parametrize("name", TREES)
@pytest.mark.parametrize("tokens, softcap", [(1, 0.0), (3, 2.0)])
def test_equals_concatenation(name, tokens, softcap):
    levels = [level(*one, seed=10 * i) for i, one in enumerate(TREES[name])]
    q, suffix = draw(B, H * G, tokens, D, seed=90), [3, 1, 8, 2, 5]
    k, v = (draw(B, H, 8, D, seed=91 + i) for i in (0, 1))

    @jax.jit
    def attend(q, levels, k, v):
        shared = prefix_attention(q, levels, scale=SCALE, softcap=softcap)
        own = decode_attention(q, k, v, jnp.array(suffix), scale=SCALE, softcap=softcap)
        return unfold(merge([shared, own]).out, tokens)

    got = attend(q, levels, k, v)
    np.testing.assert_allclose(got, concatenated(q, levels, k, v, suffix, softcap), atol=3e-6)


def test_rows_without_a_prefix_and_padding_see_nothing():
    one = level([9, 5], [[3], [1, 0]], seed=0)
    q, q_pos = draw(B, H * G, 2, D, seed=90), jnp.array([[4, -1]] * B)
    part = prefix_attention(q, [one], scale=SCALE, q_pos=q_pos)
    lse, out = part.lse.reshape(B, H, G, 2), part.out.reshape(B, H, G, 2, D)
    nothing = np.zeros((B, 2), bool)
    nothing[[2, 4]], nothing[:, 1] = True, True
    np.testing.assert_array_equal(np.asarray(lse == NEG).all((1, 2)), nothing)
    np.testing.assert_array_equal(np.asarray(lse == NEG).any((1, 2)), nothing)
    assert not np.asarray(out)[np.broadcast_to(nothing[:, None, None], lse.shape)].any()


def test_stored_in_few_bits():
    """A level may be stored in any form; implementations agree."""
    rng = np.random.default_rng(1)
    words, scale = (rng.integers(-(2**31), 2**31, (2, H, 32, 2)) for _ in range(2)), rng.random((2, 2, H, 32, 1))
    k, v = (
        Vectors(
            codes=jnp.asarray(w, jnp.int32), scale=jnp.asarray(s, jnp.float32) / 8, zero=jnp.full(s.shape, -1.0), bits=4
        )
        for w, s in zip(words, scale, strict=True)
    )
    one = Prefixes(k=k, v=v, lengths=jnp.array([[32, 30], [7, 8]]), rows=jnp.array([[0, 2, 4], [1, -1, -1]]))
    q = draw(B, H * G, 2, D, seed=3)
    got, want = (prefix_attention(q, [one], scale=SCALE, implementation=name) for name in ("xla", "reference"))
    np.testing.assert_allclose(got.out, want.out, atol=1e-5)
    np.testing.assert_allclose(got.lse, want.lse, atol=1e-5)


def test_no_levels():
    with pytest.raises(KernelError, match="no level"):
        prefix_attention(jnp.zeros((B, H * G, 1, D)), [])
