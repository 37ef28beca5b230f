"""CAKE: layers slice one cache like a cake, each after its own appetite. Qin et al., 2025,
https://arxiv.org/abs/2503.12491

A layer asks for more the more widely its last queries spread their attention, and the more it moves about (section
4.1). While the prompt is read, the layers seen so far share the whole budget, so that an early layer is cut again and
again and all together never hold much more than the budget (section 4.2, algorithm 1). Tokens are chosen by the mean
and the variance of the attention that they get (section 4.3).

Differs from the authors' code: every row of a batch has its own preferences (the code adds entropy and variance over
the batch); budgets meet the total, also where one round of dealing out what a layer cannot hold would overfill
another; a prompt between `budget` and `budget + window` tokens is compressed too (the code waits for the first decoding
step). The code evicts while decoding as well, by the newest query: `phase="step"` (it lets a cache grow while the
prompt is short, as here). There it averages over neighbours in the order of its cache, which lies by rank, not by
position; `neighbours="text"` averages over what stands side by side. tau1 and tau2 were tuned per model and budget (0.4
to 2.3; Llama 3.1 8B at 1,024 tokens: 1.6 and 0.4); 1 and 1 is what the code falls back to.
"""

from typing import Literal

from kvjax.policies import Budget, Evict, Phase, Policy, register
from kvjax.policies.preference import DispersionAndShift, Proportional
from kvjax.policies.score import SteadyAttention


@register(
    "CAKE: Cascading and Adaptive KV Cache Eviction with Layer Preferences",
    "https://arxiv.org/abs/2503.12491",
    budget=0.25,
    small={"window": 4},
)
def cake(
    budget: Budget | int | float | str,
    *,
    window: int = 32,
    gamma: float = 200.0,
    pool: int = 5,
    tau1: float = 1.0,
    tau2: float = 1.0,
    cascades: bool = True,
    phase: Literal["prompt", "step"] = "prompt",
    neighbours: Literal["rank", "text"] = "rank",
) -> Policy:
    """Budgets of layers from how their attention spreads and shifts, decided while the prompt is read.

    Args:
      budget: Average slots per layer and head, the window included.
      window: Queries at the end of the prompt that are looked at, at least 2; their tokens always stay.
      gamma: Weight of the variance of a token's attention beside its mean.
      pool: Width of the average over neighbouring tokens, odd.
      tau1, tau2: Temperatures of a layer's entropy and variance: smaller makes layers more unequal.
      cascades: Cut layers while others are still to come. The result is the same but for roundings; memory is not.
      phase: "prompt", or "step" to hold the budget while decoding too.
      neighbours: With `phase="step"`: what "rank" (authors' code) and "text" mean is said above.
    """
    evict = Evict(
        score=SteadyAttention(window, gamma, pool, neighbours),
        budget=Budget.of(budget),
        allocate=Proportional(DispersionAndShift(window, tau1, tau2), cascades=cascades, apart=True),
        phase=Phase(phase),
        recent=window,
    )
    return Policy(stages=(evict,))
