"""TidalDecode: a few layers look at everything, the others where these have looked. Yang et al., 2024,
https://arxiv.org/abs/2410.05076

The tokens that matter to a query barely change from layer to layer. While decoding, the layers before `start` attend in
full; layer `start` attends in full and hands on the tokens with the largest logits; the layers after it read these
alone, until the correction layer attends in full and chooses anew (section 3, algorithm 1). Nothing is forgotten: the
cache is that of `full`, and what shrinks is what a step reads.

As in the authors' code: every query head chooses for itself and is followed by the heads of its number; the current
token competes like the others; several new tokens at once choose each for itself. Differs from the authors' code: the
correction layer is by default where the paper has it for Llama 3, 13 of 32, in proportion to the model (their function
has 9). Layers are numbered among those with full attention.
"""

import dataclasses
import math
from typing import Any

from kvjax.cache.reading import Choosing, Following
from kvjax.policies import Budget, Built, Policy, Read, Slotwise, register


@dataclasses.dataclass(frozen=True, kw_only=True)
class Followed(Read):
    """Some layers choose, the layers after them read what was chosen.

    Attributes:
      budget: Tokens that are chosen, or their share of those that are there.
      start: The first layer that chooses; those before it read everything.
      correction: The layer that chooses anew: its number, or a share of all layers, rounded up; None for none.
    """

    budget: Budget
    start: int = 2
    correction: int | float | None = 0.4

    def role(self, layer: int, layers: int) -> Any:
        """(What the layer does, whether it is the last)."""
        if layer < self.start:
            return "all", False
        anew = math.ceil(self.correction * layers) if isinstance(self.correction, float) else self.correction
        return "choose" if layer in (self.start, anew) else "follow", layer == layers - 1

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
        if isinstance(self.correction, int) and self.correction >= layers:
            raise ValueError(
                f"there is no full-attention layer {self.correction} to choose anew: this model has {layers}, the "
                "first of which is 0. Give a smaller correction, a share such as 0.4, or None."
            )
        if all(self.role(layer, layers)[0] != "follow" for layer in range(layers)):
            raise ValueError(
                f"no layer is left to follow: of {layers} full-attention layers, {self.start} read everything before "
                "one chooses for those after it. Give a smaller start."
            )


@register(
    "TidalDecode: Fast and Accurate LLM Decoding with Position Persistent Sparse Attention",
    "https://arxiv.org/abs/2410.05076",
    budget=0.25,
    small={"start": 0, "correction": None},
)
def tidaldecode(budget: Budget | int | float | str, *, start: int = 2, correction: int | float | None = 0.4) -> Policy:
    """Keeps everything; most layers read only the tokens that a layer before them has found.

    Args:
      budget: Tokens that are read, or their share of what is there (authors' example: 256).
      start: The full-attention layer that chooses first; those before it read everything.
      correction: The one that chooses anew, as a number (authors' function: 9; paper's Llama 3: 13) or as a share of
        the layers, rounded up; None for none.
    """
    read = Budget.of(budget)
    if read.in_bytes:
        raise ValueError("the budget is what a query reads, in tokens or as a ratio; nothing is dropped to save bytes.")
    if start < 0:
        raise ValueError(f"start is the number of a layer, got {start}.")
    if isinstance(correction, float) and not 0 < correction < 1:
        raise ValueError(f"As a share of the layers, correction is between 0 and 1; got {correction}.")
    if isinstance(correction, int) and correction <= start:
        raise ValueError(f"correction comes after start={start}, or is None; got {correction}.")
    return Policy(read=Followed(budget=read, start=start, correction=correction))
