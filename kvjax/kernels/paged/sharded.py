"""Paged attention over a mesh: every device reads those pages of each head's table that it has."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from kvjax.kernels.mesh import Spread, axes_in_use, merge_shards, on_mesh, spread
from kvjax.kernels.paged.request import PagedRequest
from kvjax.kernels.parts import Part


def where(request: PagedRequest) -> Spread | None:
    """How a request lies on the mesh in use, its pages as slots do; None without one.

    A pool's pages belong to any head, so they lie along "model" too, and heads do not.
    """
    if not axes_in_use():
        return None
    batch, heads = request.k.codes.shape[:2]
    if request.pool:
        return spread(batch, 1, [heads])
    if request.k.slots % request.page:
        return spread(batch, heads, [1])  # The last page is cut short: all stay together.
    stored = [leaf.shape[2] for leaf in jax.tree.leaves((request.k, request.v))]
    return spread(batch, heads, [*stored, request.k.slots // request.page])


def attend(request: PagedRequest, mine: Spread, serve: Callable[[PagedRequest], Part]) -> Part:
    """The answer to a request.

    Args:
      request: Of the whole arrays.
      mine: How they lie.
      serve: Answers for one device's pages.
    """

    def local(request: PagedRequest) -> tuple[Array, Array]:
        part = merge_shards(serve(_own(request, mine) if mine.slots else request), mine.slots)
        return part.out, part.lse

    rows = mine.spec(request.q.shape, "batch", "heads")
    out, lse = on_mesh(local, (_specs(request, mine),), (rows, rows))(request)
    return Part(out=out, lse=lse)


def _own(request: PagedRequest, mine: Spread) -> PagedRequest:
    """What one device answers: of each table its own pages, in front, by its own numbers."""
    table = request.table - mine.first(request.pages)
    used = jnp.arange(table.shape[2], dtype=jnp.int32) < request.count[..., None]
    own = used & (table >= 0) & (table < request.pages)
    order = jnp.argsort(~own, axis=-1, stable=True)
    lengths = request.lengths
    if not request.pool:
        lengths = jnp.clip(lengths - mine.first(request.k.slots), 0, request.k.slots)
    return dataclasses.replace(
        request,
        table=jnp.take_along_axis(table, order, -1),
        count=own.sum(-1, dtype=jnp.int32),
        lengths=lengths,
    )


def _specs(request: PagedRequest, mine: Spread) -> PagedRequest:
    """A request of partition specs."""
    stored = ("batch", "slots") if request.pool else ("batch", "heads", "slots")
    heads, pages = ("batch", "heads"), ("batch", "slots" if request.pool else "heads")
    axes = {"q": heads, "k": stored, "v": stored, "table": heads, "count": heads, "lengths": pages}
    axes |= {"q_pos": ("batch",), "pos": stored}
    return dataclasses.replace(request, **{name: mine.specs(getattr(request, name), *axes[name]) for name in axes})
