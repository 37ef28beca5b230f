"""GEAR: quantize, then repair what that broke. Kang et al., 2024, https://arxiv.org/abs/2403.05527

Three parts that each mend another error (section 3): a backbone in few bits (KIVI's groups, keys per channel, values
per token); the largest and smallest entries of every channel or token, kept as they are; and a low-rank matrix of the
error that is left, which tokens share, by power iteration per head. What is decoded waits in a buffer in full precision
and is compressed block by block, each with factors of its own (algorithm 1).

As in the authors' CUDA model, the prompt's block is cut to a multiple of the buffer and the rest stays in full
precision. Differs from the authors' code: the outliers of a key channel are a share of its tokens, as in the paper (the
code takes as many as for a value, however many tokens there are), so blocks shorter than 2 / sparsity tokens have none;
codes use all 2^bits levels; the power iteration starts from the same numbers for every row and block; groups of values
end with the head. D + S is not rounded to float16 before its error is taken, but scales, zeros, outliers and factors
are stored in it, and codes are found for the scale as it is stored. A number just between two codes may go either way
(on the recorded inputs one in four thousand); what it changes spreads through the low-rank matrix, so that 99.6 % of
all numbers or more are within 1e-3 of the recorded ones, 98.3 % where factors are stored in float16.
"""

import dataclasses
from typing import Any

from kvjax.cache import GearRecipe, GearSlots, make_gear
from kvjax.kernels.packing import codes_per_word
from kvjax.policies import Built, Policy, Prompt, Store, register


@dataclasses.dataclass(frozen=True)
class Gear(Store):
    """Blocks of backbone, outliers and low-rank error. See `cache.gear.GearRecipe`."""

    recipe: GearRecipe = GearRecipe()

    def build(self, prompt: Prompt, about: Built) -> GearSlots:
        del about
        return make_gear(prompt.k, prompt.v, prompt.pos, self.recipe)

    def check(self, config: Any) -> None:
        recipe, dim = self.recipe, config.value_dim
        if dim % codes_per_word(recipe.bits) or (recipe.group and dim % min(recipe.group, dim)):
            raise ValueError(
                f"Values are packed in groups of {recipe.group} channels, {codes_per_word(recipe.bits)} codes a word; "
                f"this model's head_dim is {dim}. Choose a group that divides it."
            )
        if max(recipe.ranks) > dim:
            raise ValueError(f"A rank of {max(recipe.ranks)} is more than this model's head_dim of {dim}.")


@register(
    "GEAR: An Efficient KV Cache Compression GearRecipe for Near-Lossless Generative Inference",
    "https://arxiv.org/abs/2403.05527",
    bits=2,
    small={"group": 16, "buffer": 16, "sparsity": 0.15},
)
def gear(
    bits: int = 2,
    *,
    group: int = 64,
    sparsity: float = 0.02,
    ranks: tuple[int, int] = (4, 2),
    loops: int = 3,
    buffer: int = 64,
    scale_dtype: str = "float16",
    seed: int = 0,
) -> Policy:
    """Packs blocks of tokens to 2, 4 or 8 bits and adds a low-rank matrix and outliers that repair the error.

    Args:
      bits: Width of a code.
      group: Tokens (keys) or channels (values) that share a scale and a zero; 0 for whole channels and tokens (KCVT).
      sparsity: Share of entries kept as they are, half of them large, half small (paper: 0.02); 0 for GEAR-L.
      ranks: Of the error of the prompt's block, and of blocks that come later (paper: 4 and 2); (0, 0) for GEAR-S.
      loops: Of the power iteration.
      buffer: Tokens that wait in full precision until they become a block (authors' example: 64).
      scale_dtype: Of scales, zeros, outliers and factors.
      seed: Of the numbers that the power iteration starts from.
    """
    per = codes_per_word(bits)
    if buffer < 1 or buffer % per or (group and buffer % group):
        raise ValueError(
            f"buffer={buffer} must be a multiple of group={group} and of the {per} codes in a word: it becomes a "
            "block at once."
        )
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity is a share of entries, at least 0 and below 1, got {sparsity}.")
    if len(ranks) != 2 or min(ranks) < 0 or max(ranks) > buffer:
        raise ValueError(f"ranks are two numbers from 0 to the {buffer} tokens of a block, got {ranks}.")
    if loops < 1:
        raise ValueError(f"The power iteration needs at least one loop, got {loops}.")
    recipe = GearRecipe(
        bits=bits,
        group=group,
        sparsity=sparsity,
        ranks=(ranks[0], ranks[1]),
        loops=loops,
        buffer=buffer,
        dtype=scale_dtype,
        seed=seed,
    )
    return Policy(store=Gear(recipe))
