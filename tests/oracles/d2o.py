"""D2O (arXiv 2406.13035, sections 3.2 and 3.3): layers with even attention get more; evicted tokens may be merged.

Layer level: the attention that each key receives in the prompt, its variance over keys, scaled to 0..1 over the layer's
heads and averaged, is the layer's v. Budgets go to layers in proportion to softmax(-v).

Token level: H2O's accumulated attention chooses heavy hitters, beside the first tokens and the recent ones. Each
evicted token is compared (cosine of keys) with all that stay. Where its best similarity, averaged over the heads,
reaches a threshold, it is merged into the most similar one in each head; otherwise it is dropped. The threshold is the
mean of the best similarities at the first eviction, and their running mean afterwards. "Averaged over the heads" is by
rank: the heads evict different tokens, and the r-th evicted of one head shares its verdict with the r-th of the others.
"""

import math
from typing import Literal, NamedTuple

import numpy as np

from tests.oracles.attention import attention, attention_weights, group_sum
from tests.oracles.h2o import h2o_kept

Weights = Literal["cosine", "softmax"]


class Merged(NamedTuple):
    """What one eviction leaves.

    Attributes:
      k, v: [Hk, n, D], with what was merged into them.
      slots: [Hk, n], ascending: which of the slots before it stayed.
      similarity, nearest: [Hk, evicted], the best cosine of every evicted token and the index of that kept one.
      threshold: Of this eviction.
    """

    k: np.ndarray
    v: np.ndarray
    slots: np.ndarray
    similarity: np.ndarray
    nearest: np.ndarray
    threshold: float


class Step(NamedTuple):
    """A layer after an eviction: positions [Hk, n], its keys and values, accumulated scores [Hk, n], its `Merged`."""

    kept: np.ndarray
    k: np.ndarray
    v: np.ndarray
    scores: np.ndarray
    merged: Merged | None
    output: np.ndarray | None  # [H, D] of the token that came, None for the prompt


def d2o_variation(q: np.ndarray, k: np.ndarray, **options) -> float:
    """v of a layer: 0 where all heads spread their attention alike, larger where most do it unevenly.

    Args:
      q: [H, T, D], k: [Hk, T, D], rotated. The heads are the query heads; with one head v is 0.
    """
    columns = attention_weights(q, k, **options).sum(axis=1)  # [H, T]
    variance = columns.var(axis=1, ddof=1)
    low, high = variance.min(), variance.max()
    return float(((variance - low) / (high - low + 1e-6)).mean())


def d2o_ratios(variations: list[float], ratio: float) -> list[float]:
    """Share of its tokens that every layer keeps: softmax(-v) * layers * ratio, within 0.01 and 1."""
    weights = [math.exp(-v) for v in variations]
    return [min(max(weight / sum(weights) * len(weights) * ratio, 0.01), 1.0) for weight in weights]


