"""Which blocks of queries see which blocks of keys: what the kernels of all devices know before they start."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

FAR = jnp.iinfo(jnp.int32).max


class Tiles(NamedTuple):
    """Heads, queries and keys of a block."""

    heads: int
    queries: int
    keys: int


class Tables(NamedTuple):
    """What the kernels know ahead of the grid, int32, flat: the range of every block of queries and keys, so that the
    two can be told to be visible as a whole; and the first and last partner of each block (last < first: none).
    """

    first: Array
    last: Array
    q_low: Array
    q_high: Array
    k_low: Array
    k_high: Array


def make_tables(low: Array, high: Array, place: Array, tiles: Tiles, counted: Array | None = None) -> Tables:
    """Tables for a block of queries and the keys it sees; with `counted`, for a block of keys and the queries that see
    it and count in some sum.

    Args:
      low, high: [B, T], T a multiple of the block. place: [B, 1 or H, S], likewise. counted: Which queries [B, T] bool.
    """
    queries = lambda x: x.reshape(x.shape[0], -1, tiles.queries)  # noqa: E731
    low, high, k = queries(low), queries(high), place.reshape(*place.shape[:2], -1, tiles.keys)
    seeing, held = high >= 0, k >= 0
    furthest, least = high.max(-1), jnp.where(seeing, low, FAR).min(-1)
    newest, oldest = k.max(-1), jnp.where(held, k, FAR).min(-1)
    # [B, 1 or H, blocks of queries, blocks of keys]
    needed = (oldest[:, :, None] <= furthest[:, None, :, None]) & (newest[:, :, None] >= least[:, None, :, None])
    if counted is not None:
        needed = jnp.swapaxes(needed & queries(counted).any(-1)[:, None, :, None], 2, 3)
    last = needed.shape[-1] - 1 - jnp.argmax(needed[..., ::-1], -1)
    tables = Tables(
        first=jnp.argmax(needed, -1),
        last=jnp.where(needed.any(-1), last, -1),
        # Visible as a whole: every key is there, none before the latest start, none after the earliest query.
        q_low=low.max(-1),
        q_high=high.min(-1),
        k_low=k.min(-1),
        k_high=newest,
    )
    return Tables(*(x.astype(jnp.int32).reshape(-1) for x in tables))


def pad(x: Array, axis: int, size: int, value: int) -> Array:
    """Exactly `size` along an axis."""
    if x.shape[axis] == size:
        return x
    return jnp.pad(x, [(0, size - n if i == axis else 0) for i, n in enumerate(x.shape)], constant_values=value)
