"""Arrays that live in the host's memory while a device computes with small parts of them.

JAX calls this memory "pinned_host"; an array's type says in which space it is, inside `jit` too, so nothing here asks
for the platform while it computes. A CPU's memory is the host's already, and arrays stay as they are there.
"""

import collections
from typing import Any

import jax
from jax import Array, lax
from jax.experimental import compute_on

# A function of a function; JAX 0.10 has it beside a context manager of the shorter name, later ones in its place.
run_on: Any = getattr(compute_on, "compute_on2", compute_on.compute_on)
HOST, DEVICE = jax.memory.Space.Host, jax.memory.Space.Device


def to_host(x: Array) -> Array:
    """The same array in the host's memory, from where `fetch` reads it; on CPUs, as it is."""
    return x if jax.default_backend() == "cpu" else jax.device_put(x, HOST)


def on_host(x: Any) -> bool:
    """Whether an array is in the host's memory and not in the device's."""
    return jax.typeof(x).memory_space == HOST


def fetch(x: Array, index: Array) -> Array:
    """Entries index [B, H, K] of x [B, H, N, ...] on the device: [B, H, K, ...]. Indices must be inside.

    From the host's memory only these entries cross the link: the host gathers them.
    """
    if not on_host(x):
        return _gather(x, index)
    # Nothing but the gather: in this space every operand must be the host's, constants included.
    there = run_on(_gather, compute_type="device_host", out_memory_spaces=DEVICE)
    return there(x, jax.device_put(index, HOST))


def to_device(x: Array) -> Array:
    """All of an array on the device."""
    return jax.device_put(x, DEVICE) if on_host(x) else x


def take_rows(x: Array, index: Any) -> Array:
    """x[index], an array of batch rows or a slice, in the memory where x is."""
    return jax.device_put(to_device(x)[index], HOST) if on_host(x) else x[index]


def memory_nbytes(tree: Any) -> dict[str, int]:
    """Bytes of a tree of concrete arrays by the memory they are in: {"device": ..., "pinned_host": ...}."""
    found: collections.Counter[str] = collections.Counter()
    for leaf in jax.tree.leaves(tree):
        found[leaf.sharding.memory_kind] += leaf.nbytes
    return dict(found)


def _gather(x: Array, index: Array) -> Array:
    numbers = lax.GatherDimensionNumbers(
        offset_dims=tuple(range(3, x.ndim)),
        collapsed_slice_dims=(2,),
        start_index_map=(2,),
        operand_batching_dims=(0, 1),
        start_indices_batching_dims=(0, 1),
    )
    sizes = (1, 1, 1, *x.shape[3:])
    return lax.gather(x, lax.expand_dims(index, (3,)), numbers, sizes, mode=lax.GatherScatterMode.PROMISE_IN_BOUNDS)
