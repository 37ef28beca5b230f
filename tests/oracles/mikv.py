"""MiKV (arXiv 2402.18096, section 3): tokens that an eviction policy would drop are kept in fewer bits.

There is no code of the authors; this follows the paper. H2O (half heavy hitters, half newest) decides which tokens are
important and stay in full precision, per KV head. The others are rounded per token, asymmetrically, in groups of half a
head: scale = (max - min) / (2^bits - 1), zero = min. A demoted token stays demoted. Outliers of a few channels would
spoil the groups of keys, so keys are multiplied by a balancer before they are rounded and the query divided by it:
b_c = sqrt(max_t |q_c| / max_t |k_c|) over the prompt, fixed afterwards, per layer, KV head (queries of the whole group)
and channel; 1 where either maximum is zero.

The prompt is attended to in full. In decoding a query attends to all tokens, rounded or not, and to itself; its weights
are added to the scores of the important tokens; then, if there are more than `heavy + recent`, one is demoted.
"""

from typing import NamedTuple

import numpy as np

from tests.oracles.attention import attention, attention_weights, group_sum
from tests.oracles.h2o import h2o_kept, h2o_scores


class Steps(NamedTuple):
    """What there is after the prompt (entry 0) and after every decoded token.

    Attributes:
      important: Per entry, positions in full precision [Hk, n], ascending.
      keys, values: Per entry, all tokens as they read back, [Hk, t, D].
      outputs: [H, steps, D], attention outputs of the decoded tokens.
    """

    important: list[np.ndarray]
    keys: list[np.ndarray]
    values: list[np.ndarray]
    outputs: np.ndarray


def balancer(q: np.ndarray, k: np.ndarray) -> np.ndarray:
    """b [Hk, D] of a prompt's queries [H, T, D] and keys [Hk, T, D], rotated."""
    top_k = np.abs(k).max(axis=1)
    top_q = np.abs(q).max(axis=1).reshape(len(k), -1, k.shape[2]).max(axis=1)
    known = (top_q > 0) & (top_k > 0)
    return np.where(known, np.sqrt(np.where(known, top_q, 1.0) / np.where(known, top_k, 1.0)), 1.0)


def rounded(x: np.ndarray, bits: int, group: int) -> np.ndarray:
    """Vectors [..., D] to 2^bits even steps in groups of channels, as they read back; half to even."""
    groups = x.reshape(*x.shape[:-1], x.shape[-1] // group, group)
    zero = groups.min(axis=-1, keepdims=True)
    scale = (groups.max(axis=-1, keepdims=True) - zero) / (2**bits - 1)
    codes = np.clip(np.rint((groups - zero) / np.where(scale > 0, scale, 1.0)), 0, 2**bits - 1)
    return (codes * scale + zero).reshape(x.shape)


def mikv_decode(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    *,
    prompt: int,
    heavy: int,
    recent: int,
    bits: int = 2,
    group: int | None = None,
    balance: bool = True,
    **options,
) -> Steps:
    """Prompt, then one token at a time.

    Args:
      q: [H, T, D], k, v: [Hk, T, D], rotated; the first `prompt` tokens are the prompt.
      heavy, recent: Important tokens: the best by accumulated attention, and the newest.
      bits, group: Of demoted tokens; half a head by default.
      balance: Whether keys are balanced.
      options: scale, softcap.
    """
    kv_heads, _, dim = k.shape
    group = dim // 2 if group is None else group
    scales = balancer(q[:, :prompt], k[:, :prompt]) if balance else np.ones((kv_heads, dim))
    low_k = rounded(k * scales[:, None], bits, group) / scales[:, None]
    low_v = rounded(v, bits, group)
    scores = h2o_scores(q[:, :prompt], k[:, :prompt], **options)
    important = h2o_kept(scores, heavy=heavy, recent=recent)
    scores = np.take_along_axis(scores, important, axis=1)
    steps = Steps([], [], [], np.zeros((len(q), q.shape[1] - prompt, dim)))

    def read(n: int) -> tuple[np.ndarray, np.ndarray]:
        full = np.zeros((kv_heads, n, 1), bool)
        for head in range(kv_heads):
            full[head, important[head]] = True
        return np.where(full, k[:, :n], low_k[:, :n]), np.where(full, v[:, :n], low_v[:, :n])

    def record(n: int) -> None:
        for entry, value in zip(steps[:3], (important, *read(n)), strict=True):
            entry.append(value)

    record(prompt)
    for t in range(prompt, q.shape[1]):
        important = np.concatenate([important, np.full((kv_heads, 1), t)], axis=1)
        query, (keys, values) = q[:, t : t + 1], read(t + 1)
        steps.outputs[:, t - prompt] = attention(query, keys, values, **options)[:, 0]
        seen = group_sum(attention_weights(query, keys, **options)[:, 0], kv_heads)
        scores = np.concatenate([scores, np.zeros((kv_heads, 1))], axis=1) + np.take_along_axis(seen, important, 1)
        slots = h2o_kept(scores, heavy=heavy, recent=recent)
        important, scores = np.take_along_axis(important, slots, axis=1), np.take_along_axis(scores, slots, axis=1)
        record(t + 1)
    return steps
