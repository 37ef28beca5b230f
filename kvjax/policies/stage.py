"""What a policy does to a prompt's tokens, one stage after another: evict by score, or let a ring forget."""

import dataclasses
from typing import Any, Literal, Protocol

import jax.numpy as jnp
from jax import Array, lax

from kvjax.cache import EMPTY, LayerSpec, Slots, make_ring
from kvjax.policies.budget import Allocate, Budget, Uniform, np_like, whole
from kvjax.policies.observe import Needs, Observation, Prompt
from kvjax.policies.score import Score, Update
from kvjax.policies.select import Select, TopTokens, rank
from kvjax.policies.store import Store


@dataclasses.dataclass(frozen=True)
class Phase:
    """When a stage acts.

    Attributes:
      when: "prompt": once, at the end of the prompt. "step": then, and again while tokens are added.
      every: Tokens between two acts of "step".
    """

    when: Literal["prompt", "step"] = "prompt"
    every: int = 1

    def __post_init__(self):
        if self.when not in ("prompt", "step"):
            raise ValueError(f'A phase is "prompt" or "step", got {self.when!r}.')
        if self.every < 1:
            raise ValueError(f"every must be at least 1, got {self.every}.")

    def __str__(self) -> str:
        if self.when == "prompt":
            return "end of prompt"
        return "every step" if self.every == 1 else f"every {self.every} steps"


