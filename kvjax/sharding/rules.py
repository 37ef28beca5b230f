"""Where every array lies: a table from a model's parameters, and one from a cache's arrays (`cache.spread`), to logical
axes, and from these to the mesh.

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
from kvjax.cache.spread import cache_specs
from kvjax.kernels.mesh import DATA, MODEL, SEQ
from kvjax.models.config import Config
from kvjax.models.params import AXES as PARAM_AXES
from kvjax.sharding.mesh import MeshError

# Of a parameter's logical axes (`models.params.AXES`), those that lie along "model".
MODEL_AXES = ("heads", "kv_heads", "query_heads", "mlp", "vocab")


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

    def place(leaf: Any, spec: PartitionSpec) -> NamedSharding:
        memory = getattr(getattr(leaf, "sharding", None), "memory_kind", None)
        return NamedSharding(mesh, spec, memory_kind=memory)

    return jax.tree.map(place, cache, cache_specs(cache, sizes))


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
