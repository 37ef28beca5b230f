"""A policy is a value: stages that choose tokens, a store that lays them out, a way to read them, and what is done to
the cache as a whole. `a | b` composes.

The rules of composition are checked when a policy is built, so that a policy that exists makes sense.
"""

import dataclasses
from typing import Any

from jax import Array

from kvjax.cache import LayerSpec, Tokens
from kvjax.policies.budget import Budget
from kvjax.policies.observe import Needs, Observation, Prompt
from kvjax.policies.read import Read, ReadAll
from kvjax.policies.stage import Forget, Stage
from kvjax.policies.store import Built, Role, Slotwise, Store
from kvjax.policies.transform import Transform


class PolicyError(ValueError):
    """A policy that makes no sense, or that a model or a prompt cannot serve; says why, and what would do."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Policy:
    """What becomes of a prompt's keys and values. Hashable; equal policies compile once.

    Attributes:
      stages: Choose tokens, one after another, each from what the one before has left. Empty: all tokens stay.
      store: Layout in bytes; None is full precision.
      read: What a query looks at.
      transform: What is done to the cache as a whole.
      label: How it was written, for tables.
    """

    stages: tuple[Stage, ...] = ()
    store: Store | None = None
    read: Read = ReadAll()
    transform: Transform | None = None
    label: str = dataclasses.field(default="full", compare=False)

    def __post_init__(self):
        for stage in self.stages[:-1]:
            if stage.phase.when != "prompt":
                raise PolicyError(
                    f"In {self.label!r} a policy that acts while tokens are added is followed by another that evicts. "
                    "It must come last."
                )
        last = self.stages[-1] if self.stages else None
        if any(stage.by_position for stage in self.stages[1:]):
            raise PolicyError(
                f"In {self.label!r} a policy that goes by the order of tokens (a ring of recent ones, or chunks of "
                "neighbours) follows an eviction that leaves gaps. Put it first, or use one of the two."
            )
        if last is not None and last.ragged:
            try:
                (self.store or Slotwise()).ragged()
            except ValueError as error:
                raise PolicyError(
                    f"{self.label!r}: heads keep different numbers of tokens, and {error}. Use another store, or a "
                    "policy that keeps as many in every head."
                ) from None
        if any(stage.ragged or stage.divide is not None for stage in self.stages[:-1]):
            raise PolicyError(
                f"In {self.label!r} a policy whose budgets depend on the data is followed by another that evicts. It "
                "must come last."
            )
        if self.in_chunks and len(self.stages) > 1:
            raise PolicyError(
                f"In {self.label!r} a policy that acts on every chunk of the prompt follows one that acts on the whole "
                "of it. Use one of the two."
            )
        if last is not None and last.rest not in (None, Forget()) and self.layout.holds_rest:
            raise PolicyError(
                f"{self.label!r}: one part merges the tokens that do not fit, the other stores them. Use one of them."
            )
        if last is not None and last.phase.when != "prompt" and not self.layout.slotwise:
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
        if any(stage.budget.in_bytes for stage in self.stages[:-1]):
            raise PolicyError(f"{self.label!r}: bytes can only bound the last policy that evicts.")
        try:
            self.read.fits(self)
            if self.transform is not None:
                self.transform.fits(self)
        except ValueError as error:
            raise PolicyError(f"{self.label!r}: {error}") from None

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
        if self.read != ReadAll() and other.read != ReadAll():
            raise PolicyError(f"{label!r}: both say what a query looks at. Use one of the two.")
        if self.transform is not None and other.transform is not None:
            raise PolicyError(f"{label!r}: both change the cache as a whole. Use one of the two.")
        empty = Policy()
        if empty in (self, other):
            return self if other == empty else other
        return Policy(
            stages=self.stages + other.stages,
            store=self.store or other.store,
            read=other.read if self.read == ReadAll() else self.read,
            transform=self.transform or other.transform,
            label=label,
        )

    def __str__(self) -> str:
        return self.label

    @property
    def layout(self) -> Store:
        store = self.store or Slotwise()
        return store.ragged() if self.stages and self.stages[-1].ragged else store

    @property
    def needs(self) -> Needs:
        """What the parts ask to see of a prompt."""
        needs = self.layout.needs | self.read.needs
        for stage in self.stages:
            needs = needs | stage.needs
        return needs

    @property
    def divided(self) -> bool:
        """Whether layers' budgets depend on the data, so that they are decided while the prompt is seen."""
        return bool(self.stages) and self.stages[-1].divide is not None

    def role(self, layer: int, layers: int) -> Role:
        """What the layer-th of all compressed layers is to do, part by part."""
        return Role(
            stage=self.stages[-1].role(layer, layers) if self.stages else None,
            store=self.layout.role(layer, layers),
            read=self.read.role(layer, layers),
            whole=self.transform is not None and self.transform.whole(layer, layers),
        )

    def check(self, config: Any) -> None:
        """Raises ValueError where a model's shapes do not fit."""
        for stage in self.stages:
            stage.check(config)
        self.layout.check(config)
        self.read.check(config)
        if self.transform is not None:
            self.transform.check(config)

    @property
    def endless(self) -> bool:
        """Whether positions are those inside the cache, so that a stream may outgrow the model's context."""
        return bool(self.stages) and self.stages[-1].endless

    @property
    def acts_every_step(self) -> bool:
        """Whether tokens must be added one at a time, because each may change what is there."""
        return self.transform is not None or (bool(self.stages) and self.stages[-1].update is not None)

    @property
    def in_chunks(self) -> bool:
        """Whether the policy acts while the prompt is fed chunk by chunk, so that it cannot be applied afterwards."""
        return bool(self.stages) and self.stages[-1].phase.when == "chunk"

    @property
    def after_prompt(self) -> "Policy":
        """What is left to do once the prompt is compressed. Policies that differ only in how they do that have the
        same, so a cache that carries it shares compiled decoding with theirs."""
        acting = self.stages[-1:] if self.stages and self.stages[-1].update is not None else ()
        return Policy(stages=acting, read=self.read, transform=self.transform)


