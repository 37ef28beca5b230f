"""KeyDiff (arXiv 2504.15364): keep the keys that differ most from the average key."""

import numpy as np

from tests.oracles.top_k import top_k


def _normalise(x: np.ndarray) -> np.ndarray:
    norm = np.sqrt((x**2).sum(axis=-1, keepdims=True))
    return x / np.where(norm > 0, norm, 1.0)


def keydiff_scores(k: np.ndarray, valid: np.ndarray | None = None) -> np.ndarray:
    """Minus the cosine between each key and the anchor, the mean of the L2-normalised keys. Nothing is protected.

    Args:
      k: [Hk, T, D], rotated.
      valid: [T] of bool; padding neither enters the anchor nor is kept (its score is -inf).

    Returns:
      [Hk, T].
    """
    valid = np.ones(k.shape[1], bool) if valid is None else np.asarray(valid)
    scores = np.full(k.shape[:2], -np.inf)
    for h in range(len(k)):
        directions = _normalise(np.asarray(k[h][valid], np.float64))
        anchor = _normalise(directions.mean(axis=0))
        scores[h, valid] = -directions @ anchor
    return scores


def keydiff_kept(k: np.ndarray, budget: int) -> np.ndarray:
    """[Hk, min(budget, T)], ascending."""
    return top_k(keydiff_scores(k), budget)
