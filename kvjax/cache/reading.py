"""Layers whose queries look at a few of the stored tokens only.

The new token is stored first and then competes with the others: a query may pass over its own. One query gathers the
slots that it has chosen and touches no others; several at once would gather more than there is, so they read everything
under a mask, to the same result. Every query head chooses for itself, whatever the group it is in.
"""

import dataclasses
import typing
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from kvjax.cache.layer import Layer, Mark
from kvjax.cache.slots import Slots, put_slots, take_slots
from kvjax.cache.types import EMPTY, LayerSpec, Tokens, static
from kvjax.kernels import mesh
from kvjax.kernels.paged import PagedRequest, paged_attention
from kvjax.kernels.parts import NEG, Part, attend_part, dot_keys, fold, visible
from kvjax.kernels.vectors import as_vectors

LEAST_PAGES = 3


def whole(tokens: Any) -> Any:
    """Rounds down; 1e-3 forgives the float error of a ratio times a length."""
    return jnp.floor(tokens + 1e-3).astype(jnp.int32)


def read_slots(layer: Slots, new: Tokens, spec: LayerSpec, index: Array, valid: Array) -> Array:
    """Attention of new tokens, which are stored already, over slots of their choice.

    Args:
      layer: Holds them and what came before; heads hold equal numbers of tokens.
      index: Slots [B, H * G, T, N] int32. valid: Which of them count, and lie in the layer [B, H * G, T, N] bool.

    Returns:
      Output [B, H * G, T, D] float32.
    """
    if index.shape[2] == 1:
        return by_query_head(layer, index[:, :, 0], valid[:, :, 0]).ask(new, spec, prefix=False).out
    logits = layer.logits(new, spec)
    batch, heads, _, slots = logits.shape
    queries, length = index.shape[1:3]
    chosen = jnp.zeros((batch, queries, length, slots), bool)
    chosen = jnp.put_along_axis(chosen, jnp.where(valid, index, slots), True, -1, inplace=False, mode="drop")
    seen = visible(new.pos[:, None], layer.pos, spec.window)
    seen = jnp.repeat(jnp.broadcast_to(seen, (batch, heads, length, slots)), queries // heads, 1)

    def mix(p: Array) -> Array:
        return layer.mix(p.reshape(batch, heads, -1, slots)).reshape(batch, queries, length, -1)

    return attend_part(logits.reshape(batch, queries, length, slots), chosen & seen, mix, spec.softcap).out


def by_query_head(layer: Slots, index: Array, valid: Array) -> Slots:
    """Slots index [B, H * G, N] where valid, as a layer with a KV head for each query head."""
    batch, queries, number = index.shape
    heads = jax.tree.leaves(layer.k)[0].shape[1]
    index = jnp.minimum(index, layer.capacity - 1).reshape(batch, heads, -1)

    def take(leaf: Array) -> Array:
        return take_slots(leaf, index).reshape(batch, queries, number, *leaf.shape[3:])

    pos = jnp.where(valid, take(layer.pos), EMPTY)
    return dataclasses.replace(layer, k=jax.tree.map(take, layer.k), v=jax.tree.map(take, layer.v), pos=pos)


class Reader(Layer):
    """Base of layers that keep their tokens in `inner`, a layer of slots, and read them in a way of their own."""

    inner: Slots

    @property
    def pos(self) -> Array:
        return self.inner.pos

    @property
    def room(self) -> Array | None:
        return self.inner.room

    def held(self, spec: LayerSpec) -> tuple[Array, Array, Array]:
        return self.inner.held(spec)

    def append(self, new: Tokens, marks: Array | None = None) -> Any:
        return dataclasses.replace(typing.cast(Any, self), inner=self.inner.append(new, marks))

    def reserve(self, slots: int) -> Any:
        return dataclasses.replace(typing.cast(Any, self), inner=self.inner.reserve(slots))

    def read(self, new: Tokens, spec: LayerSpec, shared: Any = None, *, logits: bool = False) -> Part:
        raise TypeError(f"{type(self).__name__} reads old and new tokens together: use `attend`.")


def own_slots(layer: Slots, length: int) -> Array:
    """Slots [B, T] int32 that the next T tokens take; tokens see what lies before them."""
    return layer.count.max(-1)[:, None] + jnp.arange(length, dtype=jnp.int32)


@typing.no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class BoundedPages(Reader):
    """A query reads the pages whose keys could match it best (Quest).

    Attributes:
      inner: The tokens; slot s is in page s // page.
      low, high: Least and largest value of every key channel in each page [B, H, P, D]; of an empty page anything.
      page: Slots of a page.
      budget: How many tokens a query reads: `budget.mean(held)` of those that are there. A hashable value.
    """

    inner: Slots
    low: Array
    high: Array
    page: int = static()
    budget: Any = static()

    def attend(
        self, new: Tokens, spec: LayerSpec, shared: Any = None, mark: Mark | None = None
    ) -> tuple[Array, "BoundedPages", Any]:
        del mark
        own, layer = own_slots(self.inner, new.pos.shape[1]), self.append(new)
        pages, valid = layer.choose(new.q, own)
        if new.pos.shape[1] == 1 and not self.inner.latent:
            return layer._read_pages(new, spec, pages[:, :, 0], valid[:, :, 0].sum(-1, dtype=jnp.int32)), layer, shared
        slot = jnp.arange(self.page, dtype=jnp.int32)
        index = (pages[..., None] * self.page + slot).reshape(*pages.shape[:3], -1)
        valid = jnp.repeat(valid, self.page, -1) & (index < layer.inner.capacity)
        return read_slots(layer.inner, new, spec, index, valid), layer, shared

    def _read_pages(self, new: Tokens, spec: LayerSpec, table: Array, count: Array) -> Array:
        """Attention of one stored token over its pages [B, H * G, N], the first `count` of them: [B, H * G, 1, D]."""
        inner, (k, v) = self.inner, (as_vectors(x) for x in (self.inner.k, self.inner.v))
        heads = k.codes.shape[:2]
        request = PagedRequest(
            q=new.q * spec.scale,
            k=k,
            v=v,
            table=table,
            count=count,
            lengths=jnp.broadcast_to(inner.count, heads),
            q_pos=new.pos,
            pos=jnp.broadcast_to(inner.pos, (*heads, inner.capacity)) if spec.window else None,
            page=self.page,
            window=spec.window,
            softcap=spec.softcap,
        )
        return paged_attention(request, spec.kernels).out

    def choose(self, q: Array, own: Array) -> tuple[Array, Array]:
        """The best pages of each query q [B, H * G, T, D], whose tokens are at slots own [B, T].

        Returns:
          Pages [B, H * G, T, N] int32, and which of them count.
        """
        scores, pages = self.scores(q, own), self.low.shape[2]
        most = min(pages, max(LEAST_PAGES, int(-(-self.budget.mean(self.inner.capacity) // self.page))))
        best, index = lax.top_k(scores, most)
        held = own + 1
        tokens = whole(self.budget.mean(held))
        number = jnp.maximum(tokens // self.page, LEAST_PAGES)
        number = jnp.where(tokens >= held, pages, number)[:, None, :, None]
        return index, (jnp.arange(most) < number) & (best > NEG)

    def scores(self, q: Array, own: Array) -> Array:
        """What the keys of a page can score at most, [B, H * G, T, P] float32; `NEG` for pages behind a query's own."""
        batch, queries, length, _ = q.shape
        heads = self.low.shape[1]
        up, down = (fold(x, heads) for x in (jnp.maximum(q, 0), jnp.minimum(q, 0)))
        scores = dot_keys(up, self.high) + dot_keys(down, self.low)
        scores = scores.reshape(batch, queries, length, -1)
        page = own // self.page
        if length > 1:  # Of its own page a query knows the tokens that are not later.
            slots = page[..., None] * self.page + jnp.arange(self.page, dtype=jnp.int32)
            low, high = self._bounds(slots, (slots <= own[..., None])[:, None])
            grouped = q.reshape(batch, heads, -1, length, q.shape[-1]).astype(jnp.float32)
            bound = jnp.maximum(grouped * low[:, :, None], grouped * high[:, :, None]).sum(-1)
            here = jnp.arange(scores.shape[-1]) == page[:, None, :, None]
            scores = jnp.where(here, bound.reshape(batch, queries, length, 1), scores)
        return jnp.where(jnp.arange(scores.shape[-1]) <= page[:, None, :, None], scores, NEG)

    def _bounds(self, slots: Array, present: Array) -> tuple[Array, Array]:
        """Bounds [B, H, N, D] of the keys at slots [B, N, page] where present [B, 1 or H, N, page]."""
        flat = jnp.minimum(slots.reshape(slots.shape[0], 1, -1), self.inner.capacity - 1)
        keys = self.inner.codec.decode(jax.tree.map(lambda leaf: take_slots(leaf, flat), self.inner.k))
        return page_bounds(keys.reshape(*keys.shape[:2], *slots.shape[1:], -1), present)

    def append(self, new: Tokens, marks: Array | None = None) -> "BoundedPages":
        length = new.pos.shape[1]
        layer = dataclasses.replace(self, inner=self.inner.append(new, marks))
        first = own_slots(self.inner, 1) // self.page
        pages = first + jnp.arange((length + self.page - 2) // self.page + 1, dtype=jnp.int32)  # That may have changed.
        slots = pages[..., None] * self.page + jnp.arange(self.page, dtype=jnp.int32)
        low, high = layer._bounds(slots, slots[:, None] < layer.inner.count[..., None, None])
        return dataclasses.replace(
            layer, low=put_slots(self.low, pages[:, None], low), high=put_slots(self.high, pages[:, None], high)
        )

    def reserve(self, slots: int) -> "BoundedPages":
        return self._with(self.inner.reserve(slots))

    def even(self) -> "BoundedPages":
        return self._with(self.inner)

    def _with(self, inner: Slots) -> "BoundedPages":
        """With a larger inner layer, whose pages divide over the mesh in use."""
        if mesh.shares(inner.heads) > 1:
            inner = inner.resize(mesh.even(inner.capacity, inner.heads, self.page))
        extra = -(-inner.capacity // self.page) - self.low.shape[2]
        pad = lambda leaf: jnp.pad(leaf, ((0, 0), (0, 0), (0, extra), (0, 0)))  # noqa: E731
        return dataclasses.replace(self, inner=inner, low=pad(self.low), high=pad(self.high))


def page_bounds(keys: Array, present: Array) -> tuple[Array, Array]:
    """Least and largest value of every channel: keys [B, H, N, page, D], present [B, 1 or H, N, page] -> [B, H, N, D].

    Of a page without any token: infinities.
    """
    there = present[..., None]
    return jnp.where(there, keys, jnp.inf).min(3), jnp.where(there, keys, -jnp.inf).max(3)


def make_bounded(inner: Slots, *, page: int, budget: Any, dtype: Any) -> BoundedPages:
    """Bounds of a prompt's keys as they are stored.

    Args:
      inner: The prompt's tokens. page, budget: See `BoundedPages`. dtype: Of the bounds.
    """
    pages = -(-inner.capacity // page)
    extra = pages * page - inner.capacity
    keys = jnp.pad(inner.codec.decode(inner.k), ((0, 0), (0, 0), (0, extra), (0, 0)))
    there = jnp.pad(inner.pos, ((0, 0), (0, 0), (0, extra)), constant_values=EMPTY) != EMPTY
    there = there.reshape(*there.shape[:2], pages, page)
    low, high = page_bounds(keys.reshape(*keys.shape[:2], pages, page, -1), there)
    empty = ~there.any(-1)[..., None]
    low, high = (jnp.where(empty, 0.0, x).astype(dtype) for x in (low, high))
    return BoundedPages(inner=inner, low=low, high=high, page=page, budget=budget)


@typing.no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Choosing(Reader):
    """A layer that reads everything, and hands on where its queries have found most (TidalDecode).

    What it hands on, as `shared`: slots [B, H * G, T, N] int32 and which of them count. All layers that take part hold
    the same tokens in the same slots.

    Attributes:
      inner: The tokens.
      budget: How many tokens it hands on: `budget.mean(held)` of those that are there, at least one. A hashable value.
      last: Nobody comes after it, and nothing is handed on.
    """

    inner: Slots
    budget: Any = static()
    last: bool = static(default=False)

    def attend(
        self, new: Tokens, spec: LayerSpec, shared: Any = None, mark: Mark | None = None
    ) -> tuple[Array, "Choosing", Any]:
        del shared, mark
        own, layer = own_slots(self.inner, new.pos.shape[1]), self.append(new)
        part = layer.inner.ask(new, spec, logits=not self.last, older=False)
        out = part.out.reshape(*new.q.shape[:3], -1)
        if self.last:
            return out, layer, None
        capacity, held = layer.inner.capacity, own + 1
        most = min(capacity, max(1, int(-(-self.budget.mean(capacity) // 1))))
        assert part.logits is not None
        best, index = lax.top_k(part.logits.reshape(*new.q.shape[:3], -1), most)
        number = jnp.maximum(whole(self.budget.mean(held)), 1)[:, None, :, None]
        return out, layer, (index, (jnp.arange(most) < number) & (best > NEG))


@typing.no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Following(Reader):
    """A layer that reads the tokens that a `Choosing` layer before it hands on.

    Attributes:
      inner: The tokens.
      last: Nobody comes after it, and nothing is handed on.
    """

    inner: Slots
    last: bool = static(default=False)

    def attend(
        self, new: Tokens, spec: LayerSpec, shared: Any = None, mark: Mark | None = None
    ) -> tuple[Array, "Following", Any]:
        del mark
        if shared is None:
            raise ValueError("This layer reads what a layer before it has chosen, and none has handed anything on.")
        layer = self.append(new)
        return read_slots(layer.inner, new, spec, *shared), layer, None if self.last else shared
