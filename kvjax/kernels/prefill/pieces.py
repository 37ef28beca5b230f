"""One device's part of ring attention in plain jnp: queries over keys, wherever either stand."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from kvjax.kernels.parts import NEG, attend_part, dot_keys, dot_values
from kvjax.kernels.prefill.request import Request
from kvjax.kernels.prefill.ring import Found, Keys, Local, Rows, join
from kvjax.kernels.prefill.statistics import sees
from kvjax.kernels.prefill.xla import BLOCK


def local(request: Request, block: int | None = None) -> Local:
    """How a device does its part of a request: blocks of queries one after another, over half of the keys at a time,
    and nothing for those that do not see each other."""
    size = min(block or BLOCK, max(request.place.shape[1] // 2, 1))

    def attend(rows: Rows, keys: Keys) -> Found:
        def one(rows: Rows) -> Found:
            seen = [_if_visible(functools.partial(_attend, request), rows, half) for half in _halves(keys)]
            return join(*seen)

        found = _in_blocks(one, rows, size)
        return jax.tree.map(lambda x: _together(x, 3, rows.low.shape[1]), found)

    def columns(rows: Rows, lse: Array, keys: Keys) -> Array:
        def one(block: tuple[Rows, Array]) -> Array:
            received = functools.partial(_columns, request)
            return jnp.concatenate([_if_visible(received, block, half) for half in _halves(keys)], -1)

        return _in_blocks(one, (rows, lse), size, summed=True)

    return Local(attend, columns)


def _attend(request: Request, rows: Rows, keys: Keys) -> Found:
    batch, heads, group, length, _ = rows.q.shape
    logits = dot_keys(rows.q.reshape(batch, heads, group * length, -1), keys.k)
    mask = sees(rows.low, rows.high, keys.place[:, None])
    v = jnp.where((keys.place >= 0)[:, None, :, None], keys.v, 0)  # Of padding it may be NaN.
    part = attend_part(logits, mask, lambda p: dot_values(p, v), request.softcap)
    grouped = lambda x: x.reshape(batch, heads, group, length, *x.shape[3:])  # noqa: E731
    if not request.statistics.entropy:
        return Found(grouped(part.out), grouped(part.lse), None)
    assert part.logits is not None
    weights = jnp.where(part.logits > NEG, jnp.exp(part.logits - part.lse[..., None]), 0.0)
    return Found(grouped(part.out), grouped(part.lse), grouped((weights * part.logits).sum(-1)))


def _columns(request: Request, block: tuple[Rows, Array], keys: Keys) -> Array:
    rows, lse = block
    batch, heads, group, length, _ = rows.q.shape
    logits = dot_keys(rows.q.reshape(batch, heads, group * length, -1), keys.k)
    logits = request.softcap * jnp.tanh(logits / request.softcap) if request.softcap else logits
    logits = logits.reshape(batch, heads, group, length, -1)
    mask = sees(rows.low, rows.high, keys.place[:, None])[:, :, None]
    weights = jnp.where(mask, jnp.exp(logits - lse[..., None]), 0.0)
    return jnp.einsum("cbt,bhgts->cbhgs", rows.counts, weights, precision=lax.Precision.HIGHEST)


def _if_visible(f: Any, block: Any, keys: Keys) -> Any:
    """`f(block, keys)`, or what it says of keys that are not seen, without the work."""
    rows = block if isinstance(block, Rows) else block[0]
    oldest, newest = jnp.where(keys.place >= 0, keys.place, jnp.iinfo(jnp.int32).max), keys.place
    there = (oldest.min(1) <= rows.high.max(1)) & (newest.max(1) >= rows.low.min(1))
    shapes = jax.eval_shape(f, block, keys)
    nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    if isinstance(nothing, Found):
        nothing = nothing._replace(lse=jnp.full_like(nothing.lse, NEG))
    return lax.cond(there.any(), lambda: f(block, keys), lambda: nothing)


def _halves(keys: Keys) -> list[Keys]:
    half = keys.place.shape[1] // 2
    return [Keys(keys.k[:, :, at], keys.v[:, :, at], keys.place[:, at]) for at in (slice(half), slice(half, None))]


def _in_blocks(f: Any, rows: Any, size: int, *, summed: bool = False) -> Any:
    """`f` of blocks of `size` queries: side by side [blocks, ...], or summed."""
    queries, lse = rows if isinstance(rows, tuple) and not isinstance(rows, Rows) else (rows, None)
    length = queries.low.shape[1]

    def apart(x: Array, axis: int, fill: int) -> Array:
        widths = [(0, -length % size if i == axis else 0) for i in range(x.ndim)]
        x = jnp.pad(x, widths, constant_values=fill)
        blocks = x.shape[axis] // size  # Said, because another axis may be empty.
        return jnp.moveaxis(x.reshape(*x.shape[:axis], blocks, size, *x.shape[axis + 1 :]), axis, 0)

    blocks: Any = Rows(
        apart(queries.q, 3, 0), apart(queries.low, 1, 0), apart(queries.high, 1, -1), apart(queries.counts, 2, 0)
    )
    blocks = blocks if lse is None else (blocks, apart(lse, 3, 0))
    if not summed:
        return lax.map(f, blocks)
    first = jax.tree.map(lambda x: x[0], blocks)
    zeros = jnp.zeros_like(jax.eval_shape(f, first), dtype=jnp.float32)
    return lax.scan(lambda sums, block: (sums + f(block), None), zeros, blocks)[0]


def _together(x: Array, axis: int, length: int) -> Array:
    """[blocks, ..., size, ...] -> [..., length, ...] with the axis that was cut."""
    x = jnp.moveaxis(x, 0, axis)
    x = x.reshape(*x.shape[:axis], x.shape[axis] * x.shape[axis + 1], *x.shape[axis + 2 :])
    return lax.slice_in_dim(x, 0, length, axis=axis)
