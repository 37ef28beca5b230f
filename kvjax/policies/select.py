"""From scores to slots: which indices stay, in order of position."""

import dataclasses
from typing import Literal, Protocol

import jax.numpy as jnp
from jax import Array, lax

from kvjax.cache import EMPTY
from kvjax.kernels.top import ordered, top_slots

KEEP = jnp.inf  # Score of a token that must stay; empty slots score -inf.


class Select(Protocol):
    @property
    def neighbours(self) -> bool:
        """Whether neighbouring slots must hold neighbouring tokens."""
        ...

    @property
    def ragged(self) -> bool:
        """Whether heads get different numbers of tokens, `slots` on average; `capacity` then is that of all heads
        together, divided by their number."""
        ...

    def __call__(self, scores: Array, slots: Array, capacity: int) -> tuple[Array, Array]:
        """Chooses per row and head.

        Args:
          scores: [B, 1 or H, S] float32, `KEEP` for tokens that must stay, -inf for empty slots.
          slots: Tokens to keep in each row [B] int32, at most `capacity`.
          capacity: Length of the result.

        Returns:
          Increasing slot indices [B, 1 or H, capacity] and which of them count.
        """
        ...


@dataclasses.dataclass(frozen=True)
class TopTokens:
    """The tokens with the highest scores; of equal ones the earliest."""

    neighbours = False
    ragged = False

    def __call__(self, scores: Array, slots: Array, capacity: int) -> tuple[Array, Array]:
        return top_slots(scores, slots, min(capacity, scores.shape[-1]))  # A stage before may have left fewer.


