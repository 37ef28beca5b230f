"""Paged attention in blocks of a few pages, on any device: nothing is gathered or decoded as a whole."""

import jax
import jax.numpy as jnp
from jax import Array, lax

from kvjax.kernels.paged.reference import page_mask, pick_pages
from kvjax.kernels.paged.request import PagedRequest
from kvjax.kernels.parts import NEG, Part, attend_part, merge
from kvjax.kernels.vectors import Vectors

SLOTS = 1024  # Of one step.


def attend(request: PagedRequest, *, block: int = SLOTS) -> Part:
    """The answer to a request: `Part` of [B, Hq, N, D].

    Args:
      request: Any.
      block: Slots per step and head, rounded to pages.
    """
    columns, wide = request.table.shape[2], max(block // request.page, 1)
    table = jnp.pad(request.table, ((0, 0), (0, 0), (0, -columns % wide)), constant_values=-1)
    q = request.q.astype(jnp.float32)
    used = jnp.minimum(request.count.max(), columns)
    none = Part(out=jnp.zeros((*q.shape[:3], request.v.dim)), lse=jnp.full(q.shape[:3], NEG))

    def step(i: Array, done: Part) -> Part:
        names = lax.dynamic_slice_in_dim(table, i * wide, wide, 2)
        k, v = (_decode(request, x, names) for x in (request.k, request.v))
        mask = page_mask(request, names, i * wide + jnp.arange(wide, dtype=jnp.int32))
        v = jnp.where(mask.any(2)[..., None], v, 0.0)
        logits = jnp.einsum("bhnd,bhsd->bhns", q, k, precision=lax.Precision.HIGHEST)
        part = attend_part(logits, mask, lambda p: jnp.einsum("bhns,bhsd->bhnd", p, v), request.softcap)
        return merge([done, Part(out=part.out, lse=part.lse)])

    return lax.fori_loop(0, -(-used // wide), step, none)


def _decode(request: PagedRequest, x: Vectors, names: Array) -> Array:
    """The vectors of the named pages [B, Hq, W] alone: [B, Hq, W * P, D] float32."""
    tokens = x.group[0]
    if request.page % tokens and not request.pool:
        raise ValueError(f"{tokens} tokens share a scale, and pages of {request.page} slots would cut them.")

    def pick(leaf: Array) -> Array:
        per = x.slots // leaf.shape[2]  # Slots of one entry.
        pages = leaf[:, None] if request.pool else _pages(leaf, request.page // per)
        picked = pick_pages(request, pages, names)
        return picked.reshape(*picked.shape[:2], -1, *picked.shape[4:])

    return jax.tree.map(pick, x).decode()


def _pages(leaf: Array, size: int) -> Array:
    leaf = jnp.pad(leaf, ((0, 0), (0, 0), (0, -leaf.shape[2] % size), (0, 0)))
    return leaf.reshape(*leaf.shape[:2], -1, size, leaf.shape[3])
