"""Heads that keep different numbers of tokens: pages in a pool that all heads of a layer share, and a tail per head.

A page holds P tokens of one head, which owns it. What does not fill a page stands in the head's tail, in full
precision; when P tokens are together there, they become a page. So a head is never padded to the largest: a layer
allocates its tokens and at most a page's length more per head. A page is written whole and never changed, so its codec
may pack its tokens together, as KIVI does with keys.

Attention reads each head's pages by a table (PagedAttention, arXiv 2309.06180), and joins them with its tail.
"""

import dataclasses
import typing
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from kvjax.cache.codec import Codec, Plain, pack_vectors
from kvjax.cache.layer import Layer
from kvjax.cache.slots import take_slots
from kvjax.cache.types import EMPTY, LayerSpec, Tokens, static
from kvjax.kernels import Part, decode_attention, merge, mesh, write
from kvjax.kernels.packing import codes_per_word
from kvjax.kernels.paged import PagedRequest, paged_attention
from kvjax.kernels.parts import fold
from kvjax.kernels.vectors import Vectors, as_vectors


@dataclasses.dataclass(frozen=True)
class Together(Codec):
    """A codec of whole pages: 2, 4 or 8 bits in groups along tokens (KIVI's keys) or along channels (its values).

    Attributes:
      bits: 2, 4 or 8.
      group: Tokens or channels that share a scale and a zero.
      axis: -2 for tokens, -1 for channels.
      scale_dtype: Of scales and zeros.
    """

    bits: int = 2
    group: int = 32
    axis: int = -2
    scale_dtype: str = "float16"

    def encode(self, x: Array) -> Vectors:
        return pack_vectors(x, self.bits, self.group, self.axis, self.scale_dtype)

    def check(self, head_dim: int) -> None:
        per = codes_per_word(self.bits)
        if self.axis == -1 and (head_dim % self.group or head_dim % per):
            raise ValueError(
                f"{self.bits}-bit codes in groups of {self.group} channels need a head_dim that is a multiple of {per} "
                f"and of the group; this model has {head_dim}."
            )


