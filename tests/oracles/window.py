"""Recent window only: "window attention" of StreamingLLM, arXiv 2309.17453, figure 1b."""

import numpy as np


def window_kept(kv_heads: int, length: int, budget: int) -> np.ndarray:
    """The last `budget` of `length` tokens, the same for every head: [Hk, min(budget, length)]."""
    return np.tile(np.arange(max(0, length - budget), length), (kv_heads, 1))
