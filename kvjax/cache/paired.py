"""Two layers that share a store: one direction per token, and each layer's own magnitudes (MiniCache).

Of every token the store holds the direction that its keys (and its values) have in both layers, on the great circle
between the two; each layer holds their lengths. The tokens whose directions lie furthest apart are kept by both layers
as they are. Rotary embedding turns a token's keys of both layers by the same angles, so rotated keys merge as unrotated
ones do.

The lower layer owns the store and lends it to the upper one within a pass. A new token waits in both layers until both
have seen it; then it is merged too.
"""

import dataclasses
import typing
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from kvjax.cache.codec import Codec, Plain
from kvjax.cache.layer import Layer
from kvjax.cache.slots import Slots, put_slots, take_slots
from kvjax.cache.types import EMPTY, LayerSpec, Tokens, static
from kvjax.kernels import mesh
from kvjax.kernels.parts import Part, attend_part, fold, visible


def polar(x: Array) -> tuple[Array, Array]:
    """Length [...] and direction [..., D] of vectors x [..., D], float32; the direction of a zero vector is zero."""
    x = x.astype(jnp.float32)
    norm = jnp.sqrt(jnp.square(x).sum(-1))
    return norm, x / jnp.where(norm > 0, norm, 1.0)[..., None]


def angles(lower: Array, upper: Array) -> Array:
    """Angle between directions [..., D] in radians [...]; exact for small ones too, unlike the arc cosine."""
    apart, together = (jnp.sqrt(jnp.square(x).sum(-1)) for x in (lower - upper, lower + upper))
    return 2 * jnp.arctan2(apart, together)


def slerp(lower: Array, upper: Array, t: float) -> Array:
    """Directions [..., D] at the share t of the way from `lower` to `upper`; parallel ones stay as they are."""
    angle = angles(lower, upper)[..., None]
    sine = jnp.sin(angle)
    bent = sine > 1e-6
    divisor = jnp.where(bent, sine, 1.0)
    return jnp.where(bent, (jnp.sin((1 - t) * angle) * lower + jnp.sin(t * angle) * upper) / divisor, lower)


@typing.no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Own:
    """What one layer has of its keys, or of its values, for itself.

    Attributes:
      norm: Lengths [B, H, S], in the model's dtype.
      kept: Retained vectors as the codec writes them, [B, H, R, ...].
      new: The token that is not merged yet [B, H, 1, D], in the model's dtype.
    """

    norm: Array
    kept: Any
    new: Array


@typing.no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Store:
    """What both layers of a pair use.

    Attributes:
      k, v: Directions as the codec writes them, [B, H, S, ...].
      k_slot, v_slot: Slots of the retained keys and values [B, H, R] int32, `EMPTY` where fewer are.
    """

    k: Any
    v: Any
    k_slot: Array
    v_slot: Array


