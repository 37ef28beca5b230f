"""KIVI's layout: groups of tokens packed to 2, 4 or 8 bits, with the most recent tokens in full precision.

Keys are quantized per channel, over `group` consecutive tokens: a key channel keeps its size over many tokens, so
outlier channels get scales of their own. Values are quantized per token, over `group` consecutive channels. A residual
of R tokens stays as it is: keys until R of them are together and are quantized at once, values until R newer ones have
come (Liu et al., KIVI, arXiv 2402.02750, section 3 and algorithm 1).

Tokens lie in the order they were appended. With n tokens held, keys of the first `n - n % R` and values of the first
`n - R` are packed; the rest stand in the residual, token t at slot `t % R`. Words hold codes along channels, whatever
the groups (the authors pack keys along tokens): the same bytes, and one order for all kernels.
"""

import dataclasses
import typing
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from kvjax.cache.codec import pack_vectors
from kvjax.cache.layer import Layer
from kvjax.cache.slots import in_tiles, put_slots, take_slots
from kvjax.cache.types import EMPTY, LayerSpec, Tokens, static
from kvjax.kernels import Part, Tail, Vectors, decode_attention, mesh, write


def put_vectors(old: Vectors, token: Array, new: Vectors) -> Vectors:
    """Overwrites tokens from token [B] on with new ones, whole groups; what would reach beyond is not written."""
    if not old.slots:
        return old
    start = jax.tree.map(lambda leaf: token // (old.slots // leaf.shape[2]), old)
    return write.put_block(old, start, new)


@typing.no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupedSlots(Layer):
    """One layer in KIVI's layout.

    Attributes:
      k, v: Packed tokens; capacity S, a multiple of the residual. Scales and zeros of keys [B, H, S / group, D], of
        values [B, H, S, D / group].
      k_recent, v_recent: The residual [B, H, R, D], in the model's dtype.
      order: Position of every token, in the order of arrival [B, 1 or H, S + R] int32, `EMPTY` where there is none.
      group: Tokens (keys) or channels (values) that share a scale.
    """

    k: Vectors
    v: Vectors
    k_recent: Array
    v_recent: Array
    order: Array
    group: int = static()

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

    @property
    def old(self) -> Array:
        """Tokens whose keys and values are both packed, per row [B] int32; the rest are the residual's."""
        return jnp.maximum(self.count - self.residual, 0)

    @property
    def pos(self) -> Array:
        """Of [packed slots | residual slots]."""
        order = self.order[..., : self.packed_capacity]
        packed = jnp.arange(self.packed_capacity, dtype=jnp.int32) < self.old[:, None, None]
        return jnp.concatenate([jnp.where(packed, order, EMPTY), self._recent_pos()], -1)

    def _recent_tokens(self) -> Array:
        """The token at each slot of the residual, by its order [B, 1, R] int32; negative where there is none."""
        last, slot = self.count[:, None, None] - 1, jnp.arange(self.residual, dtype=jnp.int32)
        return last - (last - slot) % self.residual

    def _recent_pos(self) -> Array:
        token = self._recent_tokens()
        return jnp.where(token >= 0, take_slots(self.order, jnp.maximum(token, 0)), EMPTY)

    def _recent_keys(self) -> Array:
        """Keys of the residual's tokens [B, H, R, D]: the last group of R that is packed still holds the older ones."""
        if not self.packed_capacity:
            return self.k_recent
        token, residual = self._recent_tokens(), self.residual
        packed = (self.count - self.count % residual)[:, None, None]
        start = jnp.maximum(packed[:, 0, 0] - residual, 0)

        def cut(leaf: Array) -> Array:
            tokens = self.packed_capacity // leaf.shape[2]
            return write.take_block(leaf, start // tokens, residual // tokens)

        block = jax.tree.map(cut, self.k).decode().astype(self.k_recent.dtype)
        return jnp.where((token < packed)[..., None], block, self.k_recent)

    def _tail(self) -> Tail:
        return Tail(k=self._recent_keys(), v=self.v_recent, pos=self._recent_pos())

    def read(self, new: Tokens, spec: LayerSpec, shared: Any = None, *, logits: bool = False) -> Part:
        return self._ask(new, spec, self._tail(), logits)

    def read_both(self, new: Tokens, spec: LayerSpec, shared: Any = None, *, logits: bool = False) -> Part:
        own = Tail(k=new.k, v=new.v, pos=jnp.broadcast_to(new.pos[:, None], (*self.order.shape[:2], new.pos.shape[1])))
        tail = jax.tree.map(lambda old, new: jnp.concatenate([old, new.astype(old.dtype)], 2), self._tail(), own)
        return self._ask(new, spec, tail, logits)

    def _ask(self, new: Tokens, spec: LayerSpec, tail: Tail, logits: bool) -> Part:
        return decode_attention(
            new.q,
            self.k,
            self.v,
            self.old,
            scale=spec.scale,
            q_pos=new.pos,
            pos=self.order[..., : self.packed_capacity] if spec.window else None,
            window=spec.window,
            softcap=spec.softcap,
            tail=tail,
            logits=logits,
            implementation=spec.kernels,
        )

    def held(self, spec: LayerSpec) -> tuple[Array, Array, Array]:
        del spec
        k = jnp.concatenate([self.k.decode(), self._recent_keys().astype(jnp.float32)], 2)
        v = jnp.concatenate([self.v.decode(), self.v_recent.astype(jnp.float32)], 2)
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
        leaving = write.take(self.v_recent, slot, whole=True)
        target = jnp.where(fits[:, None, None] & (n >= residual), n - residual, self.packed_capacity)
        assert self.k.scale is not None and self.v.scale is not None
        old = pack_vectors(leaving, self.v.bits, self.group, -1, self.v.scale.dtype.name)
        layer = dataclasses.replace(
            self,
            v=put_vectors(self.v, target[:, 0, 0], old),
            k_recent=put_slots(self.k_recent, slot, k, whole=True),
            v_recent=put_slots(self.v_recent, slot, v, whole=True),
            order=put_slots(self.order, n, pos[:, None, None]),
        )
        full = fits & ((self.count + 1) % residual == 0)  # Rows whose residual of keys is complete.

        def flush(layer):
            start = jnp.where(full, self.count + 1 - residual, layer.packed_capacity)
            keys = pack_vectors(layer.k_recent, layer.k.bits, layer.group, -2, layer.k.scale.dtype.name)
            return dataclasses.replace(layer, k=put_vectors(layer.k, start, keys))

        return write.when(full.any(), flush, layer)

    def reserve(self, slots: int) -> "GroupedSlots":
        return self._resize(in_tiles(self.packed_capacity + slots, 8 * self.group))

    def even(self) -> "GroupedSlots":
        return self._resize(self.packed_capacity)

    def _resize(self, capacity: int) -> "GroupedSlots":
        """At least so many packed slots: whole residuals, which divide over the mesh in use."""
        extra = mesh.even(capacity, self.k.codes.shape[1], self.residual) - self.packed_capacity
        if not extra:
            return self
        per_group = {"scale": self.group, "zero": self.group}  # Tokens that share an entry, of keys.

        def wider(x: Vectors, tokens: dict[str, int]) -> Vectors:
            pad = lambda name: ((0, 0), (0, 0), (0, extra // tokens.get(name, 1)), (0, 0))  # noqa: E731
            leaves = {name: jnp.pad(getattr(x, name), pad(name)) for name in ("codes", "scale", "zero")}
            return dataclasses.replace(x, **leaves)

        order = jnp.pad(self.order, ((0, 0), (0, 0), (0, extra)), constant_values=EMPTY)
        return dataclasses.replace(self, k=wider(self.k, per_group), v=wider(self.v, {}), order=order)


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
        group=group,
    )
