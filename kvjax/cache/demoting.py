"""Two precisions in one layer: a token that a policy gives up moves to fewer bits instead of being forgotten."""

import dataclasses
import typing
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from kvjax.cache.layer import Layer
from kvjax.cache.slots import Slots
from kvjax.cache.tiers import Through, side_by_side
from kvjax.cache.types import LayerSpec, Tokens
from kvjax.kernels import write
from kvjax.kernels.parts import Part, merge


@typing.no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Demoting(Layer):
    """[the low tier | the high tier], slot by slot; to a policy that evicts, only the high tier's tokens are there.

    Attributes:
      low: Tokens that were given up, in few bits, their keys seen through a lens.
      high: The others; new tokens come here.
    """

    low: Through
    high: Slots

    @property
    def pos(self) -> Array:
        return side_by_side([self.low.pos, self.high.pos])

    @property
    def marks(self) -> Array | None:
        """Those of the low tier are infinite: nothing there can be given up."""
        if self.high.marks is None:
            return None
        heads, slots = self.high.marks.shape[1], self.low.pos.shape[-1]
        low = jnp.full((self.high.marks.shape[0], heads, slots), jnp.inf, jnp.float32)
        return jnp.concatenate([low, self.high.marks], -1)

    @property
    def count(self) -> Array:
        """Tokens in the high tier, [B, 1 or H] int32."""
        return self.high.count

    @property
    def kept(self) -> Array:
        """Tokens that each row keeps in the high tier, [B] or [1] int32."""
        return self.high.kept

    @property
    def room(self) -> Array | None:
        """A token that comes pushes another into the low tier, once the high one is full."""
        if self.high.marks is None:
            return self.high.room
        low = self.low.inner.capacity - self.low.inner.count.max(-1)
        free = low + jnp.maximum(self.high.kept - self.high.count.max(-1), 0)
        return free if self.high.room is None else jnp.minimum(free, self.high.room)

    def held(self, spec: LayerSpec) -> tuple[Array, Array, Array]:
        pos, k, v = zip(self.low.held(spec), self.high.held(spec), strict=True)
        return jnp.concatenate(pos, 2), jnp.concatenate(k, 2), jnp.concatenate(v, 2)

    def read(self, new: Tokens, spec: LayerSpec, shared: Any = None, *, logits: bool = False) -> Part:
        return merge([tier.read(new, spec, shared, logits=logits) for tier in (self.low, self.high)])

    def read_both(self, new: Tokens, spec: LayerSpec, shared: Any = None, *, logits: bool = False) -> Part:
        low = self.low.read(new, spec, shared, logits=logits)
        return merge([low, self.high.read_both(new, spec, shared, logits=logits)])

    def append(self, new: Tokens, marks: Array | None = None) -> "Demoting":
        return dataclasses.replace(self, high=self.high.append(new, marks))

    def remember(self, marks: Array) -> "Demoting":
        return dataclasses.replace(self, high=self.high.remember(marks[..., self.low.pos.shape[-1] :]))

    def manage(self, **what: Any) -> "Demoting":
        """As `Slots.manage`, of the high tier."""
        return dataclasses.replace(self, high=self.high.manage(**what))

    def drop(self, slot: Array, where: Array) -> "Demoting":
        """Moves the token at slot [B, 1 or H], counted as in `pos`, from the high tier to the low one, where asked."""
        slot = jnp.where(where, slot - self.low.pos.shape[-1], 0)
        index, low = slot[..., None], self.low.inner
        *moved, pos = write.take((self.high.k, self.high.v, self.high.pos), index)
        k, v = (self.high.codec.decode(x) for x in moved)
        place = jnp.where(where, low.count, low.capacity)[..., None]
        low = low.put(place, self.low.lens.keys(k), v, pos)
        return Demoting(low=dataclasses.replace(self.low, inner=low), high=self.high.drop(slot, where))

    def reserve(self, slots: int) -> "Demoting":
        if self.high.marks is None:  # Nothing moves any more.
            return dataclasses.replace(self, high=self.high.reserve(slots))
        return Demoting(low=self.low.reserve(slots), high=self.high.reserve(slots))
