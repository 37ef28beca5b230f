"""Writing tokens as a scatter, taking them as a gather: what other implementations equal."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array


def put(leaves: Any, slot: Array, values: Any) -> Any:
    """Writes T tokens into their slots.

    Args:
      leaves: A pytree of arrays [B, H or 1, S, ...].
      slot: Where each token goes [B, 1 or H, T] int32; outside `0 ... S - 1` nothing is written. No slot comes twice.
      values: What is written there, a pytree of arrays [B, H or 1, T, ...].

    Returns:
      The leaves with the tokens.
    """

    def one(leaf: Array, value: Array) -> Array:
        batch, heads = jnp.arange(leaf.shape[0])[:, None, None], jnp.arange(leaf.shape[1])[None, :, None]
        index = jnp.where(slot < 0, leaf.shape[2], slot)
        return leaf.at[batch, heads, index].set(value.astype(leaf.dtype), mode="drop")

    return jax.tree.map(one, leaves, values)


def take(leaves: Any, slot: Array) -> Any:
    """Takes T tokens from their slots.

    Args:
      leaves: A pytree of arrays [B, H or 1, S, ...].
      slot: Where each token lies [B, 1 or H, T] int32; outside `0 ... S - 1` the nearest slot is taken.

    Returns:
      A pytree of arrays [B, H or 1, T, ...]: one head only where leaf and slots have no more.
    """

    def one(leaf: Array) -> Array:
        heads = max(leaf.shape[1], slot.shape[1])
        leaf = jnp.broadcast_to(leaf, (leaf.shape[0], heads, *leaf.shape[2:]))
        index = jnp.broadcast_to(slot, (slot.shape[0], heads, slot.shape[2])).clip(0, leaf.shape[2] - 1)
        return jnp.take_along_axis(leaf, index.reshape(index.shape + (1,) * (leaf.ndim - 3)), axis=2)

    return jax.tree.map(one, leaves)
