"""How arrays [B, H, S, ...] lie on the mesh in use, and kernels that work on every device's own part.

The mesh is the one that `jax.set_mesh` has set. Of its axes "data", "seq" and "model" are used: rows of a batch lie
along "data"; KV heads along "model" where their number divides; slots along "seq", and along "model" besides where
heads do not. So a cache is spread over all devices whatever its number of heads, and none stores what another does.

XLA's partitioner places what is written in plain JAX. It does not look into a Pallas kernel, and it would collect a
cache to loop over its blocks; what touches a cache therefore runs under `jax.shard_map`, by these rules.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from kvjax.kernels.parts import NEG, Part

DATA, SEQ, MODEL = "data", "seq", "model"
Axes = tuple[str, ...]


class MeshError(ValueError):
    """A mesh, or what is to lie on it, does not go together; the message says what would."""


@dataclasses.dataclass(frozen=True)
class Spread:
    """Mesh axes along which arrays [B, H, S, ...] lie.

    Attributes:
      batch, heads, slots: Names of mesh axes; () where an axis is whole on every device.
      sizes: Devices along each mesh axis that is used.
    """

    batch: Axes = ()
    heads: Axes = ()
    slots: Axes = ()
    sizes: tuple[tuple[str, int], ...] = ()

    def devices(self, axes: Axes) -> int:
        """Devices along mesh axes."""
        return math.prod(dict(self.sizes)[name] for name in axes)

    def spec(self, shape: Sequence[int], *names: str) -> PartitionSpec:
        """Where an array of a shape lies, its leading axes being "batch", "heads", "slots" or "" for another one.

        An axis that does not divide is whole: one head for all, one scale for all slots.
        """
        mine = {"batch": self.batch, "heads": self.heads, "slots": self.slots, "": ()}
        parts = [
            mine[name] if mine[name] and size % self.devices(mine[name]) == 0 else None
            for name, size in zip(names, shape, strict=False)
        ]
        return PartitionSpec(*parts)

    def specs(self, tree: Any, *names: str) -> Any:
        """`spec` of every array of a pytree."""
        return jax.tree.map(lambda leaf: self.spec(leaf.shape, *names), tree)

    def first(self, slots: int) -> Array:
        """Inside `shard_map`: the first of a device's slots, of which it has so many."""
        return lax.axis_index(self.slots).astype(jnp.int32) * slots


def axes_in_use() -> dict[str, int]:
    """Devices along each axis of the mesh in use that arrays may lie along; none inside a `shard_map` over them."""
    return used(jax.sharding.get_abstract_mesh())


def used(mesh: Mesh | AbstractMesh) -> dict[str, int]:
    """`axes_in_use` of any mesh."""
    if mesh.empty:
        return {}
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    mine = (name for name in (DATA, SEQ, MODEL) if name in kinds and kinds[name] != AxisType.Manual)
    return {name: mesh.shape[name] for name in mine if mesh.shape[name] > 1}


def placed(value: Any, spec: PartitionSpec) -> Array:
    """A host's array on the mesh that `jax.set_mesh` has set, every device given its part alone; all processes have
    the same array."""
    sharding = NamedSharding(jax.sharding.get_mesh(), spec)
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])


def spread(batch: int, heads: int, slots: Sequence[int] = ()) -> Spread:
    """How arrays of one layer lie on the mesh in use.

    Args:
      batch, heads: Rows and KV heads.
      slots: Lengths of the slots' axis, of every array that has one: slots lie along as many devices as divide all.
        One place for all slots divides by anything.
    """
    return spread_on(axes_in_use(), batch, heads, slots)


def spread_on(sizes: Mapping[str, int], batch: int, heads: int, slots: Sequence[int] = ()) -> Spread:
    """`spread` on a mesh with so many devices along each axis."""

    def divides(axes: Axes, number: int) -> bool:
        return number % math.prod(sizes[name] for name in axes) == 0

    of_batch = (DATA,) if DATA in sizes and divides((DATA,), batch) else ()
    of_heads = (MODEL,) if MODEL in sizes and divides((MODEL,), heads) else ()
    rest = tuple(name for name in (SEQ, MODEL) if name in sizes and name not in of_heads)
    wide = [number for number in slots if number > 1]
    candidates = [rest, *((name,) for name in rest), ()]
    of_slots = next(axes for axes in candidates if all(divides(axes, number) for number in wide))
    return Spread(of_batch, of_heads, of_slots if wide or not slots else (), tuple(sizes.items()))


def shares(heads: int) -> int:
    """Parts that the slots of a layer with so many KV heads are divided into on the mesh in use; 1 without one."""
    mine = spread(1, heads)
    return mine.devices(mine.slots)


def even(slots: int, heads: int, unit: int = 1) -> int:
    """So many slots, or a few more, so that each device gets equally many whole units of them."""
    whole = unit * shares(heads)
    return -(-slots // whole) * whole


def alone() -> AbstractContextManager[Any]:
    """Without a mesh: what is traced inside is as on one device."""
    return jax.sharding.use_abstract_mesh(AbstractMesh((), ()))


def gathered(tree: Any) -> Any:
    """Arrays [B, ...], all of their rows' parts on every device, before anything else is done with them."""
    sizes = axes_in_use()
    if not sizes:
        return tree

    def whole(x: Array) -> Array:
        return lax.with_sharding_constraint(x, spread_on(sizes, x.shape[0], 1).spec(x.shape, "batch"))

    return lax.optimization_barrier(jax.tree.map(whole, tree))


def tokens_apart(x: Array) -> Array:
    """x [B, T, ...] with rows along "data" and tokens along "seq" of the mesh in use, where they divide."""
    sizes = axes_in_use()
    if not sizes:
        return x
    along = [name if x.shape[i] % sizes.get(name, 1) == 0 else None for i, name in enumerate((DATA, SEQ))]
    return lax.with_sharding_constraint(x, PartitionSpec(*(name if name in sizes else None for name in along)))


def on_mesh(f: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """`f` on every device's own part of its arguments."""
    return jax.shard_map(f, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def merge_shards(part: Part, axes: Axes) -> Part:
    """Inside `shard_map`: attention over the slots of all devices along axes, from each device's own.

    Two reductions, of one number per query and of its output.
    """
    if not axes:
        return part
    top = lax.pmax(part.lse, axes)
    share = jnp.where(part.lse > NEG, jnp.exp(part.lse - top), 0.0)[..., None]
    summed = lax.psum(jnp.concatenate([part.out * share, share], -1), axes)
    total = jnp.maximum(summed[..., -1], 1e-30)
    lse = jnp.where(summed[..., -1] > 0, top + jnp.log(total), NEG)
    return Part(out=summed[..., :-1] / total[..., None], lse=lse, logits=part.logits)
