"""Where every array lies: tables from a model's parameters (`models.spread`) and from a cache's arrays (`cache.spread`)
to logical axes, and from these to the mesh.

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
from kvjax.kernels.mesh import DATA, MeshError, used
from kvjax.models.config import Config
from kvjax.models.spread import param_specs


def param_shardings(params: Any, config: Config, mesh: Mesh) -> Any:
    """Where each parameter lies: the same pytree, of `NamedSharding`.

    Args:
      params: Arrays or their shapes, one dict per layer or stacked. config: The model. mesh: Of `make_mesh`.

    Raises:
      MeshError: The model's heads or MLP do not divide over "model".
    """
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), param_specs(params, config, used(mesh)))


def cache_shardings(cache: Cache, mesh: Mesh) -> Any:
    """Where each array of a cache lies: the same pytree, of `NamedSharding`. Arrays in the host's memory stay there."""

    def place(leaf: Any, spec: PartitionSpec) -> NamedSharding:
        memory = getattr(getattr(leaf, "sharding", None), "memory_kind", None)
        return NamedSharding(mesh, spec, memory_kind=memory)

    return jax.tree.map(place, cache, cache_specs(cache, used(mesh)))


def shard_params(params: Any, config: Config, mesh: Mesh) -> Any:
    """Parameters on a mesh; see `param_shardings`. `kvjax.load` places them by itself under `jax.set_mesh`."""
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
