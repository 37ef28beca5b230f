"""Ada-KV: heads that look at many tokens keep more than heads that look at few. Feng et al., 2024,
https://arxiv.org/abs/2407.11550

The scores of all KV heads of a layer compete for the layer's slots; a head keeps as many of its best tokens as it wins,
and a safeguard gives every head a floor (algorithms 1 and 2). Heads of different lengths lie in pages, none padded to
the longest.

Differs from the authors' code: a layer spends exactly its budget, since what their rounding of each head loses or adds
(253 slots for 256) goes by largest remainder, a slot a head at most; the score is that of KV heads (their option
`gqa_support`), query heads joined by their mean (they also offer the maximum); Ada-Pyramid, `score="pyramidkv(...)"`,
follows kvpress' pyramid, whose budgets count the window, instead of their integer steps without it. Every row of a
batch has budgets of its own. `safeguard="reserve"` keeps the tokens of kvpress' AdaKVPress, which masks the others.
With `| kivi`, keys and values of a page are packed at once: a head keeps up to a page in full precision, not its newest
`residual` tokens.
"""

import dataclasses
from typing import Literal

from kvjax.policies import AcrossHeads, Budget, Evict, Phase, Policy, parse_policy, register
from kvjax.policies.score import WindowAttention


@register(
    "Ada-KV: Optimizing KV Cache Eviction by Adaptive Budget Allocation for Efficient LLM Inference",
    "https://arxiv.org/abs/2407.11550",
    budget=0.25,
    small={"score": "snapkv(window=4)"},
)
def adakv(
    budget: Budget | int | float | str,
    *,
    score: str = "snapkv(pool=7, kind='max')",
    floor: float = 0.2,
    safeguard: Literal["blend", "reserve"] = "blend",
    normalize: bool = False,
) -> Policy:
    """Shares each layer's slots among its KV heads by any other method's score.

    Args:
      budget: Slots per layer and head, on average over a layer's heads.
      score: The method that scores, with its parameters if need be: "knorm", "snapkv(window=16)".
      floor: Part of the budget that every head gets for certain.
      safeguard: "blend": `floor` of the mean, and the rest as won. "reserve": the best `floor` of each head's tokens
        first (kvpress).
      normalize: With "blend", heads compete with scores scaled by how concentrated they are.
    """
    inner = parse_policy(score, budget=Budget.of(budget))
    if len(inner.stages) != 1 or not isinstance(inner.stages[0], Evict) or inner.store is not None:
        raise ValueError(f"adakv wraps one method that evicts by a score; {score!r} is none.")
    stage = inner.stages[0]
    if normalize and not isinstance(stage.score, WindowAttention):
        raise ValueError(f"normalize compares sums of attention weights, and {score!r} scores by something else.")
    if isinstance(stage.score, WindowAttention):
        stage = dataclasses.replace(stage, score=dataclasses.replace(stage.score, joined=True))
    select = AcrossHeads(floor, safeguard, normalize)
    return Policy(stages=(dataclasses.replace(stage, select=select, phase=Phase()),))
