"""Expected Attention: what would queries to come attend to? Devoto et al., 2025, https://arxiv.org/abs/2510.00636
(kvpress)

Queries before rotation are taken as Gaussian, with the prompt's mean and covariance, and rotated to the average of the
next positions; a key's expected attention then has a closed form. It is multiplied by the norm of the value.

As in kvpress, the covariance divides by N, the first queries are left out of the statistics, and their tokens always
stay.
"""

from kvjax.policies import Budget, Evict, Policy, register
from kvjax.policies.score import ExpectedAttention


@register(
    "Expected Attention: KV Cache Compression by Estimating Attention from Future Queries Distribution",
    "https://arxiv.org/abs/2510.00636",
    budget=0.5,
    small={"future": 8},
)
def expected_attention(
    budget: Budget | int | float | str,
    *,
    future: int = 512,
    sinks: int = 4,
    covariance: bool = True,
    value_norm: bool = True,
    epsilon: float = 0.0,
) -> Policy:
    """Keeps the tokens that future queries are expected to attend to.

    Args:
      budget: Slots per layer and head.
      future: Positions ahead over which the rotation is averaged, in tokens.
      sinks: First tokens, which always stay and are left out of the statistics.
      covariance, value_norm, epsilon: Terms of the score, see `policies.score.ExpectedAttention`.
    """
    score = ExpectedAttention(future, sinks, covariance, value_norm, epsilon)
    return Policy(stages=(Evict(score=score, budget=Budget.of(budget), sinks=sinks),))
