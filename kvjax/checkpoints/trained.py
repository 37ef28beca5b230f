"""What methods have trained for a model, in a file of its own beside the model's: `trained.safetensors`.

Names are paths in the parameters, "layers.3.trained.locret.w1"; `load_checkpoint` adds them when a folder has the file.
"""

import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
from safetensors import SafetensorError
from safetensors.flax import load_file, save_file

from kvjax.checkpoints.check import CheckpointError
from kvjax.models.config import Config
from kvjax.models.params import layer_params

FILE = "trained.safetensors"


def save_trained(
    folder: str | os.PathLike[str], params: dict[str, Any], config: Config, dtype: Any = jnp.bfloat16
) -> pathlib.Path:
    """Writes what methods have trained for each layer of `params` to a folder, and returns the file.

    Raises:
      ValueError: There is nothing of the kind.
    """
    leaves = {
        f"layers.{i}.trained." + jax.tree_util.keystr(path, simple=True, separator="."): leaf.astype(dtype)
        for i, layer in enumerate(layer_params(params, config))
        for path, leaf in jax.tree_util.tree_leaves_with_path(layer.get("trained", {}))
    }
    if not leaves:
        raise ValueError("No method has trained anything for these parameters.")
    path = pathlib.Path(folder) / FILE
    save_file(leaves, path)
    return path


def with_trained(params: dict[str, Any], config: Config, folder: pathlib.Path) -> dict[str, Any]:
    """Parameters, one dict per layer, with what the folder's file adds to them; as they are if it has none.

    Raises:
      CheckpointError: The file is corrupt or belongs to another model.
    """
    path = folder / FILE
    if not path.is_file():
        return params
    try:
        leaves = load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is corrupt: {error}. Copy it again; the model itself needs no such file."
        ) from None
    layers = [dict(layer) for layer in params["layers"]]
    for name, leaf in leaves.items():
        parts = name.split(".")
        if len(parts) < 4 or (parts[0], parts[2]) != ("layers", "trained") or not parts[1].isdigit():
            raise CheckpointError(f'{path}: {name!r} is not of the form "layers.3.trained.<method>...".')
        if int(parts[1]) >= config.num_layers:
            raise CheckpointError(f"{path}: {name!r} is of another model; this one has {config.num_layers} layers.")
        place = layers[int(parts[1])]
        for key in parts[2:-1]:
            place = place.setdefault(key, {})
        place[parts[-1]] = leaf.astype(params["embed"].dtype)
    return {**params, "layers": tuple(layers)}
