"""Random eviction: the floor of every table. A method that does not beat it at the same bytes has no score worth the
name.
"""

from kvjax.policies import Budget, Evict, Policy, register
from kvjax.policies.score import Chance


@register("Random eviction (baseline)", "https://github.com/NVIDIA/kvpress", budget=0.5)
def random(budget: Budget | int | float | str, *, seed: int = 0) -> Policy:
    """Keeps a random set of tokens, another one in every layer and head.

    Args:
      budget: Slots per layer and head.
      seed: Of the `jax.random` key that the choice is drawn from; the only randomness.
    """
    return Policy(stages=(Evict(score=Chance(seed), budget=Budget.of(budget)),))