@typing.no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Paired(Layer):
    """One of two layers that share a store.

    Attributes:
      pos: Token position of each slot [B, 1, S] int32, `EMPTY` if none. Occupied slots are a prefix.
      new_pos: Position of the token that is not merged yet [B, 1, 1] int32, `EMPTY` if there is none.
      k, v: This layer's own.
      store: The lower layer's; None in the upper one, which borrows it.
      codec: How directions and retained vectors are written.
    """

    pos: Array
    new_pos: Array
    k: Own
    v: Own
    store: Store | None
    codec: Codec = static(default=Plain())

    @property
    def capacity(self) -> int:
        return self.pos.shape[-1]

    @property
    def count(self) -> Array:
        """Tokens that are merged, per row [B] int32."""
        return (self.pos != EMPTY).sum((1, 2), dtype=jnp.int32)

    @property
    def room(self) -> Array:
        return self.capacity - self.count

    def _store(self, lent: Store | None) -> Store:
        store = lent if self.store is None else self.store
        if store is None:
            raise ValueError("The upper layer of a pair reads the store of the lower one, which has not lent it.")
        return store

    def held(self, spec: LayerSpec) -> tuple[Array, Array, Array]:
        """Merged tokens as this layer restores them; the upper layer needs the store for that (`with_store`)."""
        del spec
        store = self._store(None)

        def restored(codes: Any, slot: Array, own: Own) -> Array:
            x = self.codec.decode(codes).astype(jnp.float32) * own.norm[..., None].astype(jnp.float32)
            return put_slots(x, self._at(slot), self.codec.decode(own.kept))

        k, v = restored(store.k, store.k_slot, self.k), restored(store.v, store.v_slot, self.v)
        return jnp.broadcast_to(self.pos, k.shape[:3]), k, v

    def with_store(self, store: Store) -> "Paired":
        """The same layer with a store of its own."""
        return dataclasses.replace(self, store=store)

    def _at(self, slot: Array) -> Array:
        """Retained slots, those that are unused beyond the last one, where writes are dropped."""
        return jnp.where(slot == EMPTY, self.capacity, slot)

    def read(self, new: Tokens, spec: LayerSpec, shared: Any = None, *, logits: bool = False) -> Part:
        del logits
        store = self._store(shared)
        q = fold(new.q * spec.scale, self.k.norm.shape[1])
        products = self.codec.dot(q, store.k) * self.k.norm[:, :, None].astype(jnp.float32)
        products = put_columns(products, self._at(store.k_slot), self.codec.dot(q, self.k.kept))

        def mix(p: Array) -> Array:
            slot = self._at(store.v_slot)
            kept = jnp.take_along_axis(p, jnp.minimum(slot, self.capacity - 1)[:, :, None], -1)
            kept = jnp.where(store.v_slot[:, :, None] == EMPTY, 0.0, kept)
            merged = put_columns(p * self.v.norm[:, :, None].astype(jnp.float32), slot, jnp.zeros_like(kept))
            return self.codec.mix(merged, store.v) + self.codec.mix(kept, self.v.kept)

        return attend_part(products, visible(new.pos[:, None], self.pos, spec.window), mix, spec.softcap)

    def attend(self, new: Tokens, spec: LayerSpec, shared: Any = None, mark: Any = None) -> tuple[Array, "Paired", Any]:
        out, layer, _ = super().attend(new, spec, shared, mark)
        return out, layer, self.store  # What the lower layer lends, the upper one has no more need to.

    def append(self, new: Tokens, marks: Array | None = None) -> "Paired":
        del marks
        if new.pos.shape[1] != 1:
            raise ValueError(f"A pair of layers takes one token at a time and merges it; got {new.pos.shape[1]}.")
        k, v = dataclasses.replace(self.k, new=new.k), dataclasses.replace(self.v, new=new.v)
        return dataclasses.replace(self, k=k, v=v, new_pos=new.pos[:, None])

    def reserve(self, slots: int) -> "Paired":
        return self._resize(self.pos.shape[-1] + slots)

    def even(self) -> "Paired":
        return self._resize(self.pos.shape[-1])

    def _resize(self, capacity: int) -> "Paired":
        """At least so many slots, which divide over the mesh in use."""
        slots = mesh.even(capacity, self.k.norm.shape[1]) - self.pos.shape[-1]

        def pad(leaf: Array, value: int = 0) -> Array:
            return jnp.pad(leaf, ((0, 0), (0, 0), (0, slots)) + ((0, 0),) * (leaf.ndim - 3), constant_values=value)

        k, v = (dataclasses.replace(own, norm=pad(own.norm)) for own in (self.k, self.v))
        store = self.store
        if store is not None:
            store = dataclasses.replace(store, k=jax.tree.map(pad, store.k), v=jax.tree.map(pad, store.v))
        return dataclasses.replace(self, pos=pad(self.pos, EMPTY), k=k, v=v, store=store)


def put_columns(x: Array, index: Array, value: Array) -> Array:
    """Writes value [B, H, N, R] to columns index [B, H, R] of x [B, H, N, S]; an index of S writes nothing."""
    one = lambda x, index, value: x.at[:, index].set(value, mode="drop")  # noqa: E731
    return jax.vmap(jax.vmap(one))(x, index, value)


