"""Ada-KV (Feng et al., arXiv 2407.11550, algorithms 1 and 2): the budget of a layer is shared among its heads by score.

The heads' scores compete in one contest for all of the layer's slots; how many a head wins is its adaptive share. A
safeguard keeps heads with even attention from starving, in one of two ways:

* "blend", the authors' code and algorithm 2: a head gets `(1 - floor) * won + floor * base`, rounded. The code rounds
  each head by itself (half to even), so that the total may miss the budget by half a slot a head. `exact` gives out
  whole slots by largest remainder instead.
* "reserve", kvpress: the best `int(floor * budget)` tokens of each head are taken first, the contest is for the rest.

Scores are those of any method; Ada-SnapKV takes SnapKV's of the tokens before a window that always stays.
"""

import numpy as np

from tests.oracles.attention import attention_weights, group_mean
from tests.oracles.snapkv import pool
from tests.oracles.top_k import top_k


def ada_snapkv_scores(
    q: np.ndarray,
    k: np.ndarray,
    *,
    window: int = 32,
    width: int = 7,
    kind: str = "max",
    group: str = "mean",
) -> np.ndarray:
    """Attention of the window's queries, averaged; joined over the query group; then pooled along the prefix.

    Args:
      q: [H, T, D], k: [Hk, T, D], rotated.
      group: "mean" or "max" over the query heads of a KV head.

    Returns:
      [Hk, T - window].
    """
    votes = attention_weights(q[:, -window:], k)[:, :, : k.shape[1] - window].mean(axis=1)
    if group == "mean":
        joined = group_mean(votes, len(k))
    else:
        joined = np.stack([x.max(axis=0) for x in np.split(votes, len(k))])
    return pool(joined, width, "avg" if kind == "avg" else "max")


def contest(scores: np.ndarray, slots: int) -> np.ndarray:
    """How many of the `slots` best scores of all heads [Hk, n] belong to each head: [Hk]. Ties: lower head first."""
    winners = top_k(scores.reshape(1, -1), slots)[0]
    return np.bincount(winners // scores.shape[1], minlength=len(scores))


def blended_counts(
    scores: np.ndarray, base: int, floor: float, *, normalize: bool = False, exact: bool = False
) -> np.ndarray:
    """Tokens of each head [Hk] by the authors' safeguard.

    Args:
      scores: [Hk, n] of the tokens that compete (not of the window).
      base: Average tokens per head.
      floor: Part of the base that every head gets (`floor_alpha`).
      normalize: In the contest, scale each head's scores by the share of its total that its best `base` hold.
      exact: The total is `Hk * base`; otherwise each head is rounded by itself.
    """
    ranked = -np.sort(-np.asarray(scores, np.float64), axis=1)
    if normalize:
        ranked = ranked * ranked[:, :base].sum(1, keepdims=True) / ranked.sum(1, keepdims=True)
    won = contest(ranked, len(scores) * base)
    if not exact:
        return np.rint(won * (1 - floor) + int(base * floor)).astype(int)
    share = won * (1 - floor) + base * floor
    counts = np.floor(share + 1e-6).astype(int)  # The float error of 0.8 * 30 + 0.2 * 30 must not cost a slot.
    by_remainder = np.argsort(-np.round(share - counts, 3), kind="stable")  # Of equal ones the lower head is first.
    counts[by_remainder[: len(scores) * base - counts.sum()]] += 1
    return counts


def ada_snapkv_kept(scores: np.ndarray, counts: np.ndarray, window: int) -> list[np.ndarray]:
    """For each head its best `counts[h]` tokens and the window after them, ascending. scores [Hk, T - window]."""
    length = scores.shape[1] + window
    return [
        np.concatenate([top_k(scores[h : h + 1], counts[h])[0], np.arange(length - window, length)])
        for h in range(len(scores))
    ]


def reserved_keep(scores: np.ndarray, budget: int, floor: float) -> np.ndarray:
    """kvpress' safeguard: which tokens [Hk, T] bool stay, `Hk * budget` in all.

    Args:
      scores: [Hk, T] of all tokens.
      budget: Average tokens per head.
      floor: Part of the budget that every head's best tokens get before the contest.
    """
    scores = np.array(scores, np.float64)
    for h, safe in enumerate(top_k(scores, int(budget * floor))):
        scores[h, safe] = np.inf
    keep = np.zeros(scores.size, bool)
    keep[top_k(scores.reshape(1, -1), len(scores) * budget)[0]] = True
    return keep.reshape(scores.shape)


def pyramid_base(base: int, layer: int, layers: int, prefix: int, beta: int = 20) -> int:
    """The authors' pyramid (`pyram_mode`): the base of one layer, the window not counted, integers throughout."""
    least = base // beta
    most = 2 * base - least
    if most >= prefix:
        most = prefix
        least = 2 * base - most
    return most - layer * ((most - least) // (layers - 1))
