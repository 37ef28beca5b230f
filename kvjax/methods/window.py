"""Window attention: only the newest tokens stay (Beltagy et al., 2020, Longformer, https://arxiv.org/abs/2004.05150).

Fails as soon as the first tokens leave, because attention uses them as a sink (StreamingLLM, figure 1).
"""

from kvjax.policies import Budget, Policy, Ring, register


@register("Longformer: window attention", "https://arxiv.org/abs/2004.05150", budget=0.5)
def window(budget: Budget | int | float | str) -> Policy:
    """Keeps the newest tokens, at every step.

    Args:
      budget: Slots per layer and head.
    """
    return Policy(stages=(Ring(budget=Budget.of(budget)),))
