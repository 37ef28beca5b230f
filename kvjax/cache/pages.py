"""Heads that keep different numbers of tokens: pages in a pool that all heads of a layer share, and a tail per head.

A page holds P tokens of one head, which owns it. What does not fill a page stands in the head's tail, in full
precision; when P tokens are together there, they become a page. So a head is never padded to the largest: a layer
allocates its tokens and at most a page's length more per head. A page is written whole and never changed, so its codec
may pack its tokens together, as KIVI does with keys.

Attention reads each page with the queries of its owner, as flash decoding reads pieces of a long sequence, and joins
the pages of a head by their weights.
"""

import dataclasses
import typing
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from kvjax.cache.codec import Codec, Plain, pack_vectors
from kvjax.cache.layer import Layer
from kvjax.cache.slots import take_slots
from kvjax.cache.types import EMPTY, LayerSpec, Tokens, static
from kvjax.kernels import Vectors
from kvjax.kernels.packing import codes_per_word
from kvjax.kernels.parts import NEG, Part, attend_part, dot_keys, dot_values, fold, merge, visible

QUERIES = 16  # New tokens that read the pages at once: every page has its own copy of their queries.


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
        q = fold(new.q * spec.scale, self.tail_pos.shape[1])
        mask = visible(new.pos[:, None], self.tail_pos, spec.window)
        tail = attend_part(dot_keys(q, self.k_tail), mask, lambda p: dot_values(p, self.v_tail), spec.softcap)
        pages = self._read_pages(q, new.pos, spec)
        return merge((pages, dataclasses.replace(tail, logits=None)))

    def _read_pages(self, q: Array, q_pos: Array, spec: LayerSpec) -> Part:
        """Attention of q [B, H, G * T, D] at q_pos [B, T] over all pages, a few tokens at a time."""
        batch, heads, rows, dim = q.shape
        length = q_pos.shape[1]
        if length <= QUERIES:
            return self._read_some(q, q_pos, spec)

        def one(token: tuple[Array, Array]) -> Part:
            return self._read_some(token[0], token[1][:, None], spec)

        tokens = jnp.moveaxis(q.reshape(batch, heads, -1, length, dim), 3, 0), q_pos.T
        parts = lax.map(one, tokens, batch_size=QUERIES)
        back = lambda x: jnp.moveaxis(x, 0, 3).reshape(batch, heads, rows, *x.shape[4:])  # noqa: E731
        return jax.tree.map(back, parts)

    def _read_some(self, q: Array, q_pos: Array, spec: LayerSpec) -> Part:
        asked = take_slots(q.reshape(*q.shape[:2], -1)[:, None], jnp.maximum(self.owner, 0)[:, None])[:, 0]
        asked = asked.reshape(*self.owner.shape, *q.shape[2:])  # Of each page's owner, [B, N, G * T, D].
        mask = visible(q_pos[:, None], self.page_pos, spec.window)
        logits = self.k_codec.dot(asked, self.k)
        each = attend_part(logits, mask, lambda p: self.v_codec.mix(p, self.v), spec.softcap)
        return join_pages(each, self._mine)

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
        return lax.cond((cut.owner != EMPTY).any(), _put_pages, lambda layer, cut: layer, layer, cut)

    def reserve(self, slots: int) -> "Pages":
        extra = self.tail_pos.shape[1] * -(-slots // self.page)

        def pad(leaf: Array, value: int = 0) -> Array:
            return jnp.pad(leaf, ((0, 0), (0, extra)) + ((0, 0),) * (leaf.ndim - 2), constant_values=value)

        return dataclasses.replace(
            self,
            k=jax.tree.map(pad, self.k),
            v=jax.tree.map(pad, self.v),
            owner=pad(self.owner, EMPTY),
            page_pos=pad(self.page_pos, EMPTY),
        )


def join_pages(each: Part, mine: Array) -> Part:
    """Attention of heads from that of their pages.

    Args:
      each: Of every page, [B, N, G * T, ...].
      mine: Which pages are a head's own [B, H, N] bool.

    Returns:
      [B, H, G * T, ...], without logits.
    """
    lses = jnp.where(mine[..., None], each.lse[:, None], NEG)  # [B, H, N, G * T].
    top = lses.max(2, initial=NEG)
    shares = jnp.where(lses > NEG, jnp.exp(lses - top[:, :, None]), 0.0)
    total = shares.sum(2)
    out = jnp.einsum("bhnr,bnrd->bhrd", shares, each.out) / jnp.maximum(total, 1e-30)[..., None]
    return Part(out=out, lse=jnp.where(total > 0, top + jnp.log(jnp.maximum(total, 1e-30)), NEG))


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
