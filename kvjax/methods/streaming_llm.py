"""StreamingLLM: attention sinks and a recent window make a stream endless. Xiao et al., 2023,
https://arxiv.org/abs/2309.17453

The first tokens take up the attention that nothing else deserves; kept beside a rolling window, they keep a model
stable over millions of tokens. Positions are those inside the cache, not in the text (section 3.2).

Differs from the authors' code: keys are stored rotated, and instead of rotating all of them anew at every step, queries
are rotated a second time for the sinks alone. Rotations are relative, so the products are the same.
"""

from kvjax.policies import Budget, Policy, Ring, register


@register(
    "StreamingLLM: Efficient Streaming Language Models with Attention Sinks",
    "https://arxiv.org/abs/2309.17453",
    budget=0.5,
)
def streaming_llm(budget: Budget | int | float | str, *, sinks: int = 4, shifted: bool = True) -> Policy:
    """Keeps the first tokens and the newest, at every step.

    Args:
      budget: Slots per layer and head, sinks included.
      sinks: First tokens that stay (paper: 4).
      shifted: Positions inside the cache (the paper's); False keeps those of the text, as kvpress does.
    """
    if sinks < 0:
        raise ValueError(f"sinks must not be negative, got {sinks}.")
    return Policy(stages=(Ring(budget=Budget.of(budget), sinks=sinks, shifted=shifted and sinks > 0),))
