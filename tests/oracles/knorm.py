"""Knorm (arXiv 2406.11430): keys with a small L2 norm draw attention; keep those."""

import numpy as np

from tests.oracles.top_k import top_k


def knorm_scores(k: np.ndarray) -> np.ndarray:
    """Minus the L2 norm of every key: k [Hk, T, D] -> [Hk, T]. RoPE does not change it. Nothing is protected."""
    return -np.sqrt((np.asarray(k, np.float64) ** 2).sum(axis=-1))


def knorm_kept(k: np.ndarray, budget: int) -> np.ndarray:
    """[Hk, min(budget, T)], ascending."""
    return top_k(knorm_scores(k), budget)
