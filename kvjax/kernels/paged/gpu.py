"""Paged attention on NVIDIA Hopper GPUs: the kernel of decode attention, whose blocks are pieces that a table names.

A piece is what pages of any length are made of: 64 slots, or fewer where pages are shorter, several of which then make
a block. A page that the table does not name properly (a number that does not exist, an unused column) is replaced by
one that exists, and masked.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from kvjax.kernels.decode.gpu import BLOCK, Tuning, attend as attend_pieces, refuse_rows
from kvjax.kernels.decode.gpu_kernel import ROWS
from kvjax.kernels.decode.gpu_stored import refuse_vectors
from kvjax.kernels.paged.reference import pick_pages
from kvjax.kernels.paged.request import PagedRequest
from kvjax.kernels.parts import Part
from kvjax.kernels.vectors import Vectors


def attend(
    request: PagedRequest,
    *,
    block: int = BLOCK,
    stages: int | None = None,
    programs: int | None = None,
    interpret: Any = None,
) -> Part:
    """The answer to a request: `Part` of [B, Hq, N, D].

    Args:
      request: What `refuse` does not refuse.
      block, stages, programs, interpret: See `kvjax.kernels.decode.gpu.Tuning`.

    Raises:
      ValueError: The kernel cannot serve the request; says why.
    """
    if reason := refuse(request):
        raise ValueError(reason)
    if block % BLOCK:
        raise ValueError(f"block must be a multiple of {BLOCK}, got {block}.")
    piece = math.gcd(request.page, BLOCK)
    pieces = block // piece
    used = jnp.clip(request.count, 0, request.table.shape[2]).reshape(-1) * (request.page // piece)
    return attend_pieces(
        request,
        as_head(request, request.k),
        as_head(request, request.v),
        blocks=(used + pieces - 1) // pieces,
        where=find_pieces(request, piece, pieces),
        piece=piece,
        tuning=Tuning(block, stages, programs, interpret),
    )


def refuse(request: PagedRequest) -> str | None:
    """Why the kernel cannot serve a request and what would change that, in a sentence; None where it can."""
    if reason := refuse_rows(request, request.v.dim):
        return reason
    page, piece = request.page, math.gcd(request.page, BLOCK)
    if piece < ROWS:
        return f"pages of {page} slots cannot be copied; multiples of {ROWS} can, and of {BLOCK} best."
    slots = as_head(request, request.k).slots
    if slots < piece or slots % ROWS:
        return f"{slots} slots cannot be copied; at least {piece}, and a multiple of {ROWS}, can."
    for name, x in (("k", request.k), ("v", request.v)):
        if request.pool and x.scale is not None and x.scale.shape[1] != request.pages:
            return f"{name} shares scales among the pages of a pool; each needs its own."
        if reason := refuse_vectors(as_head(request, x)):
            return f"{name} {reason}"
        if page % x.group[0]:
            return f"{name} shares a scale among {x.group[0]} tokens, which pages of {page} would cut."
    return None


def as_head(request: PagedRequest, x: Vectors) -> Vectors:
    """A pool [B, pages, P, D] as one KV head [B, 1, pages * P, D]: the same bytes."""
    if not request.pool:
        return x
    return jax.tree.map(lambda leaf: leaf.reshape(leaf.shape[0], 1, -1, leaf.shape[3]), x)


def find_pieces(request: PagedRequest, piece: int, multiple: int) -> dict[str, Array]:
    """The pieces of all pages that are named, in the order of the table.

    Args:
      piece: Slots of a piece, of which a page is a multiple.
      multiple: The number of pieces is made a multiple of this.

    Returns:
      "first", "low", "high" [B * Hq, pieces] int32: see `kvjax.kernels.decode.gpu_kernel.Span`.
    """
    column = jnp.arange(request.table.shape[2], dtype=jnp.int32)
    there = (column < request.count[..., None]) & (request.table >= 0) & (request.table < request.pages)
    page = jnp.where(there, request.table, 0)
    if request.pool:
        slots, held = request.pages * request.page, pick_pages(request, request.lengths[:, None], page)
    else:
        slots = request.k.slots
        held = jnp.repeat(jnp.minimum(request.lengths, slots), request.share, 1)[..., None] - page * request.page
    held = jnp.where(there, jnp.clip(held, 0, request.page), 0)
    inside = jnp.arange(0, request.page, piece, dtype=jnp.int32)
    start = page[..., None] * request.page + inside
    first = jnp.minimum(start, slots - piece)  # The last page may lack slots.
    low = start - first
    high = low + jnp.clip(held[..., None] - inside, 0, piece)

    def flat(x: Array) -> Array:
        x = x.reshape(page.shape[0] * page.shape[1], -1)
        return jnp.pad(x, ((0, 0), (0, -x.shape[1] % multiple)))

    return {"first": flat(first // ROWS), "low": flat(low), "high": flat(high)}
