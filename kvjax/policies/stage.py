"""What a policy does to a prompt's tokens, one stage after another: evict by score, or let a ring forget."""

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from kvjax.cache import EMPTY, ByHead, Slots, make_ring
from kvjax.cache.slots import take_slots
from kvjax.kernels import mesh, write
from kvjax.policies.budget import Allocate, Budget, Divide, Uniform, np_like, whole
from kvjax.policies.observe import Needs, Prompt
from kvjax.policies.score import Score, Update
from kvjax.policies.select import Select, TopTokens, complement, rank
from kvjax.policies.store import Built, Store


@dataclasses.dataclass(frozen=True)
class Phase:
    """When a stage acts.

    Attributes:
      when: "prompt": once, at the end of the prompt. "step": then, and again while tokens are added. "chunk": at the
        end of each chunk of the prompt, so that later chunks see what earlier ones have left.
      every: Tokens between two acts of "step"; tokens of a chunk.
      tail: Last tokens of the prompt that come after the last act of "chunk", and all stay.
    """

    when: Literal["prompt", "step", "chunk"] = "prompt"
    every: int = 1
    tail: int = 0

    def __post_init__(self):
        if self.when not in ("prompt", "step", "chunk"):
            raise ValueError(f'A phase is "prompt", "step" or "chunk", got {self.when!r}.')
        if self.every < 1 or self.tail < 0:
            raise ValueError(f"every must be at least 1 and tail not negative, got {self.every} and {self.tail}.")

    def __str__(self) -> str:
        if self.when == "prompt":
            return "end of prompt"
        if self.when == "chunk":
            return f"every {self.every} tokens of the prompt"
        return "every step" if self.every == 1 else f"every {self.every} steps"


class Stage:
    """Base of every stage: a frozen, hashable step of a policy that decides which tokens stay.

    Attributes:
      budget: How many stay.
      phase: When it acts.
      needs: What it asks to see of a prompt.
      least: Fewest slots per layer and head with which it makes sense: its floor in every layer.
      by_position: Whether slots belong to positions, so that it needs the prompt as it was, without gaps.
      endless: Whether positions are those inside the cache.
      ragged: Whether heads keep different numbers of tokens.
      update: How marks are kept up when a token is added; None if adding tokens evicts none by their marks.
      divide: How the budget is spread over layers by what is seen of them; None if it is known before.
      rest: What becomes of tokens that do not fit; None if that is no question.
    """

    budget: Budget
    phase = Phase()
    needs: Any = Needs()
    least: Any = 1
    by_position: Any = False
    endless: Any = False
    ragged: Any = False
    update: Any = None
    divide: Any = None
    rest: Any = None

    def slots(self, length: Any, layers: int) -> Any:
        """Slots of every layer for prompts of length [...]: [layers, ...] int32."""
        raise NotImplementedError

    def role(self, layer: int, layers: int) -> Any:
        """What the layer-th of all compressed layers is to do: a hashable value; None where all do the same."""
        del layer, layers

    def check(self, config: Any) -> None:
        """Raises ValueError where a model's shapes do not fit."""
        del config

    def scored(self, prompt: Prompt, about: Built) -> Prompt:
        """The prompt with this stage's scores, for a budget that is decided in several steps (`divide`)."""
        raise NotImplementedError

    def reduce(self, prompt: Prompt, about: Built, slots: Array, capacity: int) -> Prompt:
        """Fewer tokens: slots [B] per row in `capacity` places."""
        raise NotImplementedError

    def build(self, prompt: Prompt, about: Built, slots: Array, capacity: int, store: Store) -> Any:
        """As the last stage: the layer's cache."""
        raise NotImplementedError

    def step(self, layer: Any) -> Any:
        """After tokens were added: the layer within its budget again."""
        return layer

    def open(self, layer: Any, slots: Array) -> Any:
        """Before the first chunk of a prompt: an empty layer that will hold slots [B] tokens in each row."""
        raise NotImplementedError

    def end_chunk(self, layer: Any, last: Array) -> Any:
        """After a chunk: the layer within its budget; last [B] bool says which rows have no further chunk."""
        raise NotImplementedError

    def close(self, layer: Any, capacity: int) -> Any:
        """After the last chunk: a layer of so many slots that grows with every token."""
        raise NotImplementedError


