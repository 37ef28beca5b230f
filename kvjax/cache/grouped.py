"""KIVI's layout: groups of tokens packed to 2, 4 or 8 bits, with the most recent tokens in full precision.

Keys are quantized per channel, over `group` consecutive tokens: a key channel keeps its size over many tokens, so
outlier channels get scales of their own. Values are quantized per token, over `group` consecutive channels. A residual
of R tokens stays as it is: keys until R of them are together and are quantized at once, values until R newer ones have
come (Liu et al., KIVI, arXiv 2402.02750, section 3 and algorithm 1).

Tokens lie in the order they were appended. With n tokens held, keys of the first `n - n % R` and values of the
first `n - R` are packed; the rest stand in the residual, token t at slot `t % R`.
"""

import dataclasses
import typing

import jax
import jax.numpy as jnp
from jax import Array, lax

from kvjax.cache.layer import Layer
from kvjax.cache.slots import put_slots, take_slots
from kvjax.cache.types import EMPTY, LayerSpec, Tokens, static
from kvjax.kernels.packing import expand, pack, round_to_nearest, unpack
from kvjax.kernels.parts import dot_keys, dot_values, fold


@typing.no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Packs:
    """Packed vectors: `x ~ code * scale + zero`.

    Attributes:
      words: int32; keys [B, H, S / per, D] (packed along tokens), values [B, H, S, D / per] (along channels).
      scale, zero: Keys [B, H, S / group, D], values [B, H, S, D / group].
      axis: The axis that is packed and grouped: -2 for keys, -1 for values.
    """

    words: Array
    scale: Array
    zero: Array
    bits: int = static()
    group: int = static()
    axis: int = static()

    def decode(self) -> Array:
        """[B, H, S, D] float32."""
        scale, zero = (expand(x.astype(jnp.float32), self.group, self.axis) for x in (self.scale, self.zero))
        return unpack(self.words, self.bits, self.axis).astype(jnp.float32) * scale + zero

    @property
    def tokens_per_entry(self) -> dict[str, int]:
        """How many tokens share one entry of each leaf's third axis."""
        groups = (32 // self.bits, self.group) if self.axis == -2 else (1, 1)
        return {"words": groups[0], "scale": groups[1], "zero": groups[1]}

    def put(self, token: Array, new: "Packs") -> "Packs":
        """Overwrites tokens from token [B, 1, 1] on with new ones; beyond the end nothing is written."""

        def write(name, tokens):
            value = getattr(new, name)
            index = token // tokens + jnp.arange(value.shape[2], dtype=jnp.int32)
            return put_slots(getattr(self, name), index, value)

        return dataclasses.replace(self, **{name: write(name, n) for name, n in self.tokens_per_entry.items()})

    def resize(self, tokens: int) -> "Packs":
        """Room for so many tokens in all."""

        def pad(leaf, per_entry):
            return jnp.pad(leaf, ((0, 0), (0, 0), (0, tokens // per_entry - leaf.shape[2]), (0, 0)))

        leaves = {name: pad(getattr(self, name), n) for name, n in self.tokens_per_entry.items()}
        return dataclasses.replace(self, **leaves)


def pack_vectors(x: Array, bits: int, group: int, axis: int, scale_dtype: str) -> Packs:
    """x [B, H, S, D] in groups along axis (-2 tokens, -1 channels)."""
    codes, scale, zero = round_to_nearest(x, bits, group, axis, jnp.dtype(scale_dtype))
    return Packs(words=pack(codes, bits, axis), scale=scale, zero=zero, bits=bits, group=group, axis=axis)


@typing.no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupedSlots(Layer):
    """One layer in KIVI's layout.

    Attributes:
      k, v: Packed tokens; capacity S, a multiple of the residual.
      k_recent, v_recent: The residual [B, H, R, D], in the model's dtype.
      order: Position of every token, in the order of arrival [B, 1 or H, S + R] int32, `EMPTY` where there is none.
    """

    k: Packs
    v: Packs
    k_recent: Array
    v_recent: Array
    order: Array

    @property
    def residual(self) -> int:
        return self.k_recent.shape[2]

    @property
    def packed_capacity(self) -> int:
        return self.order.shape[-1] - self.residual

    @property
    def count(self) -> Array:
        """Tokens held per row [B] int32; all heads hold the same number."""
        return (self.order[:, 0] != EMPTY).sum(-1, dtype=jnp.int32)

    @property
    def capacity(self) -> int:
        """Tokens that fit. The last place stays free: it would complete a residual with nowhere to be packed."""
        return self.order.shape[-1] - 1

    @property
    def room(self) -> Array:
        return self.capacity - self.count

    def _recent_tokens(self) -> tuple[Array, Array]:
        """Tokens (by order) in the residual of keys: [B, 1, R]; and how many keys are packed: [B, 1, 1]."""
        packed = (self.count - self.count % self.residual)[:, None, None]
        return packed + jnp.arange(self.residual, dtype=jnp.int32), packed

    @property
    def pos(self) -> Array:
        """Of [packed slots | residual slots], as `logits` has them."""
        recent, packed = self._recent_tokens()
        order = self.order[..., : self.packed_capacity]
        held = jnp.arange(self.packed_capacity, dtype=jnp.int32) < packed
        tail = take_slots(self.order, jnp.minimum(recent, self.order.shape[-1] - 1))
        tail = jnp.where(recent < self.order.shape[-1], tail, EMPTY)
        return jnp.concatenate([jnp.where(held, order, EMPTY), tail], -1)

    def logits(self, new: Tokens, spec: LayerSpec) -> Array:
        q = fold(new.q * spec.scale, self.k_recent.shape[1])
        return jnp.concatenate([dot_keys(q, self.k.decode().astype(q.dtype)), dot_keys(q, self.k_recent)], -1)

    def mix(self, p: Array) -> Array:
        """Keys and values part at different tokens: weights of the last R are gathered for the values' residual."""
        size, residual, count = self.packed_capacity, self.residual, self.count[:, None, None]
        _, packed = self._recent_tokens()
        slot = jnp.arange(residual, dtype=jnp.int32)
        token = count - 1 - (count - 1 - slot) % residual  # The last token at each residual slot, [B, 1, R].
        where = jnp.where(token < packed, token, size + token - packed)
        recent = jnp.take_along_axis(p, jnp.broadcast_to(where[:, :, None], (*p.shape[:3], residual)) % p.shape[-1], -1)
        recent = jnp.where((token >= 0)[:, :, None], recent, 0.0)
        old = jnp.where((jnp.arange(size) < count - residual)[:, :, None], p[..., :size], 0.0)
        return dot_values(old, self.v.decode()) + dot_values(recent, self.v_recent.astype(p.dtype))

    def held(self, spec: LayerSpec) -> tuple[Array, Array, Array]:
        del spec
        k = jnp.concatenate([self.k.decode(), self.k_recent.astype(jnp.float32)], 2)
        slots, heads = self.pos.shape[-1], k.shape[1]
        # Keys and values part at different tokens: `mix` knows which value belongs to which slot.
        v = self.mix(jnp.broadcast_to(jnp.eye(slots), (k.shape[0], heads, slots, slots)))
        return jnp.broadcast_to(self.pos, k.shape[:3]), k, v

    def append(self, new: Tokens, marks: Array | None = None) -> "GroupedSlots":
        def one(layer, token):
            return layer._append_one(*token), None

        tokens = (jnp.moveaxis(new.k, 2, 0)[:, :, :, None], jnp.moveaxis(new.v, 2, 0)[:, :, :, None], new.pos.T)
        if new.pos.shape[1] == 1:
            return self._append_one(*(x[0] for x in tokens))
        return lax.scan(one, self, tokens)[0]

    def _append_one(self, k: Array, v: Array, pos: Array) -> "GroupedSlots":
        """k, v [B, H, 1, D], pos [B]; a row with `EMPTY` stays as it is."""
        residual, beyond = self.residual, self.order.shape[-1]
        fits = (pos != EMPTY) & (self.count < self.capacity)
        n = jnp.where(fits, self.count, beyond)[:, None, None]  # Order of the new token, [B, 1, 1].
        slot = jnp.where(fits[:, None, None], n % residual, residual)

        # The value that leaves the residual is packed first: the new one takes its slot.
        leaving = take_slots(self.v_recent, jnp.minimum(slot, residual - 1))
        target = jnp.where(fits[:, None, None] & (n >= residual), n - residual, self.packed_capacity)
        old = pack_vectors(leaving, self.v.bits, self.v.group, -1, self.v.scale.dtype.name)
        layer = dataclasses.replace(
            self,
            v=self.v.put(target, old),
            k_recent=put_slots(self.k_recent, slot, k),
            v_recent=put_slots(self.v_recent, slot, v),
            order=put_slots(self.order, n, jnp.broadcast_to(pos[:, None, None], (*self.order.shape[:2], 1))),
        )
        full = fits & ((self.count + 1) % residual == 0)  # Rows whose residual of keys is complete.

        def flush(layer):
            start = jnp.where(full, self.count + 1 - residual, layer.packed_capacity)[:, None, None]
            keys = pack_vectors(layer.k_recent, layer.k.bits, layer.k.group, -2, layer.k.scale.dtype.name)
            return dataclasses.replace(layer, k=layer.k.put(start, keys))

        return lax.cond(full.any(), flush, lambda layer: layer, layer)

    def reserve(self, slots: int) -> "GroupedSlots":
        tokens = self.packed_capacity + -(-slots // self.residual) * self.residual
        extra = tokens - self.packed_capacity
        order = jnp.pad(self.order, ((0, 0), (0, 0), (0, extra)), constant_values=EMPTY)
        return dataclasses.replace(self, k=self.k.resize(tokens), v=self.v.resize(tokens), order=order)


def make_grouped(
    k: Array, v: Array, pos: Array, *, bits: int, group: int, residual: int, scale_dtype: str = "float16"
) -> GroupedSlots:
    """Packs a prompt's tokens.

    Args:
      k, v: [B, H, N, D], tokens in order. pos: [B, 1 or H, N] int32, `EMPTY` at the end of shorter rows.
      bits, group, residual: As in KIVI; residual is a multiple of group, group divides D.
    """
    n = pos.shape[-1]
    size = n - n % residual
    count = (pos[:, 0] != EMPTY).sum(-1, dtype=jnp.int32)[:, None, None]
    slot = jnp.arange(residual, dtype=jnp.int32)
    k_token = jnp.clip(count - count % residual + slot, 0, n - 1)
    v_token = jnp.clip(count - 1 - (count - 1 - slot) % residual, 0, n - 1)
    return GroupedSlots(
        k=pack_vectors(k[:, :, :size], bits, group, -2, scale_dtype),
        v=pack_vectors(v[:, :, :size], bits, group, -1, scale_dtype),
        k_recent=take_slots(k, k_token),
        v_recent=take_slots(v, v_token),
        order=jnp.pad(pos, ((0, 0), (0, 0), (0, size + residual - n)), constant_values=EMPTY),
    )