def nearest(evicted: np.ndarray, kept: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Best cosine of each of [m, D] with [n, D], and whose it is (the first of equal ones)."""
    unit = evicted / np.linalg.norm(evicted, axis=-1, keepdims=True)
    cosine = unit @ (kept / np.linalg.norm(kept, axis=-1, keepdims=True)).T
    return cosine.max(axis=1), cosine.argmax(axis=1)


def merge(
    k: np.ndarray,
    v: np.ndarray,
    slots: np.ndarray,
    threshold: float | None,
    *,
    alpha: float = 0.5,
    beta: float = 0.5,
    weights: Weights = "cosine",
) -> Merged:
    """Evicts all but `slots` and merges what is similar enough.

    Args:
      k, v: [Hk, S, D]. slots: [Hk, n] ascending.
      threshold: Of the eviction before, None at the first.
      weights: "cosine" (code): the kept token and cosine times each merged one, divided by their number. "softmax"
        (paper): weights e^cosine of the merged and e of the kept, divided by their sum. Values as the keys.
    """
    heads, length, _ = k.shape
    gone = np.stack([np.setdiff1d(np.arange(length), slots[h]) for h in range(heads)])
    best = [nearest(k[h, gone[h]], k[h, slots[h]]) for h in range(heads)]
    similarity, target = np.stack([b[0] for b in best]), np.stack([b[1] for b in best])
    mean = float(similarity.mean())
    threshold = mean if threshold is None else alpha * threshold + beta * mean
    recalled = np.flatnonzero(similarity.mean(axis=0) >= threshold)
    result = []
    for x in (k, v):
        out = np.stack([x[h, slots[h]] for h in range(heads)])
        for h in range(heads):
            for j in range(slots.shape[1]):
                into = [r for r in recalled if target[h, r] == j]
                if weights == "cosine":
                    total = out[h, j] + sum(similarity[h, r] * x[h, gone[h, r]] for r in into)
                    out[h, j] = total / (1 + len(into))
                else:
                    total = math.e * out[h, j] + sum(math.exp(similarity[h, r]) * x[h, gone[h, r]] for r in into)
                    out[h, j] = total / (math.e + sum(math.exp(similarity[h, r]) for r in into))
        result.append(out)
    return Merged(result[0], result[1], slots, similarity, target, threshold)


def d2o_kept(scores: np.ndarray, *, heavy: int, recent: int, sinks: int = 4) -> np.ndarray:
    """Slots of the recent tokens and of the `heavy` best earlier ones, the first `sinks` among them: [Hk, n]."""
    scores = scores.copy()
    scores[:, :sinks] = np.inf
    return h2o_kept(scores, heavy=heavy, recent=recent)


def d2o_decode(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    *,
    prompt: int,
    heavy: int,
    recent: int,
    sinks: int = 4,
    alpha: float = 0.5,
    beta: float = 0.5,
    weights: Weights = "cosine",
    **options,
) -> list[Step]:
    """A prompt, compressed at its end, then one token at a time: it attends, then one token is evicted or merged.

    The authors compress a prompt only when its first new token has attended to it: that is this with `prompt` one more.
    With grouped queries they first repeat keys and values to all query heads (Hk = H here); otherwise scores are summed
    over the group.

    Args:
      q: [H, T, D], k, v: [Hk, T, D]; the first `prompt` tokens are the prompt.
      heavy: Slots for heavy hitters, sinks included.

    Returns:
      After the prompt and after each decoded token.
    """
    kv_heads = len(k)
    scores = group_sum(attention_weights(q[:, :prompt], k[:, :prompt], **options).sum(axis=1), kv_heads)
    kept = np.tile(np.arange(prompt), (kv_heads, 1))
    keys, values = k[:, :prompt].astype(np.float64), v[:, :prompt].astype(np.float64)
    threshold, output, steps = None, None, []
    for t in range(prompt, q.shape[1] + 1):
        done = None
        if kept.shape[1] > heavy + recent:
            slots = d2o_kept(scores, heavy=heavy, recent=recent, sinks=sinks)
            done = merge(keys, values, slots, threshold, alpha=alpha, beta=beta, weights=weights)
            keys, values, threshold = done.k, done.v, done.threshold
            kept, scores = np.take_along_axis(kept, slots, axis=1), np.take_along_axis(scores, slots, axis=1)
        steps.append(Step(kept, keys, values, scores, done, output))
        if t == q.shape[1]:
            break
        query = q[:, t : t + 1]
        kept = np.concatenate([kept, np.full((kv_heads, 1), t)], axis=1)
        keys, values = (np.concatenate([x, y[:, t : t + 1]], axis=1) for x, y in ((keys, k), (values, v)))
        output = attention(query, keys, values, **options)[:, 0]
        seen = group_sum(attention_weights(query, keys, **options)[:, 0], kv_heads)
        scores = np.concatenate([scores, np.zeros((kv_heads, 1))], axis=1) + seen
    return steps