def retained(angle: Array, there: Array, gamma: float, limit: Array, capacity: int) -> Array:
    """Slots of the tokens that are too different to be merged, [B, H, capacity] int32, `EMPTY` where fewer are.

    Args:
      angle: Between a token's two directions [B, H, S], radians. there: Which slots hold one [B, 1, S] bool.
      gamma: Angles this share of their range, over all heads of a row, below the largest are too different.
      limit: At most so many per row and head [B] int32, the most different first.
    """
    low = jnp.where(there, angle, jnp.inf).min((1, 2), keepdims=True)
    high = jnp.where(there, angle, -jnp.inf).max((1, 2), keepdims=True)
    distinct = there & (angle > high - gamma * (high - low))
    best, slot = lax.top_k(jnp.where(distinct, angle, -1.0), capacity)
    return jnp.where((best >= 0) & (jnp.arange(capacity) < limit[:, None, None]), slot, EMPTY)


def make_pair(
    lower: Slots, upper: Slots, *, t: float, gamma: float, most: float, codec: Codec
) -> tuple[Paired, Paired]:
    """Merges two layers that hold the same tokens in the same slots, in full precision.

    Args:
      lower, upper: The layers, keys and values plain.
      t: Where merged directions lie between the lower layer's (0) and the upper one's (1).
      gamma: See `retained`.
      most: Share of a row's tokens that are retained at most, in each head.
      codec: How the result is written.
    """
    there = lower.pos != EMPTY
    count = there.sum((1, 2))
    capacity = int(most * there.shape[-1] + 1e-3)
    limit = jnp.floor(most * count + 1e-3).astype(jnp.int32)

    def merge(low: Array, high: Array) -> tuple[Any, Array, Own, Own]:
        (low_norm, low_unit), (high_norm, high_unit) = polar(low), polar(high)
        slot = retained(angles(low_unit, high_unit), there, gamma, limit, capacity)

        def own(x: Array, norm: Array) -> Own:
            kept = jnp.where((slot == EMPTY)[..., None], 0, take_slots(x, jnp.maximum(slot, 0)))
            return Own(norm=norm.astype(x.dtype), kept=codec.encode(kept), new=jnp.zeros_like(x[:, :, :1]))

        direction = slerp(low_unit, high_unit, t).astype(low.dtype)
        return codec.encode(direction), slot, own(low, low_norm), own(high, high_norm)

    k, k_slot, low_k, high_k = merge(lower.k, upper.k)
    v, v_slot, low_v, high_v = merge(lower.v, upper.v)
    store = Store(k=k, v=v, k_slot=k_slot, v_slot=v_slot)
    waiting = jnp.full((*there.shape[:2], 1), EMPTY, jnp.int32)
    return (
        Paired(pos=lower.pos, new_pos=waiting, k=low_k, v=low_v, store=store, codec=codec),
        Paired(pos=upper.pos, new_pos=waiting, k=high_k, v=high_v, store=None, codec=codec),
    )


def merge_new(lower: Paired, upper: Paired, t: float) -> tuple[Paired, Paired]:
    """The pair once the token that waits in both layers is merged; none is retained. What does not fit is dropped."""
    slot = jnp.where(lower.new_pos != EMPTY, lower.count[:, None, None], lower.capacity)

    def merge(low: Own, high: Own, codes: Any) -> tuple[Own, Own, Any]:
        (low_norm, low_unit), (high_norm, high_unit) = polar(low.new), polar(high.new)
        direction = lower.codec.encode(slerp(low_unit, high_unit, t).astype(low.new.dtype))
        codes = jax.tree.map(lambda leaf, value: put_slots(leaf, slot, value), codes, direction)
        low = dataclasses.replace(low, norm=put_slots(low.norm, slot, low_norm))
        return low, dataclasses.replace(high, norm=put_slots(high.norm, slot, high_norm)), codes

    assert lower.store is not None
    low_k, high_k, k = merge(lower.k, upper.k, lower.store.k)
    low_v, high_v, v = merge(lower.v, upper.v, lower.store.v)
    pos, waiting = put_slots(lower.pos, slot, lower.new_pos), jnp.full_like(lower.new_pos, EMPTY)
    store = dataclasses.replace(lower.store, k=k, v=v)
    return (
        dataclasses.replace(lower, pos=pos, new_pos=waiting, k=low_k, v=low_v, store=store),
        dataclasses.replace(upper, pos=pos, new_pos=waiting, k=high_k, v=high_v),
    )
