"""PyramidKV: attention funnels, so early layers need many tokens and late ones few. Cai et al., 2024,
https://arxiv.org/abs/2406.02069

SnapKV's scores, with budgets that fall in an arithmetic sequence from the first layer to the last (section 4.2).

Differs from kvpress: only the layers that are compressed share the budget (kvpress spreads it over all layers of a
  model, also
those with a sliding window), and roundings never add up to more than the budget. Like there, budgets are all equal
where the pyramid would leave a layer less than the window.
"""

from typing import Literal

from kvjax.policies import Budget, Evict, Policy, Pyramid, register
from kvjax.policies.score import WindowAttention


@register(
    "PyramidKV: Dynamic KV Cache Compression based on Pyramidal Information Funneling",
    "https://arxiv.org/abs/2406.02069",
    budget=0.25,
    small={"window": 4},
)
def pyramidkv(
    budget: Budget | int | float | str,
    *,
    window: int = 32,
    pool: int = 5,
    kind: Literal["avg", "max"] = "avg",
    beta: float = 20.0,
) -> Policy:
    """SnapKV with more slots in early layers and fewer in late ones.

    Args:
      budget: Average slots per layer and head, the window included.
      window, pool, kind: As in SnapKV.
      beta: Steepness, at least 1: the last layer gets the average divided by beta (paper: 20).
    """
    if beta < 1:
        raise ValueError(f"beta must be at least 1, got {beta}.")
    score = WindowAttention(window, pool, kind)
    return Policy(stages=(Evict(score=score, budget=Budget.of(budget), allocate=Pyramid(beta), recent=window),))
