"""PyramidKV (arXiv 2406.02069): budgets fall linearly from the first layer to the last; SnapKV inside.

The rule is kvpress' (`PyramidKVPress.get_layer_budget`), which starts from the mean number of tokens per layer and
counts the window inside a layer's budget. The paper's own sizes exclude the window.
"""

import numpy as np

from tests.oracles.snapkv import snapkv_kept, snapkv_scores


def pyramidkv_budgets(layers: int, length: int, tokens: float, *, window: int = 64, beta: float = 20.0) -> list[int]:
    """Slots of every compressible layer.

    With m tokens per layer on average, the last layer gets m / beta and the first 2m - m / beta. If the first would
    exceed length - window it gets just that, and the last 2m minus that. Unless length >= first >= last >= window the
    budget is flat. Rounding is Python's (half to even), each layer by itself, so the sum can differ from layers *
    tokens by a few.

    Args:
      layers: Layers that are compressed (not the model's depth: sliding-window layers do not count).
      length: Cached tokens.
      tokens: Mean slots per layer, length * (1 - ratio); not necessarily whole.
      window: SnapKV's window, at least as many slots in every layer of a pyramid.
      beta: Steepness, >= 1.
    """
    last = tokens / beta
    first = 2 * tokens - last
    if first >= length - window:
        first = length - window
        last = 2 * tokens - first
    if layers == 1 or not length >= first >= last >= window:
        return [round(tokens)] * layers
    return [round(first - layer * (first - last) / (layers - 1)) for layer in range(layers)]


def pyramidkv_kept(
    q: np.ndarray, k: np.ndarray, layer: int, budgets: list[int], *, window: int = 64, **arguments
) -> np.ndarray:
    """Positions [Hk, budgets[layer]] kept in one layer: SnapKV's scores (see `snapkv_scores`), that layer's budget."""
    return snapkv_kept(snapkv_scores(q, k, window=window, **arguments), window=window, budget=budgets[layer])
