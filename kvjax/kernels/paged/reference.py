"""Paged attention as its definition says: the pages of every head gathered, everything dense and in float32."""

import jax.numpy as jnp
from jax import Array

from kvjax.kernels.paged.request import PagedRequest
from kvjax.kernels.parts import Part, attend_part, visible


def attend(request: PagedRequest) -> Part:
    """The answer to a request: `Part` of [B, Hq, N, D]."""
    k, v = (gather_pages(request, x.decode()) for x in (request.k, request.v))
    mask = page_mask(request, request.table, jnp.arange(request.table.shape[2], dtype=jnp.int32))
    logits = jnp.einsum("bhnd,bhsd->bhns", request.q.astype(jnp.float32), k)
    seen = mask.any(2)[..., None]  # What nobody sees may hold anything, and 0 * NaN would be NaN.
    part = attend_part(
        logits, mask, lambda p: jnp.einsum("bhns,bhsd->bhnd", p, jnp.where(seen, v, 0.0)), request.softcap
    )
    return Part(out=part.out, lse=part.lse)


def pages_of(request: PagedRequest, x: Array) -> Array:
    """x [B, Hk, S, ...] as pages of each KV head [B, Hk, pages, P, ...]; a pool [B, pages, P, ...] has one head."""
    if request.pool:
        return x[:, None]
    rest = [(0, 0)] * (x.ndim - 3)
    x = jnp.pad(x, ((0, 0), (0, 0), (0, -x.shape[2] % request.page), *rest))
    return x.reshape(*x.shape[:2], -1, request.page, *x.shape[3:])


def pick_pages(request: PagedRequest, x: Array, table: Array) -> Array:
    """Of x [B, Hk, pages, ...] those that each query head names in table [B, Hq, W]: [B, Hq, W, ...]."""
    batch = jnp.arange(table.shape[0])[:, None, None]
    head = jnp.arange(table.shape[1])[:, None] * x.shape[1] // table.shape[1]
    return x[batch, head, jnp.clip(table, 0, x.shape[2] - 1)]


def gather_pages(request: PagedRequest, x: Array) -> Array:
    """Of x [B, Hk, S, ...] the slots that each query head reads [B, Hq, M * P, ...]."""
    x = pick_pages(request, pages_of(request, x), request.table)
    return x.reshape(*x.shape[:2], -1, *x.shape[4:])


def page_mask(request: PagedRequest, table: Array, column: Array) -> Array:
    """Which slots of pages in table [B, Hq, W], whose columns have these numbers [W], each new token sees:
    [B, Hq, T, W * P] bool."""
    slot = jnp.arange(request.page, dtype=jnp.int32)
    there = (column < request.count[..., None]) & (table >= 0) & (table < request.pages)
    if request.pool:
        held = pick_pages(request, request.lengths[:, None], table)
    else:
        number = jnp.arange(request.pages, dtype=jnp.int32) * request.page
        held = pick_pages(request, request.lengths[..., None] - number, table)
    seen = (there[..., None] & (slot < held[..., None])).reshape(*table.shape[:2], 1, -1)
    seen = seen & (request.q_pos >= 0)[:, None, :, None]
    if request.pos is None:
        return seen
    pos = pick_pages(request, pages_of(request, request.pos), table)
    return seen & visible(request.q_pos[:, None], pos.reshape(*pos.shape[:2], -1), request.window)
