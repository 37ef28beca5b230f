"""Prefill attention in blocks of queries, in plain jnp: no [T, S] matrix is ever whole.

Blocks that a static rule keeps apart are never multiplied: a window's keys are cut out, and groups of blocks share a
prefix of the keys, which comes near the causal triangle's cost with few compiled bodies.
"""

import functools
import operator
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from kvjax.kernels.parts import NEG, dot_keys, dot_values
from kvjax.kernels.prefill.request import Prefill, Request
from kvjax.kernels.prefill.statistics import normalize, query_weights, sees

BLOCK = 256  # Queries that attend at once.


class Store(NamedTuple):
    """Keys and values [B, H, S, D] and their places [B, 1 or H, S]."""

    k: Array
    v: Array
    place: Array

    def cut(self, start: Array | int, size: int) -> "Store":
        """Slots `start ... start + size`."""
        return Store(*(lax.dynamic_slice_in_dim(x, start, size, 2) for x in self))

    def first(self, size: int) -> "Store":
        return Store(*(x[:, :, :size] for x in self))


class Queries(NamedTuple):
    """Scaled queries [B, H, G, t, D], the places that they see [B, t] each, what they count in sums [C, B, t]."""

    q: Array
    low: Array
    high: Array
    counts: Array


class Seen(NamedTuple):
    """What a block of queries says: out [B, H, G, t, D]; lse and entropy [B, H, G, t] or None; and, for every store,
    the attention that its keys receive [C, B, H, G, S].
    """

    out: Array
    lse: Array | None
    entropy: Array | None
    sums: list[Array]


def prefill(request: Request, *, block: int | None = None) -> Prefill:
    """The answer to a request.

    Args:
      block: Queries that attend at once: bounds memory, changes no result.
    """
    batch, kv_heads, group, length, _ = request.q.shape
    counts = query_weights(request.statistics.column_sums, request.age, request.place >= 0)
    queries = Queries(request.q, request.low, request.place, counts)
    own, past = _stores(request)

    block = min(block or BLOCK, length)
    total = length + -length % block
    queries = Queries(
        _pad(queries.q, 3, total, 0),
        _pad(queries.low, 1, total, 0),
        _pad(queries.high, 1, total, -1),
        _pad(queries.counts, 2, total, 0),
    )
    own = Store(_pad(own.k, 2, total, 0), _pad(own.v, 2, total, 0), _pad(own.place, 2, total, -1))
    seen, own_sums, past_sums = _in_blocks(request, queries, own, past, block)

    def rows(x: Array) -> Array:
        return x.reshape(batch, kv_heads * group, *x.shape[3:])[:, :, :length]

    places = [own.place[..., :length]] + [store.place for store in past]
    sums = [
        normalize(request.statistics.column_sums, x, counts, request.low, request.place, place)
        for x, place in zip([own_sums[..., :length], *past_sums], places, strict=True)
    ]
    sums = jnp.concatenate([*sums[1:], sums[0]], -1)
    sums = sums.reshape(counts.shape[0], batch, kv_heads * group, sums.shape[-1])
    return Prefill(
        out=rows(seen.out),
        lse=None if seen.lse is None else rows(seen.lse),
        entropy=None if seen.entropy is None else rows(seen.entropy),
        column_sums=tuple(sums),
        window=window_weights(request) if request.statistics.window else None,
    )


def window_weights(request: Request) -> Array:
    """Attention weights of each row's last W queries [B, H * G, W, S] float32."""
    batch, kv_heads, group, length, dim = request.q.shape
    width = request.statistics.window
    last = jnp.where(request.place >= 0, jnp.arange(length), -1).max(1)
    index = last[:, None] - width + 1 + jnp.arange(width)
    there, index = index >= 0, jnp.maximum(index, 0)
    q = jnp.take_along_axis(request.q, index[:, None, None, :, None], 3)
    low = jnp.take_along_axis(request.low, index, 1)
    high = jnp.where(there, jnp.take_along_axis(request.place, index, 1), -1)
    own, past = _stores(request)
    weights, _, _ = _weights(q, low, high, [*past, own], request.softcap)
    return jnp.concatenate([x for x, _ in weights], -1).reshape(batch, kv_heads * group, width, -1)


def _stores(request: Request) -> tuple[Store, list[Store]]:
    """The new keys, and those of the past if there are any."""

    def clean(k: Array, v: Array, place: Array) -> Store:
        # A padding value may be NaN, and zero weight times NaN is NaN. Logits of padding keys are masked instead.
        return Store(k, jnp.where((place >= 0)[..., None], v, 0), place)

    own = clean(request.k, request.v, request.place[:, None])
    return own, [] if request.past is None else [clean(request.past.k, request.past.v, request.past_place)]


