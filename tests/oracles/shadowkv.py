"""ShadowKV (arXiv 2410.21465, algorithms 1 and 2): low-rank keys before rotation, values elsewhere, chunk landmarks.

The end of a prompt of T tokens: `local` whole chunks and the T % chunk tokens behind them stay exact. Every chunk
before them gets a landmark, the mean of its rotated keys; the `outliers` chunks per KV head that are worst described
by it (the smallest cosine of any of their keys with the mean) stay exact too. All unrotated keys, the heads side by
side [T, Hk * D], are approximated by their best matrix of `rank`.

A step: softmax of the query over the landmarks of the other chunks, the largest over the query group, the best chunks
of each KV head; their keys are rebuilt and rotated at their own positions, their values fetched. Attention is over
exact tokens, these, and all generated ones. The authors divide the landmarks' logits by sqrt(128) whatever D is.
"""

import math
from typing import NamedTuple

import numpy as np

from tests.oracles.attention import attention, rope, softmax


def low_rank_keys(k_raw: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """U [T, r] with orthonormal columns and S V per KV head [Hk, r, D]; U @ SV[h] approximates k_raw [Hk, T, D]."""
    kv_heads, length, dim = k_raw.shape
    side_by_side = np.concatenate([k_raw[h] for h in range(kv_heads)], axis=1)
    u, s, vt = np.linalg.svd(np.asarray(side_by_side, np.float64), full_matrices=False)
    scaled = s[:rank, None] * vt[:rank]
    return u[:, :rank], np.stack([scaled[:, h * dim : (h + 1) * dim] for h in range(kv_heads)])


class Chunks(NamedTuple):
    """How a prompt is cut: `number` chunks before the local part; per KV head, which are outliers, and the landmarks
    [Hk, number - outliers, D] of chunks `ids` [Hk, number - outliers], ascending. `cosine` [Hk, number] is the smallest
    of each chunk."""

    number: int
    local: int
    cosine: np.ndarray
    outlier: np.ndarray
    ids: np.ndarray
    landmarks: np.ndarray


def cut(k: np.ndarray, *, chunk: int = 8, local: int = 4, outliers: int = 48) -> Chunks:
    """Chunks of rotated keys k [Hk, T, D]. A prompt too short for that many local and outlier chunks has fewer."""
    kv_heads, length, dim = k.shape
    number = max(length // chunk - local, 0)
    outliers = min(outliers, number)
    means, cosine = np.zeros((kv_heads, number, dim)), np.zeros((kv_heads, number))
    for h in range(kv_heads):
        for c in range(number):
            keys = np.asarray(k[h, c * chunk : (c + 1) * chunk], np.float64)
            means[h, c] = keys.mean(axis=0)
            norms = np.linalg.norm(keys, axis=1) * np.linalg.norm(means[h, c])
            cosine[h, c] = (keys @ means[h, c] / norms).min()
    outlier = np.zeros((kv_heads, number), bool)
    for h in range(kv_heads):
        outlier[h, np.argsort(cosine[h], kind="stable")[:outliers]] = True
    ids = np.stack([np.flatnonzero(~outlier[h]) for h in range(kv_heads)])
    landmarks = np.stack([means[h][ids[h]] for h in range(kv_heads)])
    return Chunks(number, length - number * chunk, cosine, outlier, ids, landmarks)


def choose(q: np.ndarray, chunks: Chunks, number: int, scale: float | None = None) -> np.ndarray:
    """Chunks that one query q [H, D] (rotated) reads, per KV head [Hk, number], best first.

    Args:
      number: Chunks to read; all where there are not as many.
      scale: Of the landmarks' logits; 1 / sqrt(D) by default.
    """
    kv_heads, _, dim = chunks.landmarks.shape
    group = len(q) // kv_heads
    scale = dim**-0.5 if scale is None else scale
    if not chunks.ids.shape[1]:
        return chunks.ids
    best = []
    for h in range(kv_heads):
        weights = np.stack([softmax(scale * (chunks.landmarks[h] @ q[h * group + g])) for g in range(group)])
        order = np.argsort(-weights.max(axis=0), kind="stable")[:number]
        best.append(chunks.ids[h][order])
    return np.stack(best)


def positions_of(chosen: np.ndarray, chunk: int = 8) -> np.ndarray:
    """Chunks [Hk, n] -> their tokens [Hk, n * chunk]."""
    return (chosen[:, :, None] * chunk + np.arange(chunk)).reshape(len(chosen), -1)


def shadowkv_decode(
    q: np.ndarray,
    k_raw: np.ndarray,
    v: np.ndarray,
    *,
    prompt: int,
    number: int,
    rank: int = 160,
    chunk: int = 8,
    local: int = 4,
    outliers: int = 48,
    scale: float | None = None,
    landmark_scale: float | None = None,
    theta: float = 1e4,
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Attention outputs [H, T - prompt, D] of tokens prompt..T-1, decoded one by one, and the chunks that each read.

    Args:
      q: [H, T, D], rotated. k_raw: [Hk, T, D], before rotation. v: [Hk, T, D].
      number: Chunks that a step reads (the sparse budget over the chunk size).
      scale: Of attention, landmark_scale: of the landmarks' logits; 1 / sqrt(D) by default.
      theta: Of the rotation.
    """
    kv_heads, length, dim = k_raw.shape
    group = len(q) // kv_heads
    k = rope(k_raw, np.arange(length), theta)
    u, sv = low_rank_keys(k_raw[:, :prompt], rank)
    rebuilt = rope(np.stack([u @ sv[h] for h in range(kv_heads)]), np.arange(prompt), theta)
    chunks = cut(k[:, :prompt], chunk=chunk, local=local, outliers=outliers)
    outputs, read = [], []
    for t in range(prompt, length):
        chosen = choose(q[:, t], chunks, number, landmark_scale)
        out = np.zeros((len(q), dim))
        for h in range(kv_heads):
            exact = [
                *range(chunks.number * chunk, t + 1),
                *(p for c in np.flatnonzero(chunks.outlier[h]) for p in range(c * chunk, (c + 1) * chunk)),
            ]
            sparse = positions_of(chosen[h : h + 1], chunk)[0]
            keys = np.concatenate([k[h, exact], rebuilt[h, sparse]])
            values = np.concatenate([v[h, exact], v[h, sparse]])
            mine = slice(h * group, (h + 1) * group)
            n = np.arange(len(keys))  # All of them come before the query: order does not matter.
            options = {"scale": 1 / math.sqrt(dim) if scale is None else scale, "q_positions": n[-1:]}
            out[mine] = attention(q[mine, t : t + 1], keys[None], values[None], k_positions=n, **options)[:, 0]
        outputs.append(out)
        read.append(chosen)
    return np.stack(outputs, axis=1), read
