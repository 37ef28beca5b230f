"""A layer's tokens in slots: the cache that grows, the ring of a sliding window, and what an evicting policy keeps.

Occupied slots are a prefix, in no particular order; each knows its token's position, and everything about a token (key,
value, position, mark) moves together. Writes beyond the last slot are dropped, never clamped.
"""

import dataclasses
import typing
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from kvjax.cache.codec import Codec, Plain
from kvjax.cache.layer import Layer
from kvjax.cache.types import EMPTY, LayerSpec, Tokens, static
from kvjax.kernels import Part, Tail, decode_attention, merge, mesh, write
from kvjax.kernels.parts import fold, visible

UNLIMITED = 2**30


def take_slots(leaf: Array, index: Array) -> Array:
    """leaf [B, H, S, ...] at slots index [B, 1 or H, N] -> [B, H, N, ...]; heads of one broadcast against many."""
    return write.gather(leaf, index)


def put_slots(leaf: Array, index: Array, value: Array | float, *, whole: bool = False) -> Array:
    """Writes value [B, H, T, ...] to slots index [B, 1 or H, T] of leaf; an index of S or more writes nothing."""
    shape = (*leaf.shape[:2], index.shape[2], *leaf.shape[3:])
    return write.put(leaf, index, jnp.broadcast_to(jnp.asarray(value, leaf.dtype), shape), whole=whole)


