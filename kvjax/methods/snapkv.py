"""SnapKV: the end of the prompt knows what it will need. Li et al., 2024, https://arxiv.org/abs/2404.14469

The last `window` queries vote with their attention weights, votes are pooled over neighbouring tokens, and the top of
them stays beside the window itself (section 4.2, listing 1).

Differs from the authors' code: votes are averaged over a group of query heads, so that a KV head keeps one set of
tokens (the code stores every query head's own, and with it loses the saving of grouped queries); the mean instead of
the sum over the window (the same ranking). Like the code, pooling counts zeros beyond the ends, so the very first token
may go.
"""

from typing import Literal

from kvjax.policies import Budget, Evict, Policy, register
from kvjax.policies.score import WindowAttention


@register(
    "SnapKV: LLM Knows What You are Looking for Before Generation",
    "https://arxiv.org/abs/2404.14469",
    budget=0.25,
    small={"window": 4},
)
def snapkv(
    budget: Budget | int | float | str, *, window: int = 32, pool: int = 5, kind: Literal["avg", "max"] = "avg"
) -> Policy:
    """Keeps the tokens that the end of the prompt attends to, with their neighbours.

    Args:
      budget: Slots per layer and head, the window included.
      window: Queries at the end of the prompt that vote; their tokens always stay.
      pool: Width of the pooling over votes, odd, in tokens (authors' class: 5; their LongBench runs: 7, max).
      kind: "avg" or "max" pooling.
    """
    return Policy(stages=(Evict(score=WindowAttention(window, pool, kind), budget=Budget.of(budget), recent=window),))