class Stage(Protocol):
    """A step of a policy that decides which tokens stay."""

    @property
    def budget(self) -> Budget: ...

    @property
    def needs(self) -> Needs: ...

    @property
    def phase(self) -> Phase: ...

    @property
    def least(self) -> int:
        """Fewest slots per layer and head with which the stage makes sense: its floor in every layer."""
        ...

    @property
    def by_position(self) -> bool:
        """Whether slots belong to positions, so that the stage needs the prompt as it was, without gaps."""
        ...

    @property
    def endless(self) -> bool:
        """Whether positions are those inside the cache."""
        ...

    @property
    def update(self) -> Update | None:
        """How marks are kept up when a token is added; None if adding tokens evicts none by their marks."""
        ...

    def slots(self, length: Any, layers: int) -> Any:
        """Slots of every layer for prompts of length [...]: [layers, ...] int32."""
        ...

    def reduce(self, prompt: Prompt, obs: Observation, spec: LayerSpec, slots: Array, capacity: int) -> Prompt:
        """Fewer tokens: slots [B] per row in `capacity` places."""
        ...

    def build(
        self, prompt: Prompt, obs: Observation, spec: LayerSpec, slots: Array, capacity: int, store: Store
    ) -> Any:
        """As the last stage: the layer's cache."""
        ...

    def step(self, layer: Any) -> Any:
        """After tokens were added: the layer within its budget again."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evict:
    """Keep the tokens that score highest; forget the others.

    Attributes:
      score: Which tokens will matter.
      budget: How many stay.
      allocate: How the budget is spread over layers.
      select: Single tokens or whole chunks.
      phase: When.
      sinks: First tokens that always stay.
      recent: Newest tokens that always stay: a number, or a share of the layer's slots.
      floor: Slots that no layer goes below; at least what always stays, and one.
    """

    score: Score
    budget: Budget
    allocate: Allocate = Uniform()
    select: Select = TopTokens()
    phase: Phase = Phase()
    sinks: int = 0
    recent: int | float = 0
    floor: int = 1
    endless = False

    def __post_init__(self):
        if self.phase.when == "step":
            if self.score.update is None:
                raise ValueError(
                    f"{type(self.score).__name__} can only be taken at the end of the prompt: it has no form that is "
                    'kept up while decoding. Use phase="prompt".'
                )
            if self.select.neighbours:
                raise ValueError('Chunks are chosen once: a policy that keeps whole chunks needs phase="prompt".')

    @property
    def needs(self) -> Needs:
        return self.score.needs

    @property
    def by_position(self) -> bool:
        return self.select.neighbours

    @property
    def update(self) -> Update | None:
        return self.score.update if self.phase.when == "step" else None

    @property
    def least(self) -> int:
        recent = self.recent if isinstance(self.recent, int) else 1
        return max(self.floor, self.sinks + recent, 1)

    def slots(self, length: Any, layers: int) -> Any:
        return self.allocate(self.budget.mean(length), length, layers, self.least)

    def _recent(self, slots: Any) -> Any:
        return self.recent if isinstance(self.recent, int) else whole(self.recent * slots)

    def _choose(self, prompt: Prompt, obs: Observation, spec: LayerSpec, slots: Array, capacity: int):
        scores = self.score(prompt, obs, spec)
        ranked = rank(scores, prompt.pos, obs.length - 1, self.sinks, self._recent(slots))
        return scores, self.select(ranked, slots, capacity)

    def reduce(self, prompt: Prompt, obs: Observation, spec: LayerSpec, slots: Array, capacity: int) -> Prompt:
        _, kept = self._choose(prompt, obs, spec, slots, capacity)
        return prompt.take(*kept)

    def build(
        self, prompt: Prompt, obs: Observation, spec: LayerSpec, slots: Array, capacity: int, store: Store
    ) -> Any:
        if self.phase.when == "prompt":
            return store.build(self.reduce(prompt, obs, spec, slots, capacity))
        scores, (index, valid) = self._choose(prompt, obs, spec, slots, capacity)
        layer = store.build(prompt.take(index, valid))
        # A budget in tokens may exceed the prompt: then tokens are added freely until it is reached.
        bound = max(capacity, self.budget.tokens or 0)
        limit = slots if self.budget.tokens is None else jnp.full_like(slots, self.budget.tokens)
        marks = jnp.take_along_axis(scores, index, -1)
        return dataclasses.replace(layer, marks=marks, limit=limit, bound=bound + self.phase.every)

    def step(self, layer: Slots) -> Slots:
        """Evicts what exceeds the limit: the lowest mark at every step, or all of them once `every` have gathered."""
        assert layer.marks is not None
        last = layer.pos.max((1, 2))
        ranked = rank(layer.marks, layer.pos, last, self.sinks, self._recent(layer.kept))
        over = layer.count - layer.kept[:, None]
        if self.phase.every == 1:
            lowest = jnp.where(layer.pos == EMPTY, jnp.inf, ranked)
            return layer.drop(jnp.argmin(lowest, -1), over > 0)

        def shrink(layer: Slots) -> Slots:
            full = over >= self.phase.every
            keep = jnp.where(full, layer.kept[:, None], layer.count)
            order = jnp.argsort(-ranked, axis=-1, stable=True)
            return layer.keep(order, jnp.arange(layer.capacity) < keep[..., None])

        return lax.cond((over >= self.phase.every).any(), shrink, lambda layer: layer, layer)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ring:
    """Keep the first tokens and the newest; every new one overwrites the oldest (StreamingLLM, sliding windows).

    Attributes:
      budget: Slots of the ring, sinks included.
      sinks: First tokens that stay.
      shifted: Whether the sinks move along with the window: positions inside the cache instead of those in the text.
    """

    budget: Budget
    sinks: int = 0
    shifted: bool = False
    phase = Phase("step")
    needs = Needs()
    by_position = True
    update = None  # The newest token overwrites the oldest: nothing to mark.

    @property
    def endless(self) -> bool:
        return self.shifted

    @property
    def least(self) -> int:
        return self.sinks + 1

    def slots(self, length: Any, layers: int) -> Any:
        if self.budget.tokens is not None:  # A ring has its size whatever the prompt's length.
            xp = np_like(length)
            return xp.stack([whole(self.budget.mean(length))] * layers)
        return Uniform()(self.budget.mean(length), length, layers, self.least)

    def reduce(self, prompt: Prompt, obs: Observation, spec: LayerSpec, slots: Array, capacity: int) -> Prompt:
        raise TypeError("A ring cannot be followed by another stage.")

    def build(
        self, prompt: Prompt, obs: Observation, spec: LayerSpec, slots: Array, capacity: int, store: Store
    ) -> Slots:
        codec = store.codec  # type: ignore[attr-defined]  Rings compose with slotwise stores alone.
        limit = None if self.budget.tokens is not None else slots
        pos = prompt.pos[:, 0]
        return make_ring(
            prompt.k, prompt.v, pos, capacity, limit=limit, sinks=self.sinks, shifted=self.shifted, codec=codec
        )

    def step(self, layer: Slots) -> Slots:
        return layer
