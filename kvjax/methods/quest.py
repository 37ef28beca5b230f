"""Quest: a query reads the pages whose keys could match it. Tang et al., 2024, https://arxiv.org/abs/2406.10774

Every page of `page` tokens knows the least and the largest value of each key channel, which bounds what any of its keys
can score. At every step each query head reads the pages with the highest bounds and no others (section 3, algorithm 1).
Nothing is forgotten: the cache is that of `full` and its bounds, and what shrinks is what a step reads. The first
layers read everything.

As in the authors' code: at least three pages are read; the current token's page competes like the others; bounds are
taken without the scale; query heads of a group choose apart. Differs from the authors' code: several new tokens at once
(a question on a cache) choose each for itself, as they would one by one, where the code reads everything; a budget of
all tokens reads them all, where the code leaves out a last page that is not full.
"""

import dataclasses
from typing import Any

from kvjax.cache.reading import LEAST_PAGES, make_bounded
from kvjax.policies import Budget, Built, Policy, Read, Slotwise, register


@dataclasses.dataclass(frozen=True, kw_only=True)
class TopPages(Read):
    """The pages with the highest bounds.

    Attributes:
      budget: Tokens that a query reads, or their share of those that are there.
      page: Tokens of a page.
      dense: First full-attention layers that read everything.
    """

    budget: Budget
    page: int = 16
    dense: int = 2

    def role(self, layer: int, layers: int) -> Any:
        return "all" if layer < self.dense else "pages"

    def wrap(self, layer: Any, about: Built) -> Any:
        if about.role.read == "all":
            return layer
        return make_bounded(layer, page=self.page, budget=self.budget, dtype=about.obs.q.dtype)

    def fits(self, policy: Any) -> None:
        if any(stage.phase.when != "prompt" for stage in policy.stages):
            raise ValueError(
                "pages know the bounds of their keys, and a policy that goes on evicting changes what is in them. "
                'Evict at the end of the prompt (phase="prompt").'
            )
        if not isinstance(policy.layout, Slotwise):
            raise ValueError("pages are cut from single tokens: store them with full, int8, int4, int2 or fp8.")

    def check(self, config: Any) -> None:
        layers = len(config.full_layers)
        if self.dense >= layers:
            raise ValueError(
                f"the first {self.dense} full-attention layers read everything, and this model has {layers}. Give a "
                "smaller dense."
            )


@register(
    "Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference",
    "https://arxiv.org/abs/2406.10774",
    budget=0.25,
    small={"page": 4, "dense": 0},
)
def quest(budget: Budget | int | float | str, *, page: int = 16, dense: int = 2) -> Policy:
    """Keeps everything; each query head reads the pages whose keys could match it best.

    Args:
      budget: Tokens that a query reads, or their share of what is there; whole pages, at least three.
      page: Tokens of a page (paper: 16).
      dense: First full-attention layers that read everything (paper: 2).
    """
    read = Budget.of(budget)
    if read.in_bytes:
        raise ValueError("the budget is what a query reads, in tokens or as a ratio; nothing is dropped to save bytes.")
    if page < 1 or dense < 0:
        raise ValueError(f"page is positive and dense not negative, got page={page} and dense={dense}.")
    if read.tokens is not None and read.tokens < LEAST_PAGES * page:
        raise ValueError(f"at least {LEAST_PAGES} pages are read, {LEAST_PAGES * page} tokens; got {read.tokens}.")
    return Policy(read=TopPages(budget=read, page=page, dense=dense))