@dataclasses.dataclass(frozen=True)
class TopChunks:
    """Whole chunks of neighbouring tokens, the same for all heads, by the mean score of their tokens (ChunkKV).

    Chunks are taken from the best on until the next would not fit. A chunk with a token that must stay comes first; of
    equal ones the latest.

    Attributes:
      size: Tokens of a chunk; the last one of a prompt may be shorter.
    """

    size: int = 20
    neighbours = True
    ragged = False

    def __call__(self, scores: Array, slots: Array, capacity: int) -> tuple[Array, Array]:
        length = scores.shape[-1]
        chunks = -(-length // self.size)
        held = scores.max(1) > -jnp.inf  # [B, S]
        summed = jnp.where(held[:, None], scores, 0.0).sum(1)
        pad = ((0, 0), (0, chunks * self.size - length))
        held, summed = (jnp.pad(x, pad).reshape(-1, chunks, self.size) for x in (held, summed))
        sizes = held.sum(-1)
        means = jnp.where(sizes > 0, summed.sum(-1) / jnp.maximum(sizes, 1), -jnp.inf)
        order = chunks - 1 - jnp.argsort(-means[:, ::-1], axis=-1, stable=True)
        fits = jnp.cumsum(jnp.take_along_axis(sizes, order, -1), -1) <= slots[:, None]
        chosen = jnp.zeros(fits.shape, bool).at[jnp.arange(fits.shape[0])[:, None], order].set(fits)
        tokens = (chosen[..., None] & held).reshape(-1, chunks * self.size)[:, None, :length]
        index, valid = ordered(jnp.arange(length), tokens, length)
        return index[..., :capacity], valid[..., :capacity]


@dataclasses.dataclass(frozen=True)
class AcrossHeads:
    """The tokens with the highest scores of all heads of a layer, so that some heads keep more than others (Ada-KV).

    Attributes:
      floor: Part of the mean that every head gets for certain, between 0 and 1.
      safeguard: How. "blend": the slots that a head wins count `1 - floor`, and `floor` times the mean comes on top;
        whole slots go by largest remainder. "reserve": the best `floor` times the mean of each head's tokens are taken
        first, and all heads compete for the rest.
      normalize: With "blend", a head's scores are scaled, in the contest alone, by the part of their sum that its best
        tokens hold, as many as it would get on average.
    """

    floor: float = 0.2
    safeguard: Literal["blend", "reserve"] = "blend"
    normalize: bool = False
    neighbours = False
    ragged = True

    def __post_init__(self):
        if not 0 <= self.floor <= 1 or self.safeguard not in ("blend", "reserve"):
            raise ValueError(
                f'floor must be between 0 and 1, and the safeguard "blend" or "reserve"; got {self.floor} and '
                f"{self.safeguard!r}."
            )
        if self.normalize and self.safeguard == "reserve":
            raise ValueError('Normalized scores have a part in the contest of "blend" alone.')

    def __call__(self, scores: Array, slots: Array, capacity: int) -> tuple[Array, Array]:
        heads, length = scores.shape[1:]
        most = min(heads * capacity, heads * length)
        counts = self._reserve(scores, slots, most) if self.safeguard == "reserve" else self._blend(scores, slots, most)
        width = min(most, length)
        best, index = lax.top_k(scores, width)
        valid = (jnp.arange(width) < counts[..., None]) & (best > -jnp.inf)
        return ordered(index, valid, length)

    def _reserve(self, scores: Array, slots: Array, most: int) -> Array:
        order = jnp.argsort(jnp.argsort(-scores, axis=-1, stable=True), axis=-1)
        safe = jnp.floor(slots * self.floor + 1e-3)[:, None, None]
        return won(jnp.where((order < safe) & (scores > -jnp.inf), KEEP, scores), slots * scores.shape[1], most)

    def _blend(self, scores: Array, slots: Array, most: int) -> Array:
        heads = scores.shape[1]
        stay = (scores == KEEP).sum(-1)
        free = jnp.maximum(heads * slots - stay.sum(-1), 0)  # Slots that are competed for, [B].
        mean = free[:, None] / heads
        scores = jnp.where(scores == KEEP, -jnp.inf, scores)
        if self.normalize:
            ranked = -jnp.sort(-jnp.where(scores > -jnp.inf, scores, 0.0), -1)
            top = jnp.where(jnp.arange(ranked.shape[-1]) < mean[..., None], ranked, 0.0).sum(-1)
            scaled = scores * (top / jnp.maximum(ranked.sum(-1), 1e-30))[..., None]
            scores = jnp.where(scores > -jnp.inf, scaled, -jnp.inf)
        share = won(scores, free, most) * (1 - self.floor) + mean * self.floor
        counts = jnp.floor(share + 1e-3)
        # By largest remainder, taken coarsely: the last bits of a float must not decide between equal ones.
        remainder = jnp.round((share - counts) * 1000)
        place = jnp.argsort(jnp.argsort(-remainder, axis=-1, stable=True), axis=-1)
        return counts.astype(jnp.int32) + (place < free[:, None] - counts.sum(-1, keepdims=True)) + stay


def won(scores: Array, slots: Array, most: int) -> Array:
    """How many of a row's best slots [B] scores [B, H, S], at most `most`, are each head's: [B, H] int32. Of equal ones
    the lower head wins."""
    batch, heads, length = scores.shape
    best, index = lax.top_k(scores.reshape(batch, heads * length), most)
    counts = (jnp.arange(most) < slots[:, None]) & (best > -jnp.inf)
    return ((index // length == jnp.arange(heads)[:, None, None]) & counts).sum(-1, dtype=jnp.int32).T


def complement(index: Array, valid: Array, pos: Array, capacity: int) -> tuple[Array, Array]:
    """The tokens that were not chosen: increasing slot indices [B, 1 or H, S - capacity] and which of them count.

    Args:
      index, valid: As a `Select` returns them, [B, 1 or H, capacity].
      pos: Positions of all tokens [B, 1 or H, S]. No row may leave more than `S - capacity`.
    """
    batch, heads, slots = index.shape[0], max(index.shape[1], pos.shape[1]), pos.shape[-1]
    index, valid = (jnp.broadcast_to(x, (batch, heads, x.shape[-1])) for x in (index, valid))
    rows = jnp.arange(batch)[:, None, None], jnp.arange(heads)[None, :, None]
    chosen = jnp.zeros((batch, heads, slots), bool).at[*rows, jnp.where(valid, index, slots)].set(True, mode="drop")
    others, counts = ordered(jnp.arange(slots), ~chosen & (pos != EMPTY), slots)
    return others[..., : slots - capacity], counts[..., : slots - capacity]


def rank(scores: Array, pos: Array, last: Array, sinks: int, recent: Array | int) -> Array:
    """Scores with `KEEP` for the first `sinks` positions and the newest `recent`, and -inf for empty slots.

    Args:
      scores: [B, 1 or H, S]. pos: [B, 1 or H, S]. last: Newest position of each row [B].
      recent: Newest tokens that stay: an int or [B].
    """
    first_recent = (last + 1 - recent)[:, None, None]
    scores = jnp.where((pos < sinks) | (pos >= first_recent), KEEP, scores)
    return jnp.where(pos == EMPTY, -jnp.inf, scores)
