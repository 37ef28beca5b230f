"""Where every array lies: one table from a model's and a cache's arrays to logical axes, one from these to the mesh.

    rows of a batch    "data"
    KV heads           "model", where their number divides
    slots              "seq", and "model" besides where heads do not lie there
    query heads, channels of the MLP, vocabulary      "model"

Everything else is whole on every device: norms, and the few latest tokens that some layouts keep as they are.
"""

import dataclasses
from typing import Any

import jax
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kvjax.cache import Cache
from kvjax.kernels.mesh import DATA, MODEL, SEQ, Spread, spread_on
from kvjax.models.config import Config
from kvjax.models.params import AXES as PARAM_AXES
from kvjax.sharding.mesh import MeshError

# Of a parameter's logical axes (`models.params.AXES`), those that lie along "model".
MODEL_AXES = ("heads", "kv_heads", "query_heads", "mlp", "vocab")

ROW, HEAD, SLOT = ("batch",), ("batch", "heads"), ("batch", "heads", "slots")
# Of every class that a cache is made of: the logical axes of its arrays, leading ones first. Fields that are missing
# here hold other such classes.
CACHE_AXES: dict[str, dict[str, tuple[str, ...]]] = {
    "Slots": {"k": SLOT, "v": SLOT, "pos": SLOT, "marks": SLOT, "limit": ROW, "memo": ROW},
    "GroupedSlots": {"k": SLOT, "v": SLOT, "k_recent": HEAD, "v_recent": HEAD, "order": HEAD},
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


def check_mesh(config: Config, mesh: Mesh) -> None:
    """Raises `MeshError` where a model cannot lie on a mesh; says which number of devices could."""
    size = mesh.shape.get(MODEL, 1)
    for what, number in (("query heads", config.num_heads), ("channels of the MLP", config.mlp_size)):
        if number % size:
            fit = [n for n in range(1, number + 1) if config.num_heads % n == 0 and config.mlp_size % n == 0]
            raise MeshError(
                f"The model's {number} {what} do not divide over model={size}. Sizes of this axis that go with it: "
                f"{', '.join(map(str, fit))}."
            )


def param_shardings(params: Any, config: Config, mesh: Mesh) -> Any:
    """Where each parameter lies: the same pytree, of `NamedSharding`.

    Args:
      params: Arrays or their shapes, one dict per layer or stacked. config: The model. mesh: Of `make_mesh`.

    Raises:
      MeshError: The model's heads or MLP do not divide over "model".
    """
    check_mesh(config, mesh)
    size = mesh.shape.get(MODEL, 1)
    whole = {"kv_heads"} if config.num_kv_heads % size else set()  # No head is cut: slots then lie along "model".

    def place(path: Any, leaf: Any) -> NamedSharding:
        axes = PARAM_AXES.get(path[-1].key, ())  # What methods have trained is everywhere.
        axes = ("",) * (len(leaf.shape) - len(axes)) + axes if axes else ()  # Stacked layers have an axis in front.
        along = [
            MODEL if name in MODEL_AXES and name not in whole and number % size == 0 else None
            for name, number in zip(axes, leaf.shape, strict=False)
        ]
        return NamedSharding(mesh, PartitionSpec(*along))

    return jax.tree_util.tree_map_with_path(place, params)


def cache_shardings(cache: Cache, mesh: Mesh) -> Any:
    """Where each array of a cache lies: the same pytree, of `NamedSharding`. Arrays in the host's memory stay there."""
    sizes = {name: mesh.shape[name] for name in (DATA, SEQ, MODEL) if mesh.shape.get(name, 1) > 1}
    rows = spread_on(sizes, cache.batch_size, 1)
    specs = dataclasses.replace(
        jax.tree.map(lambda leaf: rows.spec(leaf.shape, *ROW), cache),
        layers=tuple(_layer_specs(layer, sizes) for layer in cache.layers),
    )
    if dataclasses.is_dataclass(cache.shared):
        specs = dataclasses.replace(specs, shared=_layer_specs(cache.shared, sizes))

    def place(leaf: Any, spec: PartitionSpec) -> NamedSharding:
        memory = getattr(getattr(leaf, "sharding", None), "memory_kind", None)
        return NamedSharding(mesh, spec, memory_kind=memory)

    return jax.tree.map(place, cache, specs)


def _layer_specs(layer: Any, sizes: dict[str, int]) -> Any:
    """Where the arrays of a layer, or of a part of one, lie: the same pytree, of `PartitionSpec`."""
    axes = CACHE_AXES.get(type(layer).__name__, {})
    mine = _spread(layer, axes, sizes)

    def place(value: Any) -> Any:
        if isinstance(value, tuple | list):
            return type(value)(place(item) for item in value)
        if dataclasses.is_dataclass(value):
            return _layer_specs(value, sizes)
        if value is None:
            return None
        raise MeshError(
            f"{type(layer).__name__} holds a {type(value).__name__} of which CACHE_AXES does not say where it lies."
        )

    fields = [field.name for field in dataclasses.fields(layer) if not field.metadata.get("static")]
    specs = {
        name: mine.specs(getattr(layer, name), *axes[name]) if name in axes else place(getattr(layer, name))
        for name in fields
    }
    return dataclasses.replace(layer, **specs)


def _spread(layer: Any, axes: dict[str, tuple[str, ...]], sizes: dict[str, int]) -> Spread:
    """How a layer lies: all its arrays alike, on as many devices as divide each."""
    arrays = [(leaf, axes[name]) for name in axes for leaf in jax.tree.leaves(getattr(layer, name))]
    if not arrays:
        return Spread()
    heads = [leaf.shape[names.index("heads")] for leaf, names in arrays if "heads" in names]
    slots = [leaf.shape[names.index("slots")] for leaf, names in arrays if "slots" in names]
    return spread_on(sizes, arrays[0][0].shape[0], max(heads, default=1), slots or [1])


def shard_params(params: Any, config: Config, mesh: Mesh) -> Any:
    """Parameters on a mesh; see `param_shardings`."""
    return jax.device_put(params, param_shardings(params, config, mesh))


def shard_cache(cache: Cache, mesh: Mesh) -> Cache:
    """A cache on a mesh, with as many empty slots as make them divide; see `cache_shardings`."""
    with jax.set_mesh(mesh):
        cache = dataclasses.replace(cache, layers=tuple(layer.even() for layer in cache.layers))
    return jax.device_put(cache, cache_shardings(cache, mesh))


def shard_batch(tokens: Any, mesh: Mesh) -> Array:
    """Ids [B, T], or anything with one row for each sequence, on a mesh.

    Raises:
      MeshError: The rows do not divide over "data".
    """
    size = mesh.shape.get(DATA, 1)
    if tokens.shape[0] % size:
        raise MeshError(f"A batch of {tokens.shape[0]} rows does not divide over data={size}.")
    return jax.device_put(tokens, NamedSharding(mesh, PartitionSpec(DATA)))
