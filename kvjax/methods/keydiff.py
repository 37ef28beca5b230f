"""KeyDiff: keys unlike the rest carry the attention. Park et al., 2025, https://arxiv.org/abs/2504.15364

The score is minus the cosine similarity between a key and the mean of all (normalized) keys. Needs no queries at all.

Differs from the paper: one shot over the whole prompt instead of block by block (as in kvpress).
"""

from kvjax.policies import Budget, Evict, Policy, register
from kvjax.policies.score import KeyDifference


@register("KeyDiff: Key Similarity-Based KV Cache Eviction", "https://arxiv.org/abs/2504.15364", budget=0.5)
def keydiff(budget: Budget | int | float | str) -> Policy:
    """Keeps the tokens whose keys differ most from the average key.

    Args:
      budget: Slots per layer and head.
    """
    return Policy(stages=(Evict(score=KeyDifference(), budget=Budget.of(budget)),))
