"""Writing a few tokens into their slots, in place, and taking a few out of theirs.

On a mesh slots lie on several devices, and each writes its own, unless the caller says that every device has them all:
`whole`, for small buffers.
"""

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import Array, lax

from kvjax.kernels import choose
from kvjax.kernels.choose import Choice, Implementation
from kvjax.kernels.write import reference, sharded

PALLAS = ("tpu",)
T = TypeVar("T")


def put(leaves: Any, slot: Array, values: Any, *, whole: bool = False, implementation: Implementation = "auto") -> Any:
    """Writes T tokens into their slots: in place where the leaves are donated or not used again.

    Args:
      leaves: A pytree of arrays [B, H or 1, S, ...].
      slot: Where each token goes [B, 1 or H, T] int32; outside `0 ... S - 1` nothing is written. No slot comes twice.
      values: What is written there, a pytree of arrays [B, H or 1, T, ...].
      whole: On a mesh, every device has all slots.
      implementation: "auto", "tpu" or "xla" (a scatter).

    Returns:
      The leaves with the tokens.

    Raises:
      KernelError: The implementation that was named cannot serve this.
    """
    mine = sharded.where(leaves, whole)
    if mine is not None:
        local = lambda *own: put(*own, implementation=implementation)  # noqa: E731
        return sharded.put(leaves, slot, values, mine, local)
    name = explain(leaves, slot, implementation).implementation
    if name in ("xla", "reference"):
        return reference.put(leaves, slot, values)
    return _module(name).put(leaves, slot, values, interpret=choose.interpreted(name))


def take(leaves: Any, slot: Array, *, whole: bool = False, implementation: Implementation = "auto") -> Any:
    """Takes T tokens from their slots.

    Args:
      leaves: A pytree of arrays [B, H or 1, S, ...].
      slot: Where each token lies [B, 1 or H, T] int32; outside `0 ... S - 1` the nearest slot is taken.
      whole: On a mesh, every device has all slots; else those who have them hand them to all.
      implementation: "auto", "tpu" or "xla" (a gather).

    Returns:
      A pytree of arrays [B, H or 1, T, ...]: one head only where leaf and slots have no more.

    Raises:
      KernelError: The implementation that was named cannot serve this.
    """
    mine = sharded.where(leaves, whole)
    if mine is not None:
        slot = slot.clip(0, jax.tree.leaves(leaves)[0].shape[2] - 1)
        return sharded.take(leaves, slot, mine, lambda *own: take(*own, implementation=implementation))
    refusals = {name: lambda name=name: _module(name).refuse_take(leaves, slot) for name in PALLAS}
    name = choose.choose(implementation, refusals).implementation
    if name in ("xla", "reference"):
        return reference.take(leaves, slot)
    return _module(name).take(leaves, slot, interpret=choose.interpreted(name))


def gather(leaf: Array, index: Array) -> Array:
    """Any number of tokens from their slots: leaf [B, H or 1, S, ...] at index [B, H or 1, N] -> [B, H or 1, N, ...].

    On a mesh every device gets all of few tokens; more than a device has slots are spread as the slots are.
    """
    heads = max(leaf.shape[1], index.shape[1])
    leaf = jnp.broadcast_to(leaf, (leaf.shape[0], heads, *leaf.shape[2:]))
    index = jnp.broadcast_to(index, (index.shape[0], heads, index.shape[2]))
    mine = sharded.where(leaf, whole=False)
    if mine is None or not mine.slots:
        return jnp.take_along_axis(leaf, index.reshape(index.shape + (1,) * (leaf.ndim - 3)), axis=2)
    if index.shape[2] * mine.devices(mine.slots) <= leaf.shape[2]:
        return sharded.take(leaf, index, mine, reference.take)
    return sharded.gather(leaf, index, mine)


def put_block(leaves: Any, start: Any, values: Any) -> Any:
    """Writes consecutive entries of the third axis, each row's in one piece and in place: a flush of a whole group.

    Args:
      leaves: A pytree of arrays [B, H, S, ...].
      start: The first entry of each row, a pytree like leaves of [B] int32, a multiple of T. A row whose entries
        would not all lie within `0 ... S - 1` stays as it is.
      values: What is written there, a pytree of arrays [B, H, T, ...].
    """
    mine = sharded.where(leaves, whole=False)
    if mine is not None:
        sizes = jax.tree.map(lambda value: value.shape[2], values)
        if not _divides(leaves, sizes, mine):
            mine = dataclasses.replace(mine, slots=())
        return sharded.put(leaves, start, values, mine, put_block)

    def one(leaf: Array, first: Array, value: Array) -> Array:
        fits, size = (first >= 0) & (first + value.shape[2] <= leaf.shape[2]), (1, *value.shape[1:])
        rest = (0,) * (leaf.ndim - 3)

        def row(b: Array, leaf: Array) -> Array:
            at = (b, 0, first[b], *rest)
            new = lax.dynamic_index_in_dim(value, b).astype(leaf.dtype)
            return lax.dynamic_update_slice(leaf, jnp.where(fits[b], new, lax.dynamic_slice(leaf, at, size)), at)

        return lax.fori_loop(0, leaf.shape[0], row, leaf)

    return jax.tree.map(one, leaves, start, values)


def take_block(leaf: Array, start: Array, size: int) -> Array:
    """`size` consecutive entries of the third axis from start [B], a multiple of size, on: leaf [B, H, S, ...] ->
    [B, H, size, ...]."""
    mine = sharded.where(leaf, whole=False)
    if mine is not None:
        mine = mine if _divides(leaf, size, mine) else dataclasses.replace(mine, slots=())
        return sharded.take(
            leaf, start.clip(0, leaf.shape[2] - size), mine, lambda leaf, start: take_block(leaf, start, size)
        )
    rest = (0,) * (leaf.ndim - 3)
    shape = (1, leaf.shape[1], size, *leaf.shape[3:])

    def row(b: Array, taken: Array) -> Array:
        piece = lax.dynamic_slice(leaf, (b, 0, start[b], *rest), shape)
        return lax.dynamic_update_slice(taken, piece, (b, 0, 0, *rest))

    return lax.fori_loop(0, leaf.shape[0], row, jnp.zeros((leaf.shape[0], *shape[1:]), leaf.dtype))


def _divides(leaves: Any, sizes: Any, mine: sharded.Spread) -> bool:
    """Whether blocks of so many entries each lie on one device."""
    parts = mine.devices(mine.slots)
    return all(jax.tree.leaves(jax.tree.map(lambda leaf, size: leaf.shape[2] % (parts * size) == 0, leaves, sizes)))


def when(flag: Array, change: Callable[[T], T], x: T) -> T:
    """`change(x)` if the flag is true, else x; in place. `lax.cond` would copy what its branches hand through."""
    return lax.fori_loop(0, flag.astype(jnp.int32), lambda _, x: change(x), x)


def explain(leaves: Any, slot: Array, implementation: Implementation = "auto") -> Choice:
    """Which implementation writes, and why.

    Raises:
      KernelError: See `put`.
    """
    return choose.choose(
        implementation, {name: lambda name=name: _module(name).refuse(leaves, slot) for name in PALLAS}
    )


def _module(name: str) -> Any:
    return importlib.import_module(f"kvjax.kernels.write.{name}")
