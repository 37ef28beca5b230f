"""Random eviction: the floor of every table (kvpress' RandomPress draws uniform scores too)."""

import numpy as np

from tests.oracles.top_k import top_k


def random_kept(noise: np.ndarray, budget: int) -> np.ndarray:
    """Keeps the tokens with the largest noise. The draws come from the caller, who holds the random key.

    Args:
      noise: [Hk, T], independent and identically distributed.

    Returns:
      [Hk, budget], ascending.
    """
    return top_k(noise, budget)