def in_tiles(slots: int, tile: int = 128) -> int:
    """So many slots, or up to 3 % more that make whole tiles of memory, or the largest part of a tile that allows it.

    Where tokens do not fill tiles XLA for TPUs puts heads on rows instead, and kernels would get copies.
    """
    part = min(tile, 1 << max(slots // 32, 1).bit_length() - 1)
    return -(-slots // part) * part


@typing.no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Slots(Layer):
    """One layer's keys and values, slot by slot.

    Attributes:
      k, v: As the codec writes them: pytrees of arrays [B, H, S, ...]; no v where `latent` says that keys hold it.
      pos: Token position of each slot [B, 1 or H, S] int32, `EMPTY` if none; one row for all heads where they
        keep the same tokens.
      marks: What a policy that evicts while decoding remembers of each slot, [B, 1 or H, S] float32, or None.
      limit: Tokens that each row keeps [B] int32 where old ones make way; None: `bound` for all rows.
      memo: What a policy remembers of the layer as a whole: a pytree of arrays [B, ...], or None.
      codec: How k and v are written.
      latent: Values are the last `latent` channels of the keys (`LayerSpec.latent`); 0: they are stored by themselves.
      bound: Slots that are ever needed, because old tokens make way; 0: the layer grows with every token. Fewer are
        allocated for a short prompt until `reserve` adds them.
      ring: Token p lies at slot `p % bound` (sinks apart), so the newest overwrites the oldest.
      sinks: First tokens of a ring that stay.
      shifted: Sinks move along with the window (StreamingLLM): a query at position i reads them as if it stood at its
        place inside the cache. Keys rotate relatively, so this equals rotating all keys anew.
    """

    k: Any
    v: Any
    pos: Array
    marks: Array | None = None
    limit: Array | None = None
    memo: Any = None
    codec: Codec = static(default=Plain())
    latent: int = static(default=0)
    bound: int = static(default=0)
    ring: bool = static(default=False)
    sinks: int = static(default=0)
    shifted: bool = static(default=False)

    @property
    def capacity(self) -> int:
        return self.pos.shape[-1]

    @property
    def heads(self) -> int:
        return jax.tree.leaves(self.k)[0].shape[1]

    @property
    def count(self) -> Array:
        """Tokens held per row and head, [B, 1 or H] int32."""
        return (self.pos != EMPTY).sum(-1, dtype=jnp.int32)

    @property
    def room(self) -> Array | None:
        """Tokens that still fit, [B] int32; None if old ones make way."""
        return None if 0 < self.bound <= self.capacity else self.capacity - self.count.max(-1)

    @property
    def kept(self) -> Array:
        """Tokens that each row keeps, [B] or [1] int32."""
        return jnp.asarray([self.bound], jnp.int32) if self.limit is None else self.limit

    def read(self, new: Tokens, spec: LayerSpec, shared: Any = None, *, logits: bool = False) -> Part:
        if self.ring and new.pos.shape[1] > 1:  # Every query sees other slots.
            return super().read(new, spec, shared, logits=logits)
        rest = self.ask(new, spec, logits=logits)
        return merge((self._ask_sinks(new, spec), rest)) if self.shifted else rest

    def read_both(self, new: Tokens, spec: LayerSpec, shared: Any = None, *, logits: bool = False) -> Part:
        if self.ring and new.pos.shape[1] > 1:
            return super().read_both(new, spec, shared, logits=logits)
        rest = self.ask(new, spec, tail=Tail(k=new.k, v=new.v, pos=new.pos[:, None]), logits=logits)
        return merge((self._ask_sinks(new, spec), rest)) if self.shifted else rest

    def ask(
        self,
        new: Tokens,
        spec: LayerSpec,
        *,
        tail: Tail | None = None,
        logits: bool = False,
        prefix: bool = True,
        older: bool = True,
    ) -> Part:
        """Attention over the slots (but for shifted sinks), and over a tail.

        Args:
          prefix: Occupied slots are one, so that nothing behind is read.
          older: All tokens in slots are older than the new ones, so that no mask is needed.
        """
        prefix, pos = prefix and not self.ring, None
        if spec.window or not (prefix and older):
            mask = self.sees(new.pos[:, None], self.pos, visible(new.pos[:, None], self.pos, spec.window))
            pos = jnp.where(mask.any(2), self.pos, EMPTY)
            if self.shifted:
                pos = jnp.where(jnp.arange(self.capacity) < self.sinks, EMPTY, pos)
        return decode_attention(
            new.q,
            self.k,
            None if self.latent else self.v,
            self.count if prefix else None,
            scale=spec.scale,
            q_pos=new.pos,
            pos=pos,
            window=spec.window,
            softcap=spec.softcap,
            tail=tail,
            latent=self.latent,
            logits=logits,
            implementation=spec.kernels,
        )

    def _turned(self, new: Tokens, spec: LayerSpec) -> Array:
        """Queries as shifted sinks see them [B, H * G, T, D]."""
        assert spec.rotate is not None
        return spec.rotate(spec.rope, new.q_raw, jnp.minimum(new.pos, self.kept[:, None] - 1))

    def _ask_sinks(self, new: Tokens, spec: LayerSpec) -> Part:
        """Attention over shifted sinks alone."""
        k, v, pos = (jax.tree.map(lambda leaf: leaf[:, :, : self.sinks], x) for x in (self.k, self.v, self.pos))
        return decode_attention(
            self._turned(new, spec),
            k,
            None if self.latent else v,
            scale=spec.scale,
            q_pos=new.pos,
            pos=pos,
            softcap=spec.softcap,
            latent=self.latent,
            implementation="xla",  # They are few.
        )

    def logits(self, new: Tokens, spec: LayerSpec) -> Array:
        logits = self.codec.dot(fold(new.q * spec.scale, self.heads), self.k)
        if not self.shifted:
            return logits
        q = self._turned(new, spec)
        first = jax.tree.map(lambda leaf: leaf[:, :, : self.sinks], self.k)
        return logits.at[..., : self.sinks].set(self.codec.dot(fold(q * spec.scale, self.heads), first))

    def mix(self, p: Array) -> Array:
        return self.codec.mix(p, self.k)[..., -self.latent :] if self.latent else self.codec.mix(p, self.v)

    def held(self, spec: LayerSpec) -> tuple[Array, Array, Array]:
        del spec
        k = self.codec.decode(self.k).astype(jnp.float32)
        v = k[..., -self.latent :] if self.latent else self.codec.decode(self.v).astype(jnp.float32)
        return jnp.broadcast_to(self.pos, k.shape[:3]), k, v

    def sees(self, q_pos: Array, k_pos: Array, mask: Array) -> Array:
        """Narrows a mask [..., T, S] to what the ring would still hold when each query comes."""
        if not self.ring:
            return mask
        q, k = q_pos[..., :, None], k_pos[..., None, :]
        return mask & ((q - k < (self.kept - self.sinks)[:, None, None, None]) | (k < self.sinks))

    def slots_for(self, pos: Array) -> Array:
        """Where new tokens at positions pos [B, T] go: [B, 1, T] or [B, H, T]; `capacity` (dropped) for padding."""
        pos = pos[:, None]
        if self.ring:
            recent = (self.kept - self.sinks)[:, None, None]
            slot = jnp.where(pos < self.sinks, pos, self.sinks + (pos - self.sinks) % recent)
            last = pos.max(-1, keepdims=True)
            keep = (pos > last - recent) | (pos < self.sinks)  # Of a long chunk only its end survives.
        else:
            slot = self.count[..., None] + jnp.arange(pos.shape[-1], dtype=jnp.int32)
            keep = True
        return jnp.where((pos != EMPTY) & keep, slot, self.capacity)

    def remember(self, marks: Array) -> "Slots":
        return dataclasses.replace(self, marks=marks)

    def manage(self, *, marks: Array, limit: Array, bound: int, memo: Any) -> "Slots":
        """The same layer, from now on within its budget: see the attributes."""
        return dataclasses.replace(self, marks=marks, limit=limit, bound=bound, memo=memo)

    def append(self, new: Tokens, marks: Array | None = None) -> "Slots":
        """Stores new tokens; where the layer keeps marks, a token without one gets 0."""
        return self.put(self.slots_for(new.pos), new.k, new.v, new.pos[:, None], marks)

    def put(self, slot: Array, k: Array, v: Array, pos: Array, marks: Array | None = None) -> "Slots":
        """Writes tokens k, v [B, H, T, D] at positions pos, and their marks, to slots [B, 1 or H, T]; a slot beyond the
        last is not written. Heads may be given different tokens."""
        old = {"k": self.k, "v": self.v, "pos": self.pos, "marks": self.marks}
        new = {"k": self.codec.encode(k), "v": None, "pos": jnp.broadcast_to(pos, slot.shape), "marks": None}
        if not self.latent:
            new["v"] = self.codec.encode(v)
        if self.marks is not None:
            new["marks"] = jnp.broadcast_to(0.0 if marks is None else marks, (*self.marks.shape[:2], slot.shape[2]))
        return dataclasses.replace(self, **write.put(old, slot, new))

    def keep(self, index: Array, valid: Array) -> "Slots":
        """Only the slots index [B, 1 or H, N], in that order, where valid [B, 1 or H, N]; the capacity becomes N."""
        take = lambda leaf: take_slots(leaf, index)  # noqa: E731
        pos = jnp.where(valid, take(self.pos), EMPTY)
        return dataclasses.replace(
            self,
            k=jax.tree.map(take, self.k),
            v=jax.tree.map(take, self.v),
            pos=pos,
            marks=None if self.marks is None else take(self.marks),
        )

    def drop(self, slot: Array, where: Array) -> "Slots":
        """Removes slot [B, 1 or H] where asked [B, 1 or H]: the last occupied one moves into its place."""
        last = (self.count - 1)[..., None]
        old = {"k": self.k, "v": self.v, "pos": self.pos, "marks": self.marks}
        target = jnp.where(where, slot, self.capacity)[..., None]
        new = write.put(old, target, write.take(old, last))
        gone = where[..., None] & (jnp.arange(self.capacity) == last)
        return dataclasses.replace(self, **new | {"pos": jnp.where(gone, EMPTY, new["pos"])})

    def reserve(self, slots: int) -> "Slots":
        wanted = self.capacity + slots
        wanted, parts = min(wanted, self.bound) if self.bound else wanted, mesh.shares(self.heads)
        return self.resize(parts * in_tiles(-(-wanted // parts)))

    def even(self) -> "Slots":
        return self.resize(mesh.even(self.capacity, self.heads))

    def resize(self, capacity: int) -> "Slots":
        """More (empty) slots; never fewer."""
        extra = max(capacity - self.capacity, 0)
        if not extra:
            return self

        def pad(leaf, value=0):
            return jnp.pad(leaf, ((0, 0), (0, 0), (0, extra)) + ((0, 0),) * (leaf.ndim - 3), constant_values=value)

        return dataclasses.replace(
            self,
            k=jax.tree.map(pad, self.k),
            v=jax.tree.map(pad, self.v),
            pos=pad(self.pos, EMPTY),
            marks=None if self.marks is None else pad(self.marks),
        )


def make_ring(
    k: Array,
    v: Array,
    pos: Array,
    size: int,
    *,
    limit: Array | None = None,
    sinks: int = 0,
    shifted: bool = False,
    codec: Codec = Plain(),  # noqa: B008  A hashable constant.
    latent: int = 0,
) -> Slots:
    """The ring that holds the end (and the first `sinks` tokens) of a prompt.

    Args:
      k, v: [B, H, T, D]. pos: [B, T] int32: 0, 1, ... and `EMPTY` for padding at the end.
      size: Slots of the ring; a shorter prompt gets as many as it has tokens.
      limit: Tokens per row [B], at most `size`, where rows differ.
      sinks, shifted, codec, latent: See `Slots`.
    """
    slot = jnp.arange(min(size, pos.shape[-1]), dtype=jnp.int32)
    recent = (size if limit is None else limit[:, None]) - sinks
    last = pos.max(-1, keepdims=True)
    held = jnp.where(slot < sinks, slot, last - (last - slot) % recent)  # The latest token of each slot.
    missing = (held > last) | (slot >= sinks + recent) | ((slot >= sinks) & (held < sinks))
    held = jnp.where(missing, EMPTY, held)[:, None]
    k, v = (codec.encode(take_slots(x, jnp.maximum(held, 0))) for x in (k, v))
    return Slots(
        k=k,
        v=None if latent else v,
        pos=held,
        limit=limit,
        codec=codec,
        latent=latent,
        bound=size,
        ring=True,
        sinks=sinks,
        shifted=shifted,
    )