@typing.no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Pages(Layer):
    """One layer whose heads keep different numbers of tokens.

    Attributes:
      k, v: Pages as the codecs write them: pytrees of arrays [B, N, ...], made of [B, N, P, D].
      owner: The head of each page [B, N] int32, `EMPTY` if it is free. Pages in use come first.
      page_pos: Positions [B, N, P] int32, `EMPTY` in free pages.
      k_tail, v_tail: What fills no page yet [B, H, P, D], in the model's dtype.
      tail_pos: Positions [B, H, P] int32, `EMPTY` behind the last token.
      k_codec, v_codec: How pages are written.
    """

    k: Any
    v: Any
    owner: Array
    page_pos: Array
    k_tail: Array
    v_tail: Array
    tail_pos: Array
    k_codec: Codec = static(default=Plain())
    v_codec: Codec = static(default=Plain())

    @property
    def page(self) -> int:
        """P, tokens of a page."""
        return self.tail_pos.shape[-1]

    @property
    def count(self) -> Array:
        """Tokens held per row and head [B, H] int32."""
        return (self.pos != EMPTY).sum(-1, dtype=jnp.int32)

    @property
    def _mine(self) -> Array:
        """Which pages are a head's own [B, H, N] bool."""
        heads = jnp.arange(self.tail_pos.shape[1], dtype=jnp.int32)
        return self.owner[:, None] == heads[:, None]

    @property
    def pos(self) -> Array:
        """[B, H, N * P + P] int32, as every head sees all pages; others' are empty. Wide, so for inspection only."""
        pages = jnp.where(self._mine[..., None], self.page_pos[:, None], EMPTY)
        return jnp.concatenate([pages.reshape(*pages.shape[:2], -1), self.tail_pos], -1)

    @property
    def room(self) -> Array:
        """How many more tokens fit, [B] int32: all heads get each, and fill their pages at different times."""
        heads = self.tail_pos.shape[1]
        rounds, rest = jnp.divmod((self.owner == EMPTY).sum(-1), heads)
        until_full = jnp.sort((self.tail_pos == EMPTY).sum(-1), -1)
        fits = jnp.take_along_axis(until_full, rest[:, None], -1)[:, 0] - 1
        return (rounds * self.page + fits).astype(jnp.int32)

    def held(self, spec: LayerSpec) -> tuple[Array, Array, Array]:
        del spec

        def dense(codec: Codec, codes: Any, tail: Array) -> Array:
            pages = codec.decode(codes).astype(jnp.float32)
            batch, heads, _, dim = tail.shape
            pages = jnp.broadcast_to(pages.reshape(batch, 1, -1, dim), (batch, heads, self.page_pos[0].size, dim))
            return jnp.concatenate([pages, tail.astype(jnp.float32)], 2)

        return self.pos, dense(self.k_codec, self.k, self.k_tail), dense(self.v_codec, self.v, self.v_tail)

    def read(self, new: Tokens, spec: LayerSpec, shared: Any = None, *, logits: bool = False) -> Part:
        del logits
        return self._read(new, spec, self.k_tail, self.v_tail, self.tail_pos)

    def read_both(self, new: Tokens, spec: LayerSpec, shared: Any = None, *, logits: bool = False) -> Part:
        del logits
        pos = jnp.broadcast_to(new.pos[:, None], (*self.tail_pos.shape[:2], new.pos.shape[1]))
        pairs = ((self.k_tail, new.k), (self.v_tail, new.v), (self.tail_pos, pos))
        return self._read(new, spec, *(jnp.concatenate([old, x.astype(old.dtype)], 2) for old, x in pairs))

    def _read(self, new: Tokens, spec: LayerSpec, k: Array, v: Array, pos: Array) -> Part:
        """Attention over the pages, and over tails k, v [B, H, R, D] at pos [B, H, R]."""
        rest = decode_attention(
            new.q,
            k,
            v,
            scale=spec.scale,
            q_pos=new.pos,
            pos=pos,
            window=spec.window,
            softcap=spec.softcap,
            implementation=spec.kernels,
        )
        if not self.owner.shape[1]:
            return rest
        return merge((self._read_pages(fold(new.q * spec.scale, k.shape[1]), new.pos, spec), rest))

    def _read_pages(self, q: Array, q_pos: Array, spec: LayerSpec) -> Part:
        """Attention of q [B, H, G * T, D] at q_pos [B, T] over each head's own pages."""
        table, count = self._tables()
        request = PagedRequest(
            q=q,
            k=as_vectors(self.k),
            v=as_vectors(self.v),
            table=table,
            count=count,
            lengths=jnp.where(self.owner == EMPTY, 0, self.page),
            q_pos=q_pos,
            pos=self.page_pos if spec.window else None,
            page=self.page,
            pool=True,
            window=spec.window,
            softcap=spec.softcap,
        )
        return paged_attention(request, spec.kernels)

    def _tables(self) -> tuple[Array, Array]:
        """Each head's pages [B, H, N] int32, and how many they are [B, H] int32."""
        mine = self._mine
        rank, pages = jnp.cumsum(mine, -1) - 1, mine.shape[-1]
        place = jnp.where(mine, rank, pages)
        number = jnp.broadcast_to(jnp.arange(pages, dtype=jnp.int32), mine.shape)
        table = jnp.zeros(mine.shape, jnp.int32)
        return jnp.put_along_axis(table, place, number, -1, inplace=False, mode="drop"), mine.sum(-1, dtype=jnp.int32)

    def append(self, new: Tokens, marks: Array | None = None) -> "Pages":
        """All heads get the new tokens behind their tails; what is complete becomes pages."""
        heads, length = new.k.shape[1:3]
        pos = jnp.where(jnp.arange(length) < self.room[:, None], new.pos, EMPTY)
        pos = jnp.broadcast_to(pos[:, None], (pos.shape[0], heads, length))
        old = (self.tail_pos != EMPTY).sum(-1)[..., None]
        index = jnp.arange(self.page + length, dtype=jnp.int32)
        index = jnp.where(index < old, index, index - old + self.page)  # Of tail and new tokens side by side.

        def behind(tail: Array, more: Array) -> Array:
            both = jnp.concatenate([tail, more.astype(tail.dtype)], 2)
            return take_slots(both, jnp.minimum(index, both.shape[2] - 1))

        both_pos = jnp.where(index < self.page + length, behind(self.tail_pos, pos), EMPTY)
        v = jnp.where((both_pos == EMPTY)[..., None], 0.0, behind(self.v_tail, new.v))  # Padding may hold anything.
        most = heads * ((self.page - 1 + length) // self.page)
        cut = cut_pages(behind(self.k_tail, new.k), v, both_pos, self.page, most)
        layer = dataclasses.replace(self, k_tail=cut.k_tail, v_tail=cut.v_tail, tail_pos=cut.tail_pos)
        return write.when((cut.owner != EMPTY).any(), lambda layer: _put_pages(layer, cut), layer)

    def reserve(self, slots: int) -> "Pages":
        return self._resize(self.owner.shape[1] + self.tail_pos.shape[1] * -(-slots // self.page))

    def even(self) -> "Pages":
        return self._resize(self.owner.shape[1])

    def _resize(self, pages: int) -> "Pages":
        """At least so many pages, which divide over the mesh in use."""
        extra = mesh.even(pages, 1) - self.owner.shape[1]

        def pad(leaf: Array, value: int = 0) -> Array:
            return jnp.pad(leaf, ((0, 0), (0, extra)) + ((0, 0),) * (leaf.ndim - 2), constant_values=value)

        return dataclasses.replace(
            self,
            k=jax.tree.map(pad, self.k),
            v=jax.tree.map(pad, self.v),
            owner=pad(self.owner, EMPTY),
            page_pos=pad(self.page_pos, EMPTY),
        )


@typing.no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Cut:
    """Heads' tokens in pages that are not written yet: k, v [B, N, P, D], the rest as in `Pages`."""

    k: Array
    v: Array
    owner: Array
    page_pos: Array
    k_tail: Array
    v_tail: Array
    tail_pos: Array


def cut_pages(k: Array, v: Array, pos: Array, page: int, pages: int) -> Cut:
    """Cuts heads of different lengths into full pages, head by head, and what is left of each.

    Args:
      k, v: [B, H, S, D]. pos: [B, H, S] int32, `EMPTY` behind the last token of each head.
      page: Tokens of a page. pages: Pages of the result; as many as any row can fill.
    """
    batch, heads, slots, _ = k.shape
    count = (pos != EMPTY).sum(-1, dtype=jnp.int32)
    full = count // page
    ends = jnp.cumsum(full, -1)
    number = jnp.arange(pages, dtype=jnp.int32)
    owner = (number[:, None] >= ends[:, None]).sum(-1, dtype=jnp.int32)  # [B, N]; H for pages nobody fills.
    used = owner < heads
    safe = jnp.minimum(owner, heads - 1)
    first = number - jnp.take_along_axis(ends - full, safe, -1)
    token = (safe * slots)[..., None] + first[..., None] * page + jnp.arange(page, dtype=jnp.int32)
    token = jnp.where(used[..., None], token, 0).reshape(batch, 1, pages * page)

    def paged(x: Array) -> Array:
        flat = x.reshape(batch, 1, heads * slots, *x.shape[3:])
        return take_slots(flat, token).reshape(batch, pages, page, *x.shape[3:])

    last = (full * page)[..., None] + jnp.arange(page, dtype=jnp.int32)
    tail = lambda x: take_slots(x, jnp.minimum(last, slots - 1))  # noqa: E731
    return Cut(
        k=paged(k),
        v=paged(v),
        owner=jnp.where(used, owner, EMPTY),
        page_pos=jnp.where(used[..., None], paged(pos), EMPTY),
        k_tail=tail(k),
        v_tail=tail(v),
        tail_pos=jnp.where(last < count[..., None], tail(pos), EMPTY),
    )


def _put_pages(layer: Pages, cut: Cut) -> Pages:
    """Writes pages behind those in use; what is beyond the pool is dropped."""
    pool = layer.owner.shape[1]
    number = jnp.arange(cut.owner.shape[1], dtype=jnp.int32)
    index = (layer.owner != EMPTY).sum(-1, dtype=jnp.int32)[:, None] + number
    index = jnp.where(cut.owner != EMPTY, index, pool)
    rows = jnp.arange(index.shape[0])[:, None]
    put = lambda leaf, value: leaf.at[rows, index].set(value.astype(leaf.dtype), mode="drop")  # noqa: E731
    return dataclasses.replace(
        layer,
        k=jax.tree.map(put, layer.k, layer.k_codec.encode(cut.k)),
        v=jax.tree.map(put, layer.v, layer.v_codec.encode(cut.v)),
        owner=put(layer.owner, cut.owner),
        page_pos=put(layer.page_pos, cut.page_pos),
    )


def make_pages(
    k: Array,
    v: Array,
    pos: Array,
    *,
    page: int,
    tokens: int,
    k_codec: Codec = Plain(),  # noqa: B008  A hashable constant.
    v_codec: Codec = Plain(),  # noqa: B008
) -> Pages:
    """The pages that hold a prompt's tokens.

    Args:
      k, v: [B, H, S, D]. pos: [B, 1 or H, S] int32, `EMPTY` behind the last token of each head.
      page: Tokens of a page; with codecs that pack tokens together, a multiple of their group.
      tokens: The most that all heads of a row hold together.
    """
    pos = jnp.broadcast_to(pos, k.shape[:3])
    cut = cut_pages(k, v, pos, page, tokens // page)
    return Pages(
        k=k_codec.encode(cut.k),
        v=v_codec.encode(cut.v),
        owner=cut.owner,
        page_pos=cut.page_pos,
        k_tail=cut.k_tail,
        v_tail=cut.v_tail,
        tail_pos=cut.tail_pos,
        k_codec=k_codec,
        v_codec=v_codec,
    )
