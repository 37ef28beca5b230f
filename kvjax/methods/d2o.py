"""D2O: what is evicted may still be recalled. Wan et al., 2024, https://arxiv.org/abs/2406.13035

Layers that attend evenly get more slots than those that attend to few tokens (section 3.2). Inside a layer, H2O's
accumulated attention and recency choose what stays; an evicted token is merged into the most similar one that stays if
it is similar enough, measured against a running mean of such similarities, and dropped otherwise (section 3.3).

Differs from the authors' code: a prompt is compressed at its end (the code waits until its first new token has attended
to it: give it a prompt that is one token longer and both do the same); with grouped queries a KV head keeps one set of
tokens, by the sum of its query heads' scores (the code first repeats keys and values to all query heads); layers 0, 1
and the last share the budget with the others (the code leaves them whole, whatever the budget: more bytes than asked
for); a layer's share is rounded once, not its two halves, what rounding or a full layer leaves is dealt to others, and
the floor is what always stays, not 1 % of the tokens.

Differs from the paper, as the code does: what is merged is averaged with its cosine as weight, which shortens keys;
`weights="softmax"` is the paper's, with weights that add up to one. The heads of a layer decide together.
"""

from typing import Literal

from kvjax.policies import Budget, Evict, Phase, Policy, register
from kvjax.policies.merge import Recall
from kvjax.policies.preference import Evenness, Proportional
from kvjax.policies.score import AccumulatedAttention


@register(
    "D2O: Dynamic Discriminative Operations for Efficient Long-Context Inference of Large Language Models",
    "https://arxiv.org/abs/2406.13035",
    budget=0.2,
)
def d2o(
    budget: Budget | int | float | str,
    *,
    recent: int | float = 0.5,
    sinks: int = 4,
    alpha: float = 0.5,
    beta: float = 0.5,
    weights: Literal["cosine", "softmax"] = "cosine",
    phase: Literal["prompt", "step"] = "step",
) -> Policy:
    """Heavy hitters and recent tokens, into which similar evicted ones are merged; layers get what they need.

    Args:
      budget: Average slots per layer and head; a ratio is of the prompt and stays fixed while decoding.
      recent: Part of a layer's slots for the newest tokens: a share (paper: half), or a number of tokens.
      sinks: First tokens that always stay.
      alpha, beta: The threshold moves to alpha times itself plus beta times the newest similarity.
      weights: Of merging: "cosine" (code) or "softmax" (paper).
      phase: "step" or, for one-shot compression, "prompt".
    """
    if isinstance(recent, float) and not 0 <= recent < 1:
        raise ValueError(f"recent is a share below 1 or a number of tokens, got {recent}.")
    evict = Evict(
        score=AccumulatedAttention(),
        budget=Budget.of(budget),
        allocate=Proportional(Evenness()),
        rest=Recall(alpha, beta, weights),
        phase=Phase(phase),
        sinks=sinks,
        recent=recent,
    )
    return Policy(stages=(evict,))
