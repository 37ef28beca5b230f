"""TidalDecode: a few layers look at everything, the others where these have looked. Yang et al., 2024,
https://arxiv.org/abs/2410.05076

The tokens that matter to a query barely change from layer to layer. While decoding, the layers before `start` attend in
full; layer `start` attends in full and hands on the tokens with the largest logits; the layers after it read these
alone, until the correction layer attends in full and chooses anew (section 3, algorithm 1). Nothing is forgotten: the
cache is that of `full`, and what shrinks is what a step reads.

As in the authors' code: every query head chooses for itself and is followed by the heads of its number; the current
token competes like the others; several new tokens at once choose each for itself. Layers are numbered among those with
full attention.
"""

import dataclasses
from typing import Any

from kvjax.cache.reading import Choosing, Following
from kvjax.policies import Budget, Built, Policy, Read, Slotwise, register


@dataclasses.dataclass(frozen=True, kw_only=True)
class Followed(Read):
    """Some layers choose, the layers after them read what was chosen.

    Attributes:
      budget: Tokens that are chosen, or their share of those that are there.
      start: The first layer that chooses; those before it read everything.
      correction: The layer that chooses anew; None for none.
    """

    budget: Budget
    start: int = 2
    correction: int | None = 9

    def role(self, layer: int, layers: int) -> Any:
        """(What the layer does, whether it is the last)."""
        if layer < self.start:
            return "all", False
        return "choose" if layer in (self.start, self.correction) else "follow", layer == layers - 1

    def wrap(self, layer: Any, about: Built) -> Any:
        does, last = about.role.read
        if does == "all":
            return layer
        return (
            Choosing(inner=layer, budget=self.budget, last=last)
            if does == "choose"
            else Following(inner=layer, last=last)
        )

    def fits(self, policy: Any) -> None:
        if policy.stages:
            raise ValueError(
                "layers read the slots that another layer has chosen, so all must hold the same tokens; a policy that "
                "evicts keeps others in every layer. Use it alone, or read with quest."
            )
        if not isinstance(policy.layout, Slotwise):
            raise ValueError("single tokens are chosen: store them with full, int8, int4, int2 or fp8.")

    def check(self, config: Any) -> None:
        layers = len(config.full_layers)
        if self.start + 1 >= layers:
            raise ValueError(
                f"full-attention layer {self.start} chooses for those after it, and this model has {layers} of them. "
                "Give a smaller start."
            )


@register(
    "TidalDecode: Fast and Accurate LLM Decoding with Position Persistent Sparse Attention",
    "https://arxiv.org/abs/2410.05076",
    budget=0.25,
)
def tidaldecode(budget: Budget | int | float | str, *, start: int = 2, correction: int | None = 9) -> Policy:
    """Keeps everything; most layers read only the tokens that a layer before them has found.

    Args:
      budget: Tokens that are read, or their share of what is there (authors' example: 256).
      start: The full-attention layer that chooses first; those before it read everything.
      correction: The one that chooses anew (authors' function: 9; their Llama 3: 13); None, or a number beyond the
        model's layers, for none.
    """
    read = Budget.of(budget)
    if read.bytes is not None:
        raise ValueError("the budget is what a query reads, in tokens or as a ratio; nothing is dropped to save bytes.")
    if start < 0 or (correction is not None and correction <= start):
        raise ValueError(
            f"start is not negative and correction comes after it (or is None), got start={start} and "
            f"correction={correction}."
        )
    return Policy(read=Followed(budget=read, start=start, correction=correction))