class Rest:
    """What becomes of tokens that do not fit: here they are forgotten. Base of everything that makes more of them."""

    def join(self, prompt: Prompt, kept: Prompt, about: Built) -> tuple[Prompt, Any]:
        """At the end of a prompt.

        Args:
          prompt: All tokens. kept: Those that stay, a subset by position.

        Returns:
          What stays, with what it makes of the rest; and what it remembers of the layer while decoding, a pytree of
          arrays [B, ...] (`Slots.memo`), or None.
        """
        del prompt, about
        return kept, None

    def step(self, layer: Slots, slot: Array, where: Array) -> Slots:
        """While decoding, before the token at slot [B, 1 or H] leaves, where it does [B, 1 or H] bool."""
        del slot, where
        return layer


@dataclasses.dataclass(frozen=True)
class Forget(Rest):
    """Tokens that do not fit are gone."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evict(Stage):
    """Keep the tokens that score highest; forget the others.

    Attributes:
      score: Which tokens will matter.
      budget: How many stay.
      allocate: How the budget is spread over layers: by a rule that is known before, or by what is seen of them.
      select: Single tokens or whole chunks.
      rest: What becomes of the others.
      phase: When.
      sinks: First tokens that always stay.
      recent: Newest tokens that always stay: a number, or a share of the layer's slots.
      floor: Slots that no layer goes below; at least what always stays, and one.
    """

    score: Score
    budget: Budget
    allocate: Allocate | Divide = Uniform()
    select: Select = TopTokens()
    rest: Rest = Forget()
    phase: Phase = Phase()
    sinks: int = 0
    recent: int | float = 0
    floor: int = 1

    def __post_init__(self):
        if self.divide is not None and self.divide.cascades and (self.select.neighbours or self.rest != Forget()):
            raise ValueError(
                "Budgets that cascade cut a layer several times: only single tokens can be chosen, and those that do "
                "not fit are forgotten."
            )
        if self.phase.when == "chunk" and self.divide is not None:
            raise ValueError("Budgets that depend on whole layers cannot be kept chunk by chunk.")
        if self.phase.when != "prompt":
            if self.score.update is None:
                raise ValueError(
                    f"{type(self.score).__name__} can only be taken at the end of the prompt: it has no form that is "
                    'kept up while tokens are added. Use phase="prompt".'
                )
            if self.select.neighbours:
                raise ValueError('Chunks are chosen once: a policy that keeps whole chunks needs phase="prompt".')
            if self.phase.every > 1 and self.rest != Forget():
                raise ValueError("Tokens that leave several at a time are forgotten: use every=1.")

    @property
    def needs(self) -> Needs:
        return self.score.needs if self.divide is None else self.score.needs | self.divide.needs

    @property
    def by_position(self) -> bool:
        return self.select.neighbours

    @property
    def update(self) -> Update | None:
        return self.score.update if self.phase.when == "step" else None

    @property
    def least(self) -> int:
        recent = self.recent if isinstance(self.recent, int) else 1
        return max(self.floor, self.sinks + recent, 1) + self.phase.tail

    @property
    def ragged(self) -> bool:
        return self.select.ragged

    @property
    def divide(self) -> Divide | None:
        return self.allocate if isinstance(self.allocate, Divide) else None

    def check(self, config: Any) -> None:
        if self.ragged and config.cache_heads == 1:
            raise ValueError(
                "KV heads share a layer's slots, and this model has a single one, which gets them all. Use the method "
                "that scores by itself, such as snapkv."
            )

    def slots(self, length: Any, layers: int) -> Any:
        # Until layers are seen, all are taken to get the same.
        allocate: Any = self.allocate if self.divide is None else Uniform()
        return allocate(self.budget.mean(length), length, layers, self.least)

    def _recent(self, slots: Any) -> Any:
        return self.recent if isinstance(self.recent, int) else whole(self.recent * slots)

    def scored(self, prompt: Prompt, about: Built) -> Prompt:
        return dataclasses.replace(prompt, scores=self._scores(prompt, about))

    def _scores(self, prompt: Prompt, about: Built) -> Array:
        return self.score(prompt, about.obs, about.spec) if prompt.scores is None else prompt.scores

    def _choose(self, prompt: Prompt, about: Built, slots: Array, capacity: int):
        scores = self._scores(prompt, about)
        ranked = rank(scores, prompt.pos, about.obs.length - 1, self.sinks, self._recent(slots))
        return scores, self.select(ranked, slots, capacity)

    def reduce(self, prompt: Prompt, about: Built, slots: Array, capacity: int) -> Prompt:
        _, kept = self._choose(prompt, about, slots, capacity)
        return self.rest.join(prompt, prompt.take(*kept), about)[0]

    def build(self, prompt: Prompt, about: Built, slots: Array, capacity: int, store: Store) -> Any:
        scores, (index, valid) = self._choose(prompt, about, slots, capacity)
        kept, memo = self.rest.join(prompt, prompt.take(index, valid), about)
        if store.holds_rest:
            # On a mesh a row may fill up to so many places less than there are: the plan has rounded them up.
            spare = min(mesh.shares(1) - 1, capacity)
            others = complement(index, valid, prompt.pos, capacity - spare)
            about = dataclasses.replace(about, rest=prompt.take(*others))
        layer = store.build(kept, dataclasses.replace(about, capacity=capacity))
        if self.phase.when != "step":
            return layer
        # A budget in tokens may exceed the prompt: then tokens are added freely until it is reached.
        tokens = self.budget.tokens or 0
        bound = about.bound or max(capacity, tokens)
        limit = jnp.where(about.obs.length <= tokens, min(tokens, bound), slots)
        marks = take_slots(scores, index)
        return layer.manage(marks=marks, limit=limit, bound=bound + self.phase.every, memo=memo)

    def step(self, layer: Slots) -> Slots:
        """Evicts what exceeds the limit: the lowest mark at every step, or all of them once `every` have gathered."""
        assert layer.marks is not None
        last = layer.pos.max((1, 2))
        ranked = rank(layer.marks, layer.pos, last, self.sinks, self._recent(layer.kept))
        over = layer.count - layer.kept[:, None]
        if self.phase.every == 1:
            slot = jnp.argmin(jnp.where(layer.pos == EMPTY, jnp.inf, ranked), -1)
            return self.rest.step(layer, slot, over > 0).drop(slot, over > 0)

        def shrink(layer: Slots) -> Slots:
            full = over >= self.phase.every
            keep = jnp.where(full, layer.kept[:, None], layer.count)
            order = jnp.argsort(-ranked, axis=-1, stable=True)
            return layer.keep(order, jnp.arange(layer.capacity) < keep[..., None])

        return write.when((over >= self.phase.every).any(), shrink, layer)

    def open(self, layer: Slots, slots: Array) -> Slots:
        marks = jnp.zeros(layer.pos.shape, jnp.float32)
        return layer.manage(marks=marks, limit=slots - self.phase.tail, bound=0, memo=None)

    def end_chunk(self, layer: Slots, last: Array) -> Slots:
        """The best stay; in rows that go on, the newest too, whose worth is not known yet (Locret's stabilizers)."""
        assert layer.marks is not None
        recent = jnp.where(last, 0, self._recent(layer.kept))
        ranked = rank(layer.marks, layer.pos, layer.pos.max((1, 2)), self.sinks, recent)
        order = jnp.argsort(-ranked, axis=-1, stable=True)
        keep = jnp.minimum(layer.count, layer.kept[:, None])
        return layer.keep(order, jnp.arange(layer.capacity) < keep[..., None])

    def close(self, layer: Slots, capacity: int) -> Slots:
        first = jnp.arange(capacity)  # What is occupied stands in front.
        layer = layer.keep(first[None, None], first < layer.count[..., None])
        return dataclasses.replace(layer, marks=None, limit=None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ring(Stage):
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
    by_position = True

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

    def reduce(self, prompt: Prompt, about: Built, slots: Array, capacity: int) -> Prompt:
        raise TypeError("A ring cannot be followed by another stage.")

    def build(self, prompt: Prompt, about: Built, slots: Array, capacity: int, store: Store) -> Slots:
        codec = store.codec  # type: ignore[attr-defined]  Rings compose with slotwise stores alone.
        fixed = self.budget.tokens is not None and capacity <= self.budget.tokens
        limit = None if fixed else slots
        pos = prompt.pos[:, 0]
        return make_ring(
            prompt.k,
            prompt.v,
            pos,
            capacity,
            limit=limit,
            sinks=self.sinks,
            shifted=self.shifted,
            codec=codec,
            latent=about.spec.latent,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SplitHeads(Stage):
    """Some heads keep everything, the others the first tokens and the newest (DuoAttention).

    Attributes:
      gates: How much each head needs the whole text, for every compressed layer; the highest keep everything. None:
        heads of both kinds take turns.
      sparsity: Part of all layers' heads that keep a ring: those whose gates are below this quantile. Of equal ones the
        first keep everything.
      sinks: First tokens of a ring that stay.
      recent: Newest tokens of a ring.
    """

    gates: tuple[tuple[float, ...], ...] | None
    sparsity: float
    sinks: int
    recent: int
    phase = Phase("step")
    by_position = True

    @property
    def ring(self) -> "Ring":
        return Ring(budget=Budget(tokens=self.sinks + self.recent), sinks=self.sinks)

    @property
    def budget(self) -> Budget:  # type: ignore[override]
        return Budget(ratio=1 - self.sparsity) if self.sparsity < 1 else self.ring.budget

    def whole_heads(self, layer: int, heads: int) -> tuple[bool, ...]:
        """Which of a compressed layer's heads keep everything."""
        if self.gates is not None:
            gates = np.concatenate([np.asarray(gates) for gates in self.gates])
            keep = gates.size - math.ceil(self.sparsity * (gates.size - 1) - 1e-6) if self.sparsity < 1 else 0
            best = np.argsort(-gates, kind="stable")[:keep]
            first = sum(len(gates) for gates in self.gates[:layer])
            return tuple(np.isin(np.arange(first, first + heads), best).tolist())
        turns = np.floor(np.arange(layer * heads, (layer + 1) * heads + 1) * (1 - self.sparsity) + 1e-6)
        return tuple((np.diff(turns) > 0).tolist())

    def role(self, layer: int, layers: int) -> Any:
        """With gates, which heads keep everything; else the layer, since the number of heads is not known here."""
        return layer if self.gates is None else self.whole_heads(layer, len(self.gates[layer]))

    def check(self, config: Any) -> None:
        layers, heads = len(config.full_layers), config.cache_heads
        if self.gates is not None and [len(gates) for gates in self.gates] != [heads] * layers:
            raise ValueError(
                f"the gates are for layers of {[len(gates) for gates in self.gates]} KV heads, and this model has "
                f"{layers} full-attention layers of {heads}. Train gates for this model."
            )

    def slots(self, length: Any, layers: int) -> Any:
        """The mean over heads."""
        xp = np_like(length)
        if self.gates is None:
            whole_part = [1 - self.sparsity] * layers
        else:
            whole_part = [float(np.mean(self.whole_heads(i, len(self.gates[i])))) for i in range(layers)]
        ring = xp.minimum(length, self.sinks + self.recent)
        return xp.stack([whole(part * length + (1 - part) * ring) for part in whole_part])

    def reduce(self, prompt: Prompt, about: Built, slots: Array, capacity: int) -> Prompt:
        raise TypeError("Heads of different kinds cannot be followed by another stage.")

    def build(self, prompt: Prompt, about: Built, slots: Array, capacity: int, store: Store) -> Any:
        role, heads = about.role.stage, prompt.k.shape[1]
        keeps = role if self.gates is not None else self.whole_heads(role, heads)
        groups = {kind: tuple(i for i in range(heads) if keeps[i] == kind) for kind in (True, False)}
        layers = {}
        for kind, mine in groups.items():
            if mine:
                part, seen = of_heads(prompt, about, mine)
                size = self.sinks + self.recent
                layers[mine] = store.build(part, seen) if kind else self.ring.build(part, seen, slots, size, store)
        if len(layers) == 1:
            return next(iter(layers.values()))
        return ByHead(groups=tuple(layers.values()), heads=tuple(layers))


def of_heads(prompt: Prompt, about: Built, heads: tuple[int, ...]) -> tuple[Prompt, Built]:
    """A prompt, and what is known of it, as some KV heads and the query heads that read them see it."""
    index, obs = jnp.asarray(heads), about.obs
    group = obs.q.shape[1] // prompt.k.shape[1]
    queries = (index[:, None] * group + jnp.arange(group)).reshape(-1)
    asked = (obs.q, obs.moments, obs.extremes, obs.column_spread)
    q, moments, extremes, spread = jax.tree.map(lambda leaf: leaf[:, queries], asked)
    obs = dataclasses.replace(obs, q=q, moments=moments, extremes=extremes, column_spread=spread)
    part = jax.tree.map(lambda leaf: leaf if leaf.shape[1] == 1 else leaf[:, index], prompt)
    return part, dataclasses.replace(about, obs=obs)
