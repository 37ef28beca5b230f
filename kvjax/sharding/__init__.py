"""One program on many devices: meshes, and where every array of a model and of a cache lies on them."""

from kvjax.kernels.mesh import MeshError as MeshError
from kvjax.sharding.mesh import make_mesh as make_mesh, parse_mesh as parse_mesh
from kvjax.sharding.rules import (
    cache_shardings as cache_shardings,
    param_shardings as param_shardings,
    shard_batch as shard_batch,
    shard_cache as shard_cache,
    shard_params as shard_params,
)