def _never_less(before: Budget, after: Budget) -> bool:
    pairs = ((before.ratio, after.ratio), (before.tokens, after.tokens))
    return any(a is not None and b is not None and b >= a for a, b in pairs)


@dataclasses.dataclass(frozen=True)
class Place:
    """What is decided of a layer before it is compiled; layers that agree share a compilation.

    Attributes:
      capacities: Slots that each stage allocates.
      role: See `Role`.
      bound: Slots that the layer may grow to where its last stage goes on evicting; 0: as many as that has anywhere.
    """

    capacities: tuple[int, ...] = ()
    role: Role = Role()
    bound: int = 0


def make_layer(policy: Policy, spec: LayerSpec, prompt: Prompt, obs: Observation, slots: Array, place: Place) -> Any:
    """Compresses one layer: a pure function of what was observed.

    Args:
      prompt, obs: Of the layer.
      slots: Tokens that each stage leaves in each row, [stages, B] int32.
      place: What is allocated.

    Returns:
      The layer's cache.
    """
    prompt = reduce_before(policy, spec, prompt, obs, slots, place)
    about = Built(obs=obs, spec=spec, capacity=prompt.k.shape[2], role=place.role, bound=place.bound)
    if not policy.stages:
        layer = (Slotwise() if place.role.whole else policy.layout).build(prompt, about)
    else:
        layer = policy.stages[-1].build(prompt, about, slots[-1], place.capacities[-1], policy.layout)
    return policy.read.wrap(layer, about)


def reduce_before(
    policy: Policy, spec: LayerSpec, prompt: Prompt, obs: Observation, slots: Array, place: Place
) -> Prompt:
    """What all stages but the last leave of a prompt; arguments as in `make_layer`."""
    for i, stage in enumerate(policy.stages[:-1]):
        about = Built(obs=obs, spec=spec, capacity=prompt.k.shape[2], role=place.role)
        prompt = stage.reduce(prompt, about, slots[i], place.capacities[i])
    return prompt


def attend_with(policy: Policy):
    """The `attend` of a model whose cache this policy made."""
    stage = policy.stages[-1] if policy.stages and policy.stages[-1].update is not None else None
    mark = stage.update if stage is not None else None

    def attend_and_evict(spec: LayerSpec, layer: Any, new: Tokens, shared: Any) -> tuple[Array, Any, Any]:
        out, layer, shared = layer.attend(new, spec, shared, mark)
        return out, layer if stage is None or layer.marks is None else stage.step(layer), shared

    return attend_and_evict
