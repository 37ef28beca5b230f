"""Quest (arXiv 2406.10774, section 3, algorithm 1): a query reads the pages whose keys could match it best.

Tokens lie in pages of `page`, in order. A page knows the least and the largest value of every key channel; no key in it
can score more than the sum over channels of max(q * least, q * largest). Every query head reads the pages with the
highest bounds, and attends exactly to the tokens in them.

As in the authors' code: at least three pages are read; the current token is in its page like the others, and no page is
forced, so a query may leave itself out; bounds are taken without the scale; query heads of a group choose apart.
"""

import numpy as np

from tests.oracles.attention import softmax
from tests.oracles.top_k import top_k

LEAST_PAGES = 3


def page_bounds(k: np.ndarray, page: int) -> tuple[np.ndarray, np.ndarray]:
    """Least and largest value of every channel in every page: k [Hk, T, D] -> two of [Hk, ceil(T / page), D]."""
    starts = range(0, k.shape[1], page)
    least = np.stack([k[:, s : s + page].min(axis=1) for s in starts], axis=1)
    largest = np.stack([k[:, s : s + page].max(axis=1) for s in starts], axis=1)
    return least, largest


def page_scores(q: np.ndarray, k: np.ndarray, page: int) -> np.ndarray:
    """Upper bounds of q . k in every page, [H, pages], for one query q [H, D] over keys k [Hk, T, D]."""
    least, largest = page_bounds(np.asarray(k, np.float64), page)
    group = len(q) // len(k)
    scores = np.zeros((len(q), least.shape[1]))
    for h in range(len(q)):
        for p in range(least.shape[1]):
            scores[h, p] = np.maximum(q[h] * least[h // group, p], q[h] * largest[h // group, p]).sum()
    return scores


def quest_mask(q: np.ndarray, k: np.ndarray, *, tokens: int, page: int = 16) -> np.ndarray:
    """Which tokens a query reads, [H, T] bool: those of the best max(3, tokens // page) pages."""
    length = k.shape[1]
    best = top_k(page_scores(q, k, page), max(LEAST_PAGES, tokens // page))
    mask = np.zeros((len(q), length), bool)
    for h, pages in enumerate(best):
        for p in pages:
            mask[h, p * page : (p + 1) * page] = True
    return mask


def masked_attention(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, mask: np.ndarray, *, scale: float | None = None, softcap: float = 0.0
) -> np.ndarray:
    """Output [H, D] of one query q [H, D] over the tokens of k, v [Hk, T, D] that mask [H, T] leaves."""
    group, scale = len(q) // len(k), q.shape[-1] ** -0.5 if scale is None else scale
    out = np.zeros(q.shape)
    for h in range(len(q)):
        logits = scale * (np.asarray(k[h // group], np.float64) @ q[h])
        logits = softcap * np.tanh(logits / softcap) if softcap else logits
        out[h] = softmax(np.where(mask[h], logits, -np.inf)) @ np.asarray(v[h // group], np.float64)
    return out


def quest_decode(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, *, prompt: int, tokens: int, page: int = 16, **options
) -> np.ndarray:
    """Attention outputs [H, T - prompt, D] of tokens prompt..T-1, decoded one by one.

    Args:
      q: [H, T, D], k, v: [Hk, T, D], rotated.
      options: scale, softcap.
    """
    outputs = []
    for t in range(prompt, q.shape[1]):
        keys, values = k[:, : t + 1], v[:, : t + 1]
        mask = quest_mask(q[:, t], keys, tokens=tokens, page=page)
        outputs.append(masked_attention(q[:, t], keys, values, mask, **options))
    return np.stack(outputs, axis=1)
