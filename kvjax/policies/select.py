"""From scores to slots: which indices stay, in order of position."""

import dataclasses
from typing import Protocol

import jax.numpy as jnp
from jax import Array, lax

from kvjax.cache import EMPTY

KEEP = jnp.inf  # Score of a token that must stay; empty slots score -inf.


class Select(Protocol):
    @property
    def neighbours(self) -> bool:
        """Whether neighbouring slots must hold neighbouring tokens."""
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


def ordered(index: Array, valid: Array, slots: int) -> tuple[Array, Array]:
    """Sorts chosen indices, those that do not count last; and says which count."""
    index = jnp.sort(jnp.where(valid, index, slots), axis=-1)
    return jnp.minimum(index, slots - 1), index < slots


@dataclasses.dataclass(frozen=True)
class TopTokens:
    """The tokens with the highest scores; of equal ones the earliest."""

    neighbours = False

    def __call__(self, scores: Array, slots: Array, capacity: int) -> tuple[Array, Array]:
        best, index = lax.top_k(scores, capacity)
        valid = (jnp.arange(capacity) < slots[:, None, None]) & (best > -jnp.inf)
        return ordered(index, valid, scores.shape[-1])


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


def rank(scores: Array, pos: Array, last: Array, sinks: int, recent: Array | int) -> Array:
    """Scores with `KEEP` for the first `sinks` positions and the newest `recent`, and -inf for empty slots.

    Args:
      scores: [B, 1 or H, S]. pos: [B, 1 or H, S]. last: Newest position of each row [B].
      recent: Newest tokens that stay: an int or [B].
    """
    first_recent = (last + 1 - recent)[:, None, None]
    scores = jnp.where((pos < sinks) | (pos >= first_recent), KEEP, scores)
    return jnp.where(pos == EMPTY, -jnp.inf, scores)
