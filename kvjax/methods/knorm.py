"""Knorm: keys of small norm attract attention. Devoto et al., 2024, https://arxiv.org/abs/2406.11430

The score is minus the L2 norm of the key. Nothing else is protected, as in the paper and in kvpress.
"""

from typing import Literal

from kvjax.policies import Budget, Evict, Phase, Policy, register
from kvjax.policies.score import KeyNorm


@register(
    "Knorm: A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression",
    "https://arxiv.org/abs/2406.11430",
    budget=0.5,
)
def knorm(budget: Budget | int | float | str, *, phase: Literal["prompt", "step"] = "prompt", every: int = 1) -> Policy:
    """Keeps the tokens with the smallest keys.

    Args:
      budget: Slots per layer and head.
      phase: "prompt" or "step". every: Steps between evictions of the latter.
    """
    return Policy(stages=(Evict(score=KeyNorm(), budget=Budget.of(budget), phase=Phase(phase, every)),))
