"""A policy is a value: stages that choose tokens, a store that lays them out, a way to read them. `a | b` composes.

The rules of composition are checked when a policy is built, so that a policy that exists makes sense.
"""

import dataclasses
from typing import Any

from jax import Array

from kvjax.cache import LayerSpec, Tokens, attend
from kvjax.policies.budget import Budget
from kvjax.policies.observe import Needs, Observation, Prompt
from kvjax.policies.stage import Stage
from kvjax.policies.store import Slotwise, Store


@dataclasses.dataclass(frozen=True)
class ReadAll:
    """Every query looks at everything that is stored."""


class PolicyError(ValueError):
    """A policy that makes no sense, or that a model or a prompt cannot serve; says why, and what would do."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Policy:
    """What becomes of a prompt's keys and values. Hashable; equal policies compile once.

    Attributes:
      stages: Choose tokens, one after another, each from what the one before has left. Empty: all tokens stay.
      store: Layout in bytes; None is full precision.
      read: What a query looks at.
      label: How it was written, for tables.
    """

    stages: tuple[Stage, ...] = ()
    store: Store | None = None
    read: ReadAll = ReadAll()
    label: str = dataclasses.field(default="full", compare=False)

    def __post_init__(self):
        for stage in self.stages[:-1]:
            if stage.phase.when == "step":
                raise PolicyError(
                    f"In {self.label!r} a policy that goes on acting while decoding is followed by another that "
                    "evicts. It must come last."
                )
        last = self.stages[-1] if self.stages else None
        if any(stage.by_position for stage in self.stages[1:]):
            raise PolicyError(
                f"In {self.label!r} a policy that goes by the order of tokens (a ring of recent ones, or chunks of "
                "neighbours) follows an eviction that leaves gaps. Put it first, or use one of the two."
            )
        if last is not None and last.phase.when == "step" and not self.layout.slotwise:
            raise PolicyError(
                f"{self.label!r}: the store packs groups of tokens, and a policy that evicts while decoding overwrites "
                'single ones. Evict at the end of the prompt (phase="prompt") or store single tokens (int8, int4, fp8).'
            )
        for before, after in zip(self.stages, self.stages[1:], strict=False):
            if _never_less(before.budget, after.budget):
                raise PolicyError(
                    f"In {self.label!r} the second budget ({after.budget}) is not below the first ({before.budget}), "
                    "so the second policy would never act. Give the later one less."
                )
        if any(stage.budget.bytes is not None for stage in self.stages[:-1]):
            raise PolicyError(f"{self.label!r}: bytes can only bound the last policy that evicts.")

    def __or__(self, other: "Policy") -> "Policy":
        """First this, then the other on what is left.

        Raises:
          PolicyError: The composition makes no sense; the message says why.
        """
        if not isinstance(other, Policy):
            return NotImplemented
        label = f"{self.label} | {other.label}"
        if self.store is not None and other.store is not None:
            raise PolicyError(f"{label!r}: both lay tokens out in bytes; a token is stored once. Use one of the two.")
        if self.store is not None and other.stages:
            raise PolicyError(f"{label!r}: evict first, then store: write {other.label} | {self.label}.")
        if not self.stages and self.store is None:
            return other
        if not other.stages and other.store is None:
            return self
        return Policy(stages=self.stages + other.stages, store=self.store or other.store, label=label)

    def __str__(self) -> str:
        return self.label

    @property
    def layout(self) -> Store:
        return self.store or Slotwise()

    @property
    def needs(self) -> Needs:
        """Statistics that the stages ask for."""
        needs = Needs()
        for stage in self.stages:
            needs = needs | stage.needs
        return needs

    @property
    def endless(self) -> bool:
        """Whether positions are those inside the cache, so that a stream may outgrow the model's context."""
        return bool(self.stages) and self.stages[-1].endless

    @property
    def acts_every_step(self) -> bool:
        """Whether tokens must be added one at a time, because each may evict another."""
        return bool(self.stages) and self.stages[-1].update is not None

    @property
    def after_prompt(self) -> "Policy":
        """What is left to do once the prompt is compressed. Policies that differ only in how they do that have the
        same, so a cache that carries it shares compiled decoding with theirs."""
        return Policy(stages=self.stages[-1:] if self.acts_every_step else (), read=self.read)


def _never_less(before: Budget, after: Budget) -> bool:
    pairs = ((before.ratio, after.ratio), (before.tokens, after.tokens))
    return any(a is not None and b is not None and b >= a for a, b in pairs)


def make_layer(
    policy: Policy, spec: LayerSpec, prompt: Prompt, obs: Observation, slots: Array, capacities: tuple[int, ...]
) -> Any:
    """Compresses one layer: a pure function of what was observed.

    Args:
      prompt, obs: Of the layer.
      slots: Tokens that each stage leaves in each row, [stages, B] int32.
      capacities: Places that each stage allocates.

    Returns:
      The layer's cache.
    """
    if not policy.stages:
        return policy.layout.build(prompt)
    *before, last = range(len(policy.stages))
    for i in before:
        prompt = policy.stages[i].reduce(prompt, obs, spec, slots[i], capacities[i])
    return policy.stages[last].build(prompt, obs, spec, slots[last], capacities[last], policy.layout)


def attend_with(policy: Policy):
    """The `attend` of a model whose cache this policy made."""
    stage = policy.stages[-1] if policy.acts_every_step else None
    mark = stage.update if stage is not None else None

    def attend_and_evict(spec: LayerSpec, layer: Any, new: Tokens) -> tuple[Array, Any]:
        out, layer = attend(spec, layer, new, mark)
        return out, layer if stage is None or layer.marks is None else stage.step(layer)

    return attend_and_evict
