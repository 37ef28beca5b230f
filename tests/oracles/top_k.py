"""Which tokens survive, given scores: the one tie rule of all oracles."""

import numpy as np


def top_k(scores: np.ndarray, budget: int) -> np.ndarray:
    """Positions of the `budget` highest scores of each row, ascending. Of equal scores the earlier token wins.

    Args:
      scores: [Hk, T].
      budget: Slots per head; all tokens are kept when it is at least T.

    Returns:
      [Hk, min(budget, T)].
    """
    budget = min(budget, scores.shape[-1])
    order = np.argsort(-np.asarray(scores, np.float64), axis=-1, kind="stable")
    return np.sort(order[:, :budget], axis=-1)
