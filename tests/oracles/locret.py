"""Locret (arXiv 2410.01805, sections 3.1 to 3.3): trained heads score tokens as they come; chunks are evicted in turn.

A retaining head per layer (equation 2) reads a token's queries, keys and values of all heads, before rotation, side by
side, and gives one number per KV head: `act([q, k, v] W1) W2`, no biases. It is trained (equations 3 and 4) to give the
causal importance of the token: the largest scaled logit that it gets from any query of the answer and of the query
group. Loss: smooth L1, plus `smooth` times the squared difference between neighbouring tokens' scores, which the
authors' code sums over layers while the first term is their mean.

Prefill (algorithm 1): a prompt but for its last `local` tokens is fed in chunks. After each chunk every KV head keeps
the tokens with the highest scores; the newest `stabilizers` of them always stay, except after the last chunk. The last
`local` tokens are added at the end and stay.

Here, as everywhere in these oracles, a budget counts all slots, the `local` ones too; the authors' does not.
"""

import math
from collections.abc import Callable

import numpy as np

from tests.oracles.attention import softmax
from tests.oracles.top_k import top_k


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def retaining_scores(
    q_raw: np.ndarray,
    k_raw: np.ndarray,
    v: np.ndarray,
    w1: np.ndarray,
    w2: np.ndarray,
    act: Callable[[np.ndarray], np.ndarray] = silu,
) -> np.ndarray:
    """Scores [Hk, T] of tokens.

    Args:
      q_raw: [H, T, D], k_raw: [Hk, T, D], before rotation. v: [Hk, T, D].
      w1: [(H + 2 * Hk) * D, hidden]. w2: [hidden, Hk].
    """
    scores = []
    for t in range(k_raw.shape[1]):
        row = np.concatenate([np.asarray(x[:, t], np.float64).reshape(-1) for x in (q_raw, k_raw, v)])
        scores.append(act(row @ w1) @ w2)
    return np.stack(scores, axis=1)


def causal_importance(q_answer: np.ndarray, k: np.ndarray, scale: float | None = None) -> np.ndarray:
    """What a head is trained to give: [Hk, T].

    Args:
      q_answer: Queries of the answer [H, A, D]; k: keys of the prompt before it [Hk, T, D]; both rotated.
      scale: Of the logits; 1 / sqrt(D) by default.
    """
    kv_heads, length, dim = k.shape
    group = len(q_answer) // kv_heads
    scale = 1 / math.sqrt(dim) if scale is None else scale
    out = np.full((kv_heads, length), -np.inf)
    for h, q in enumerate(np.asarray(q_answer, np.float64)):
        for query in q:
            out[h // group] = np.maximum(out[h // group], scale * (k[h // group] @ query))
    return out


def retaining_loss(scores: np.ndarray, targets: np.ndarray, smooth: float = 0.0025) -> float:
    """Loss of all layers: scores, targets [L, Hk, T]."""
    layers, kv_heads, length = scores.shape
    fit, rough = 0.0, 0.0
    for layer in range(layers):
        for h in range(kv_heads):
            for t in range(length):
                error = abs(scores[layer, h, t] - targets[layer, h, t])
                fit += 0.5 * error**2 if error < 1 else error - 0.5
            rough += (np.diff(scores[layer, h]) ** 2).sum() / (kv_heads * (length - 1))
    return fit / (layers * kv_heads * length) + smooth * rough


def chunked_kept(
    scores: np.ndarray, *, budget: int, chunk: int = 3072, local: int = 100, stabilizers: int = 2500
) -> list[np.ndarray]:
    """What every KV head holds after each chunk, ascending positions [Hk, n]; the last entry has the local tokens too.

    Args:
      scores: [Hk, T], as the heads gave them when the tokens came.
      budget: Slots per head. All tokens are kept while they fit.
    """
    kv_heads, length = scores.shape
    end = max(length - local, 0)
    held, history = np.zeros((kv_heads, 0), int), []
    for start in range(0, end, chunk):
        stop = min(start + chunk, end)
        held = np.concatenate([held, np.tile(np.arange(start, stop), (kv_heads, 1))], axis=1)
        known = np.take_along_axis(np.asarray(scores, np.float64), held, axis=1)
        if start + chunk < end:
            known[:, max(held.shape[1] - stabilizers, 0) :] = np.inf
        held = np.take_along_axis(held, top_k(known, budget - local), axis=1)
        history.append(held)
    last = np.concatenate([held, np.tile(np.arange(end, length), (kv_heads, 1))], axis=1)
    return [*history, last]


def chunked_attention(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    scores: np.ndarray,
    *,
    budget: int,
    chunk: int = 3072,
    local: int = 100,
    stabilizers: int = 2500,
    scale: float | None = None,
) -> np.ndarray:
    """Attention outputs [H, T, D] of a prompt's tokens while it is fed: each sees what its KV head holds at that time.

    Args:
      q: [H, T, D], k, v: [Hk, T, D], rotated at the tokens' own positions. Others: as in `chunked_kept`.
    """
    heads, length, dim = q.shape
    kv_heads = len(k)
    scale = 1 / math.sqrt(dim) if scale is None else scale
    kept = chunked_kept(scores, budget=budget, chunk=chunk, local=local, stabilizers=stabilizers)
    end = max(length - local, 0)
    out = np.zeros((heads, length, dim))
    for t in range(length):
        piece = t // chunk if t < end else len(kept) - 1
        first = piece * chunk if t < end else end
        for h in range(heads):
            g = h // (heads // kv_heads)
            before = kept[piece - 1][g] if piece else np.zeros(0, int)
            seen = np.concatenate([before, np.arange(first, t + 1)])
            out[h, t] = softmax(scale * (k[g, seen] @ q[h, t])) @ v[g, seen]
    return out
