"""SnapKV (arXiv 2404.14469, section 4, listing 1): the last queries vote, neighbours are pooled, the window stays.

Order of kvpress and of kvjax: softmax over prefix and window (causal inside the window), drop the window's columns,
mean over the window's queries, pool every query head along the prefix, mean over the query group. The authors sum over
the queries and select per query head, on keys repeated to H heads (`votes="sum"`, `per_query_head=True`).
"""

from typing import Literal

import numpy as np

from tests.oracles.attention import attention_weights, group_mean
from tests.oracles.top_k import top_k


def pool(scores: np.ndarray, width: int, kind: Literal["avg", "max"]) -> np.ndarray:
    """1-D pooling with stride 1 over the last axis of [..., T], `width` odd.

    The average always divides by `width`: beyond the ends there are zeros, which are counted. The maximum ignores them.
    """
    half = width // 2
    length = scores.shape[-1]
    out = np.empty_like(scores)
    for t in range(length):
        near = scores[..., max(0, t - half) : min(length, t + half + 1)]
        out[..., t] = near.sum(axis=-1) / width if kind == "avg" else near.max(axis=-1)
    return out


def snapkv_prefix_scores(
    q: np.ndarray,
    k: np.ndarray,
    *,
    window: int = 32,
    width: int = 5,
    kind: Literal["avg", "max"] = "avg",
    votes: Literal["mean", "sum"] = "mean",
    per_query_head: bool = False,
    **options,
) -> np.ndarray:
    """Scores of the tokens before the window.

    Args:
      q: [H, Tq, D], Tq >= window (only the last `window` queries are used), k: [Hk, T, D], rotated.
      window: Observation window, in tokens.
      width, kind: Of the pooling.
      votes: How the window's queries are combined.
      per_query_head: Leave the query heads apart.
      options: scale, softcap.

    Returns:
      [Hk, T - window], or [H, T - window] with `per_query_head`.
    """
    weights = attention_weights(q[:, -window:], k, **options)[:, :, : k.shape[1] - window]
    total = weights.sum(axis=1)
    pooled = pool(total / window if votes == "mean" else total, width, kind)
    return pooled if per_query_head else group_mean(pooled, len(k))


def snapkv_scores(
    q: np.ndarray, k: np.ndarray, *, window: int = 32, window_score: float | None = None, **arguments
) -> np.ndarray:
    """Scores of all tokens, [Hk, T]: the window's tokens all get `window_score`, by default the largest score + 1.

    The default is taken over this sequence alone (kvpress takes it over the batch).
    """
    prefix = snapkv_prefix_scores(q, k, window=window, **arguments)
    fill = prefix.max(initial=0.0) + 1 if window_score is None else window_score
    return np.concatenate([prefix, np.full((len(prefix), k.shape[1] - prefix.shape[1]), fill)], axis=1)


def snapkv_kept(scores: np.ndarray, *, window: int, budget: int) -> np.ndarray:
    """The window and the best `budget - window` tokens before it.

    A budget smaller than the window keeps the newest tokens (kvpress: an arbitrary part of the window).

    Args:
      scores: [Hk, T], of which the last `window` are not read.

    Returns:
      [Hk, min(budget, T)], ascending.
    """
    kv_heads, length = scores.shape
    window = min(window, budget, length)
    best = top_k(scores[:, : length - window], budget - window)
    return np.concatenate([best, np.tile(np.arange(length - window, length), (kv_heads, 1))], axis=1)
