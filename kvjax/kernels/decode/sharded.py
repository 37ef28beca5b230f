"""Decode attention over a mesh: every device attends to its own slots, and what they found is merged.

Per layer that costs two reductions of the size of the queries, and no traffic of the size of the cache.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, lax

from kvjax.kernels.decode.request import Request
from kvjax.kernels.mesh import Spread, axes_in_use, merge_shards, on_mesh, spread
from kvjax.kernels.parts import Part


def where(request: Request) -> Spread | None:
    """How a request lies on the mesh in use; None without one."""
    if not axes_in_use():
        return None
    batch, heads = request.q.shape[:2]
    stored = jax.tree.leaves((request.k, request.v))
    return spread(batch, heads, [leaf.shape[2] for leaf in stored])


def decode(request: Request, mine: Spread, serve: Callable[[Request], Part]) -> Part:
    """The answer to a request.

    Args:
      request: Of the whole arrays.
      mine: How they lie.
      serve: Answers for one device's slots.
    """
    has_logits = (request.logits, request.logits and request.tail is not None)

    def local(request: Request) -> tuple[Array, ...]:
        part = serve(_own(request, mine) if mine.slots else request)
        part = merge_shards(part, mine.slots)
        slots = request.k.slots
        stored, tail = (None, None) if part.logits is None else (part.logits[..., :slots], part.logits[..., slots:])
        if mine.slots and has_logits[1]:
            tail = lax.pmax(tail, mine.slots)  # Of the device that has attended to it.
        logits = [x for x, wanted in zip((stored, tail), has_logits, strict=True) if wanted and x is not None]
        return part.out, part.lse, *logits

    rows = mine.spec(request.q.shape, "batch", "heads")
    wide = mine.spec((*request.q.shape[:3], request.k.slots), "batch", "heads", "", "slots")
    out_specs = (rows, rows, *(spec for spec, wanted in zip((wide, rows), has_logits, strict=True) if wanted))
    out, lse, *logits = on_mesh(local, (_specs(request, mine),), out_specs)(request)
    return Part(out=out, lse=lse, logits=jnp.concatenate(logits, -1) if logits else None)


def _own(request: Request, mine: Spread) -> Request:
    """What one device answers: lengths count its slots, and the tail is the first one's."""
    slots, tail = request.k.slots, request.tail
    first = mine.first(slots)
    if tail is not None:
        tail = dataclasses.replace(tail, pos=jnp.where(first == 0, tail.pos, -1))
    return dataclasses.replace(request, lengths=jnp.clip(request.lengths - first, 0, slots), tail=tail)


def _specs(request: Request, mine: Spread) -> Request:
    """A request of partition specs."""
    stored = ("batch", "heads", "slots")
    axes = {"k": stored, "v": stored, "pos": stored, "q_pos": ("batch",), "bias": ("batch", "heads", "", "slots")}
    named = {field.name: axes.get(field.name, ("batch", "heads")) for field in dataclasses.fields(request)}
    arrays = ("q", "k", "v", "lengths", "q_pos", "pos", "bias", "tail")
    return dataclasses.replace(request, **{name: mine.specs(getattr(request, name), *named[name]) for name in arrays})
