"""Where the parameters of a model lie on a mesh: query and KV heads, channels of the MLP and vocabulary along "model";
norms, and what methods have trained, are whole on every device."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import PartitionSpec

from kvjax.kernels.mesh import MODEL, MeshError
from kvjax.models.config import Config
from kvjax.models.params import AXES

MODEL_AXES = ("heads", "kv_heads", "query_heads", "mlp", "vocab")  # Of `AXES`, those that lie along "model".


def check_mesh(config: Config, sizes: Mapping[str, int]) -> None:
    """Raises `MeshError` where a model cannot lie on a mesh with so many devices along each axis."""
    size = sizes.get(MODEL, 1)
    for what, number in (("query heads", config.num_heads), ("channels of the MLP", config.mlp_size)):
        if number % size:
            most = math.gcd(config.num_heads, config.mlp_size)
            fit = [n for n in range(1, most + 1) if most % n == 0]
            raise MeshError(
                f"The model's {number} {what} do not divide over model={size}. Sizes of this axis that go with it: "
                f"{', '.join(map(str, fit))}."
            )


def param_spec(name: str, shape: Sequence[int], config: Config, sizes: Mapping[str, int]) -> PartitionSpec:
    """Where one parameter lies.

    Args:
      name: Its last name, such as "q_proj". shape: Of the array; stacked layers have an axis in front.
      config: The model. sizes: Devices along each axis of the mesh.
    """
    size = sizes.get(MODEL, 1)
    axes = AXES.get(name, ())
    axes = ("",) * (len(shape) - len(axes)) + axes if axes else ()
    # No KV head is cut: where their number does not divide they are whole, and slots lie along "model".
    whole = ("kv_heads",) if config.num_kv_heads % size else ()
    spread = [axis in MODEL_AXES and axis not in whole and n % size == 0 for axis, n in zip(axes, shape, strict=False)]
    return PartitionSpec(*(MODEL if here and MODEL in sizes else None for here in spread))


def param_specs(params: Any, config: Config, sizes: Mapping[str, int]) -> Any:
    """`param_spec` of all parameters, arrays or their shapes: the same pytree.

    Raises:
      MeshError: The model's heads or MLP do not divide over "model".
    """
    check_mesh(config, sizes)
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: param_spec(path[-1].key, leaf.shape, config, sizes), params
    )
