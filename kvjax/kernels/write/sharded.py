"""Writing and taking tokens on a mesh: the device that has a slot writes it, or hands out what is in it."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from kvjax.kernels.mesh import Spread, axes_in_use, on_mesh, spread

STORED = ("batch", "heads", "slots")
BITS = {1: jnp.int8, 2: jnp.int16, 4: jnp.int32}  # Integers of so many bytes.


def where(leaves: Any, whole: bool) -> Spread | None:
    """How leaves [B, H or 1, S, ...] lie on the mesh in use; None without one.

    Args:
      whole: Every device has all slots.
    """
    if not axes_in_use():
        return None
    arrays = jax.tree.leaves(leaves)
    heads = max(leaf.shape[1] for leaf in arrays)
    return spread(arrays[0].shape[0], heads, (1,) if whole else [leaf.shape[2] for leaf in arrays])


def put(leaves: Any, slot: Any, values: Any, mine: Spread, write: Callable[[Any, Any, Any], Any]) -> Any:
    """`write(leaves, slot, values)` with each device's own slots; others' are below 0 or beyond its last.

    Args:
      leaves: [B, H or 1, S, ...]. values: [B, H or 1, T, ...]. slot: One array [B, 1 or H, T] for all leaves, or a
        pytree like leaves of first entries [B].
    """

    def local(leaves: Any, slot: Any, values: Any) -> Any:
        return write(leaves, _own(leaves, slot, mine), values)

    stored = mine.specs(leaves, *STORED)
    in_specs = (stored, mine.specs(slot, "batch", "heads"), mine.specs(values, "batch", "heads"))
    return on_mesh(local, in_specs, stored)(leaves, slot, values)


def take(leaves: Any, slot: Any, mine: Spread, read: Callable[[Any, Any], Any]) -> Any:
    """`read(leaves, slot)` for tokens that lie anywhere: every device gets all of them [B, H or 1, T, ...].

    Args:
      leaves: As in `put`. slot: [B, 1 or H, T], all within the S slots; or first entries [B] of neighbours.
    """
    many = slot.shape[1] if slot.ndim > 1 else 1  # Heads, whose slots may differ where a leaf has one.

    def local(leaves: Any, slot: Array) -> Any:
        own = _own(leaves, slot, mine)
        taken = read(leaves, own)
        if not mine.slots:
            return taken
        held = (own >= 0) & (own < jax.tree.leaves(leaves)[0].shape[2])
        return jax.tree.map(lambda x: _from_owner(x, held, mine), taken)

    in_specs = (mine.specs(leaves, *STORED), mine.specs(slot, "batch", "heads"))
    out_specs = jax.tree.map(lambda leaf: mine.spec((leaf.shape[0], max(leaf.shape[1], many)), *STORED), leaves)
    return on_mesh(local, in_specs, out_specs)(leaves, slot)


def gather(leaf: Array, index: Array, mine: Spread) -> Array:
    """leaf [B, H, S, ...] at slots index [B, H, N], all within, spread over the devices as slots are: [B, H, N, ...].

    What a device is to hold goes around the ring of all devices, each of which fills in what it has: that takes twice
    the memory of the result and, per device, as much traffic as all of the result, never the leaf.
    """
    parts = mine.devices(mine.slots)
    number = index.shape[2]
    index = jnp.pad(index, ((0, 0), (0, 0), (0, -number % parts)))
    share = index.shape[2] // parts
    following = [(i, (i + 1) % parts) for i in range(parts)]

    def local(leaf: Array, index: Array) -> Array:
        here = lax.axis_index(mine.slots)

        def step(i: Array, held: Array) -> Array:
            whose = (here - i) % parts
            slot = lax.dynamic_slice_in_dim(index, whose * share, share, 2) - mine.first(leaf.shape[2])
            own = (slot >= 0) & (slot < leaf.shape[2])
            wide = lambda x: x.reshape(x.shape + (1,) * (leaf.ndim - 3))  # noqa: E731
            taken = jnp.take_along_axis(leaf, wide(slot.clip(0, leaf.shape[2] - 1)), axis=2)
            return lax.ppermute(jnp.where(wide(own), taken, held), mine.slots, following)

        nothing = jnp.zeros((*leaf.shape[:2], share, *leaf.shape[3:]), leaf.dtype)
        return lax.fori_loop(0, parts, step, nothing)

    shape = (*leaf.shape[:2], index.shape[2])
    specs = (mine.spec(leaf.shape, *STORED), mine.spec(index.shape, "batch", "heads"))
    return on_mesh(local, specs, mine.spec(shape, *STORED))(leaf, index)[:, :, :number]


def _own(leaves: Any, slot: Any, mine: Spread) -> Any:
    """Slots as one device numbers them."""
    if not mine.slots:
        return slot
    if jax.tree.structure(slot) == jax.tree.structure(leaves):
        return jax.tree.map(lambda leaf, slot: slot - mine.first(leaf.shape[2]), leaves, slot)
    return slot - mine.first(jax.tree.leaves(leaves)[0].shape[2])


def _from_owner(x: Array, held: Array, mine: Spread) -> Array:
    """x [B, ...] of the one device where held [B, ...]: its bits, added to the zeros of others, are exact."""
    held = held.reshape(held.shape + (1,) * (x.ndim - held.ndim))
    whole = jnp.issubdtype(x.dtype, jnp.integer)
    bits = x if whole else lax.bitcast_convert_type(x, BITS[x.dtype.itemsize])
    summed = lax.psum(jnp.where(held, bits, 0).astype(jnp.int32), mine.slots).astype(bits.dtype)
    return summed if whole else lax.bitcast_convert_type(summed, x.dtype)
