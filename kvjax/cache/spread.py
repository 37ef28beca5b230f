"""Where the arrays of a cache lie on a mesh: one table of their logical axes.

Rows of a batch lie along "data", KV heads along "model" where their number divides, slots along "seq", and along
"model" besides where heads do not (see `kernels.mesh`). What has none of these axes is whole on every device: the few
latest tokens that some layouts keep as they are.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import PartitionSpec

from kvjax.cache.types import Cache
from kvjax.kernels.mesh import Spread, axes_in_use, spread_on

ROW, HEAD, SLOT = ("batch",), ("batch", "heads"), ("batch", "heads", "slots")
# Of every class that a cache is made of: the logical axes of its arrays, leading ones first. Fields that are missing
# here hold other such classes.
CACHE_AXES: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "Slots": {"k": SLOT, "v": SLOT, "pos": SLOT, "marks": SLOT, "limit": ROW, "memo": ROW},
    "GroupedSlots": {"k": SLOT, "v": SLOT, "k_recent": HEAD, "v_recent": HEAD, "order": SLOT},
    "Pages": {
        "k": ("batch", "slots"),
        "v": ("batch", "slots"),
        "page_pos": ("batch", "slots"),
        "owner": ROW,
        "k_tail": HEAD,
        "v_tail": HEAD,
        "tail_pos": HEAD,
    },
    "GearSlots": {"k_buffer": HEAD, "v_buffer": HEAD, "pos": HEAD},
    "Blocks": {
        "packed": SLOT,
        "outliers": HEAD,
        "index": HEAD,
        "left": ("batch", "heads", "", "slots"),
        "right": HEAD,
    },
    "Paired": {"pos": SLOT, "new_pos": HEAD},
    "Own": {"norm": SLOT, "kept": HEAD, "new": HEAD},
    "Store": {"k": SLOT, "v": SLOT, "k_slot": HEAD, "v_slot": HEAD},
    "BoundedPages": {"low": SLOT, "high": SLOT},
    "FarChunks": {
        "u": ROW,
        "basis": HEAD,
        "v": HEAD,
        "landmarks": HEAD,
        "chunks": HEAD,
        "where": HEAD,
        "reads": ROW,
        "length": ROW,
    },
    "Balance": {"factor": HEAD},
    "Channels": {"index": HEAD},
}
# Arrays that have slots of their own, other than the rest of the layer's: they lie by themselves.
APART: Mapping[str, tuple[str, ...]] = {"GroupedSlots": ("order",)}


def layer_specs(layer: Any, sizes: Mapping[str, int]) -> Any:
    """Where the arrays of a layer, or of a part of one, lie: the same pytree, of `PartitionSpec`.

    Args:
      layer: Arrays or their shapes.
      sizes: Devices along each axis of the mesh.

    Raises:
      TypeError: `CACHE_AXES` does not say.
    """
    axes = CACHE_AXES.get(type(layer).__name__, {})
    apart = APART.get(type(layer).__name__, ())
    together = _spread(layer, {name: axes[name] for name in axes if name not in apart}, sizes)
    spreads = {name: _spread(layer, {name: axes[name]}, sizes) if name in apart else together for name in axes}

    def place(value: Any) -> Any:
        if isinstance(value, tuple | list):
            return type(value)(place(item) for item in value)
        if dataclasses.is_dataclass(value):
            return layer_specs(value, sizes)
        if value is None:
            return None
        raise TypeError(
            f"{type(layer).__name__} holds a {type(value).__name__} of which CACHE_AXES does not say where it lies."
        )

    fields = [field.name for field in dataclasses.fields(layer) if not field.metadata.get("static")]
    specs = {
        name: spreads[name].specs(getattr(layer, name), *axes[name]) if name in axes else place(getattr(layer, name))
        for name in fields
    }
    return dataclasses.replace(layer, **specs)


def cache_specs(cache: Cache, sizes: Mapping[str, int]) -> Any:
    """`layer_specs` of a whole cache."""
    rows = spread_on(sizes, cache.batch_size, 1)
    shared = cache.shared
    if dataclasses.is_dataclass(shared):
        shared = layer_specs(shared, sizes)
    else:
        shared = rows.specs(shared, *ROW)
    layers = tuple(layer_specs(layer, sizes) for layer in cache.layers)
    return dataclasses.replace(cache, layers=layers, seen=rows.spec(cache.seen.shape, *ROW), shared=shared)


def settled(layer: Any) -> Any:
    """The same layer, its arrays where the table says that they lie on the mesh in use."""
    sizes = axes_in_use()
    return jax.tree.map(_constrain, layer, layer_specs(layer, sizes)) if sizes else layer


def _constrain(leaf: Any, spec: PartitionSpec) -> Any:
    on_device = jax.typeof(leaf).memory_space == jax.memory.Space.Device
    return jax.lax.with_sharding_constraint(leaf, spec) if on_device else leaf


def _spread(layer: Any, axes: Mapping[str, tuple[str, ...]], sizes: Mapping[str, int]) -> Spread:
    """How arrays of a layer lie: all alike, on as many devices as divide each."""
    arrays = [(leaf, axes[name]) for name in axes for leaf in jax.tree.leaves(getattr(layer, name))]
    if not arrays:
        return Spread()
    heads = [leaf.shape[names.index("heads")] for leaf, names in arrays if "heads" in names]
    slots = [leaf.shape[names.index("slots")] for leaf, names in arrays if "slots" in names]
    return spread_on(sizes, arrays[0][0].shape[0], max(heads, default=1), slots or [1])