def _in_blocks(
    request: Request, queries: Queries, own: Store, past: list[Store], block: int
) -> tuple[Seen, Array, list[Array]]:
    """Blocks of queries one after another; what they say, and the sums over all of them."""
    batch, kv_heads, group, total, _ = queries.q.shape
    blocks = total // block
    number = len(request.statistics.column_sums)
    zeros = lambda slots: jnp.zeros((number, batch, kv_heads, group, slots), jnp.float32)  # noqa: E731
    sums = (zeros(total), [zeros(store.k.shape[2]) for store in past])

    def apart(x: Array, axis: int) -> Array:
        return jnp.moveaxis(x.reshape(*x.shape[:axis], blocks, block, *x.shape[axis + 1 :]), axis, 0)

    steps = Queries(apart(queries.q, 3), apart(queries.low, 1), apart(queries.high, 1), apart(queries.counts, 2))
    run = functools.partial(_attend, request)

    reach = request.window + block if request.window else total  # Keys that one block of queries can see.
    if reach < total:

        def local(sums, xs):
            step, part = xs
            start = jnp.clip((step + 1) * block - reach, 0, total - reach)
            seen = run(part, [own.cut(start, reach), *past])
            if number:
                column = lax.dynamic_slice_in_dim(sums[0], start, reach, 4) + seen.sums[0]
                sums = (
                    lax.dynamic_update_slice_in_dim(sums[0], column, start, 4),
                    [a + b for a, b in zip(sums[1], seen.sums[1:], strict=True)],
                )
            return sums, seen._replace(sums=[])

        sums, seen = lax.scan(local, sums, (jnp.arange(blocks), steps))
    else:
        parts, size = [], -(-blocks // 8)
        for first in range(0, blocks, size):
            last = min(first + size, blocks)
            end = last * block

            def prefix(sums, part, end=end):
                seen = run(part, [own.first(end), *past])
                if number:
                    sums = (
                        sums[0].at[..., :end].add(seen.sums[0]),
                        [a + b for a, b in zip(sums[1], seen.sums[1:], strict=True)],
                    )
                return sums, seen._replace(sums=[])

            sums, seen = lax.scan(prefix, sums, Queries(*(x[first:last] for x in steps)))
            parts.append(seen)
        seen = jax.tree.map(lambda *xs: jnp.concatenate(xs), *parts) if len(parts) > 1 else parts[0]

    def together(x: Array) -> Array:
        """[blocks, B, H, G, t, ...] -> [B, H, G, T, ...]."""
        return jnp.moveaxis(x, 0, 3).reshape(batch, kv_heads, group, total, *x.shape[5:])

    return jax.tree.map(together, seen), *sums


def _attend(request: Request, queries: Queries, stores: Sequence[Store]) -> Seen:
    """One block of queries over all stores."""
    asked = request.statistics
    batch, kv_heads, group, length, _ = queries.q.shape
    weights, top, total = _weights(queries.q, queries.low, queries.high, stores, request.softcap)
    out = [
        dot_values(x.reshape(batch, kv_heads, group * length, -1), store.v)
        for (x, _), store in zip(weights, stores, strict=True)
    ]
    out = functools.reduce(operator.add, out).reshape(batch, kv_heads, group, length, -1).astype(request.v.dtype)
    lse = entropy = None
    if asked.lse or asked.entropy:
        lse = jnp.where(top > NEG, top + jnp.log(total), NEG)
    if asked.entropy and lse is not None:
        mean = functools.reduce(operator.add, [(x * logits).sum(-1) for x, logits in weights])
        entropy = jnp.where(top > NEG, jnp.maximum(lse - mean, 0.0), 0.0)

    def column(index: int, x: Array) -> Array:
        plain = asked.column_sums[index].plain
        return (x if plain else x * queries.counts[index][:, None, None, :, None]).sum(3)

    number = range(len(asked.column_sums))
    sums = [jnp.stack([column(i, x) for i in number]) for x, _ in weights] if number else []
    return Seen(out, lse if asked.lse else None, entropy, sums)


def _weights(
    q: Array, low: Array, high: Array, stores: Sequence[Store], softcap: float
) -> tuple[list[tuple[Array, Array]], Array, Array]:
    """Softmax of q [B, H, G, t, D] over the keys of all stores together.

    Returns:
      For every store weights and logits [B, H, G, t, S] float32; the largest logit and the sum of exponentials
      relative to it [B, H, G, t].
    """
    batch, kv_heads, group, length, dim = q.shape
    rows = q.reshape(batch, kv_heads, group * length, dim)
    masks = [sees(low, high, store.place)[:, :, None] for store in stores]
    logits = [dot_keys(rows, store.k).reshape(batch, kv_heads, group, length, -1) for store in stores]
    logits = [softcap * jnp.tanh(x / softcap) if softcap else x for x in logits]
    logits = [jnp.where(mask, x, NEG) for x, mask in zip(logits, masks, strict=True)]
    top = functools.reduce(jnp.maximum, [x.max(-1, keepdims=True) for x in logits])
    weights = [jnp.exp(x - top) * mask for x, mask in zip(logits, masks, strict=True)]
    total = jnp.maximum(functools.reduce(operator.add, [x.sum(-1, keepdims=True) for x in weights]), 1e-30)
    weights = [x / total for x in weights]
    return list(zip(weights, logits, strict=True)), top[..., 0], total[..., 0]


def _pad(x: Array, axis: int, size: int, value: int) -> Array:
    """At least `size` along an axis."""
    widths = [(0, size - x.shape[axis] if i == axis else 0) for i in range(x.ndim)]
    return x if x.shape[axis] == size else jnp.pad(x, widths, constant_values=value)
