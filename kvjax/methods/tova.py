"""TOVA: a transformer is a multi-state RNN; drop the state that matters least to the newest query. Oren et al., 2024,
https://arxiv.org/abs/2401.06104

Tokens are ranked by the attention of the newest query alone, averaged over heads, so that all heads of a layer keep the
same tokens; one leaves at every step (section 3.2).

Differs from the authors' code: the newest token always stays (as in kvpress); the query attends before a token leaves.
"""

from typing import Literal

from kvjax.policies import Budget, Evict, Phase, Policy, register
from kvjax.policies.score import LastAttention


@register("TOVA: Transformers are Multi-State RNNs", "https://arxiv.org/abs/2401.06104", budget=0.5)
def tova(budget: Budget | int | float | str, *, phase: Literal["prompt", "step"] = "step", every: int = 1) -> Policy:
    """Keeps the tokens that the newest query attends to; evicts at every step.

    Args:
      budget: Slots per layer and head.
      phase: "step" (paper) or "prompt" (kvpress).
      every: Steps between evictions.
    """
    evict = Evict(score=LastAttention(), budget=Budget.of(budget), recent=1, phase=Phase(phase, every))
    return Policy(stages=(evict,))
