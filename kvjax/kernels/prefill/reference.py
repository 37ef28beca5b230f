"""Prefill attention as its definition says, everything dense and in float32: what the other implementations equal."""

import jax.numpy as jnp
from jax import Array

from kvjax.kernels.parts import NEG
from kvjax.kernels.prefill.request import Prefill, Request
from kvjax.kernels.prefill.statistics import ColumnSums, query_weights, sees


def prefill(request: Request) -> Prefill:
    """The answer to a request; materialises the whole attention matrix."""
    batch, heads, group, length, dim = request.q.shape
    asked = request.statistics
    k, v, place = _keys(request)
    mask = sees(request.low, request.place, place)[:, :, None]  # [B, 1 or H, 1, T, S]
    logits = jnp.einsum("bhgtd,bhsd->bhgts", request.q.astype(jnp.float32), k)
    logits = request.softcap * jnp.tanh(logits / request.softcap) if request.softcap else logits
    logits = jnp.where(mask, logits, NEG)
    top = logits.max(-1, keepdims=True)
    weights = jnp.where(mask, jnp.exp(logits - top), 0.0)
    total = weights.sum(-1, keepdims=True)
    weights = weights / jnp.where(total > 0, total, 1.0)
    lse = jnp.where(total > 0, top + jnp.log(jnp.where(total > 0, total, 1.0)), NEG)[..., 0]
    rows = lambda x: x.reshape(batch, heads * group, *x.shape[3:])  # noqa: E731

    counts = query_weights(asked.column_sums, request.age, request.place >= 0)

    def column_sum(sums: ColumnSums, count: Array) -> Array:
        count = count[:, None, None, :, None]
        received = (weights * count).sum(3)
        if sums.normalized:
            seen = (mask * count).sum(3)
            received = jnp.where(seen > 0, received / jnp.where(seen > 0, seen, 1.0), 0.0)
        return rows(received)

    return Prefill(
        out=rows(jnp.einsum("bhgts,bhsd->bhgtd", weights, v)).astype(request.v.dtype),
        lse=rows(lse) if asked.lse else None,
        entropy=rows(-(weights * jnp.log(jnp.where(weights > 0, weights, 1.0))).sum(-1)) if asked.entropy else None,
        column_sums=tuple(column_sum(*pair) for pair in zip(asked.column_sums, counts, strict=True)),
        window=rows(_last(weights, request.place, asked.window)) if asked.window else None,
    )


def _keys(request: Request) -> tuple[Array, Array, Array]:
    """All keys and values [B, H, S, D] float32, zero where there is no token, and their places [B, 1 or H, S]."""
    own = request.place[:, None]
    stores = [(request.k, request.v, own)]
    if request.past is not None:
        heads = request.past.pos.shape[1]
        own = jnp.broadcast_to(own, (own.shape[0], heads, own.shape[2]))
        stores = [(request.past.k, request.past.v, request.past_place), (request.k, request.v, own)]
    place = jnp.concatenate([store[2] for store in stores], -1)
    k, v = (jnp.concatenate([store[i].astype(jnp.float32) for store in stores], 2) for i in (0, 1))
    held = (place >= 0)[..., None]
    return jnp.where(held, k, 0.0), jnp.where(held, v, 0.0), place


def _last(weights: Array, place: Array, window: int) -> Array:
    """Weights of each row's last queries: [B, H, G, T, S] -> [B, H, G, W, S]."""
    present = place >= 0
    last = jnp.where(present, jnp.arange(place.shape[1]), -1).max(1)
    index = last[:, None] - window + 1 + jnp.arange(window)  # [B, W]
    taken = jnp.take_along_axis(weights, jnp.maximum(index, 0)[:, None, None, :, None], 3)
    return jnp.where((index >= 0)[:, None, None, :, None], taken, 0.0)
