"""H2O: a few heavy hitters receive most of the attention. Zhang et al., 2023, https://arxiv.org/abs/2306.14048

A token's score is the attention that it has received from all queries so far, summed without normalization; half of
the budget goes to the highest scores, half to the newest tokens, and one token leaves at every decoding step
(algorithm 1).

Differs from the authors' code: the scores of a group of query heads are added, so that a KV head keeps one set of
tokens (the code cannot run grouped queries); keys keep their original rotation (as in the code's mask simulation; its
real-drop variant rotates by cache position); the simulation's off-by-one, which hides every token for one step as it
leaves the recent window, is not copied. As in the real-drop variant, a token is evicted after the new query has
attended, so a step sees budget + 1 tokens.
"""

from typing import Literal

from kvjax.policies import Budget, Evict, Phase, Policy, register
from kvjax.policies.score import AccumulatedAttention


@register("H2O: Heavy-Hitter Oracle for Efficient Generative Inference", "https://arxiv.org/abs/2306.14048", budget=0.5)
def h2o(
    budget: Budget | int | float | str,
    *,
    recent: int | float = 0.5,
    phase: Literal["prompt", "step"] = "step",
    every: int = 1,
    normalized: bool = False,
) -> Policy:
    """Keeps the tokens that have received most attention, and the newest; evicts at every step.

    Args:
      budget: Slots per layer and head; a ratio is of the prompt and stays fixed while decoding.
      recent: Part of the budget for the newest tokens: a share (paper: half), or a number of tokens.
      phase: "step" or, for one-shot compression, "prompt".
      every: Steps between evictions.
      normalized: Divide a token's sum by the number of queries that saw it, against the bias for early tokens. With
        `recent=0, phase="prompt"` this is kvpress' ObservedAttention.
    """
    if isinstance(recent, float) and not 0 <= recent < 1:
        raise ValueError(f"recent is a share below 1 or a number of tokens, got {recent}.")
    if normalized and phase == "step":
        raise ValueError('Normalized sums cannot be kept up while decoding; use phase="prompt".')
    score = AccumulatedAttention(normalized)
    evict = Evict(score=score, budget=Budget.of(budget), recent=recent, phase=Phase(phase, every), floor=2)
    return Policy(stages=(evict,))
