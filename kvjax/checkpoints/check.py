"""From the tensors of a checkpoint to parameters, or to an error that says which tensor of which file is wrong.

A reader (`gguf.py`, `huggingface.py`) says where each of our parameters lies in its file: a mapping from our names
("embed", "layers.3.q_proj", ...) to `Tensor`. `assemble` walks the parameters that the config calls for, reads one
tensor at a time and checks each, so a wrong checkpoint is refused when it is loaded, not when it speaks nonsense.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.kernels.mesh import placed, used
from kvjax.models.config import Config
from kvjax.models.params import abstract_params
from kvjax.models.spread import check_mesh, param_spec


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file, what is wrong with it and what would be right."""


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One parameter, not read yet.

    Attributes:
      name: What the file calls it, for error messages. Parameters cut from one fused tensor share its name.
      read: Returns it in our layout: matrices [in, out], embeddings [vocab, hidden]; NumPy or JAX, any float dtype.
        Nobody may write to the array afterwards: on CPUs the parameter may be the same memory.
    """

    name: str
    read: Callable[[], Any]


def assemble(config: Config, tensors: Mapping[str, Tensor], source: str, dtype: Any) -> dict[str, Any]:
    """Reads and checks the parameters of a model, one tensor at a time.

    Args:
      config: The architecture; decides which parameters there must be and their shapes.
      tensors: Parameter name ("layers.0.q_proj", as in `parameter_names`) to where it lies. A tensor of the file that
        the reader has no use for stays in the mapping under its own name, so that it is reported.
      source: File or folder, for error messages.
      dtype: Of the parameters, for example `jnp.float32`.

    Returns:
      The pytree of `abstract_params(config, dtype)`, as JAX arrays on the default device, or on the mesh in use: each
      device is then given its part alone.

    Raises:
      CheckpointError: A tensor is missing, unexpected, of the wrong shape, or holds NaN or infinity.
      MeshError: The model does not divide over the mesh in use.
    """
    names, shapes, treedef = _expected(config)
    check_names(expected=names, found=tensors.keys(), source=source)
    sizes = used(jax.sharding.get_mesh())
    check_mesh(config, sizes)

    def place(name: str, value: Any) -> jax.Array:
        if sizes:
            return placed(value, param_spec(name.rpartition(".")[2], value.shape, config, sizes))
        # Not `jnp.asarray`, which always copies: memory aligned to 64 bytes becomes a CPU array as it is.
        return jax.device_put(value)

    pairs = zip(names, shapes, strict=True)
    values = [_read(tensors[name], name, shape, dtype, source, functools.partial(place, name)) for name, shape in pairs]
    return jax.tree.unflatten(treedef, values)


def check_params(config: Config, params: Any, source: str) -> None:
    """Checks a parameter tree that is already in memory.

    Raises:
      CheckpointError: A parameter is missing, unexpected, of the wrong shape, or holds NaN or infinity.
    """
    values = {_dotted(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    # What a method has trained for a layer is its own business.
    values = {name: leaf for name, leaf in values.items() if ".trained." not in name}
    names, shapes, _ = _expected(config)
    check_names(expected=names, found=values.keys(), source=source)
    for name, shape in zip(names, shapes, strict=True):
        _check(values[name], name, shape, source)


def parameter_names(config: Config) -> tuple[str, ...]:
    """Names of the parameters of a model in the order of the leaves, for example "layers.3.q_proj"."""
    return _expected(config)[0]


def check_names(expected: Iterable[str], found: Iterable[str], source: str) -> None:
    """Refuses a checkpoint that lacks a tensor or has one too many, naming up to five."""
    expected, found = set(expected), set(found)
    if missing := expected - found:
        raise CheckpointError(
            f"{source}: {_count(missing)} missing: {_some(missing)}. The file is incomplete, or its settings describe "
            "another model."
        )
    if unexpected := found - expected:
        raise CheckpointError(
            f"{source}: {_count(unexpected)} not expected: {_some(unexpected)}. Ignoring weights would change what the "
            "model computes, so this variant of the architecture is refused."
        )


@functools.lru_cache(maxsize=8)  # Tracing the module that declares the parameters takes a quarter of a second.
def _expected(config: Config) -> tuple[tuple[str, ...], tuple[tuple[int, ...], ...], Any]:
    """Names and shapes of the leaves, and the tree they form."""
    leaves, treedef = jax.tree_util.tree_flatten_with_path(abstract_params(config, jnp.float32))
    return tuple(_dotted(path) for path, _ in leaves), tuple(leaf.shape for _, leaf in leaves), treedef


def _read(
    tensor: Tensor,
    name: str,
    shape: tuple[int, ...],
    dtype: Any,
    source: str,
    place: Callable[[Any], jax.Array],
) -> jax.Array:
    label = name if tensor.name == name else f"{tensor.name} ({name})"
    try:
        value = tensor.read()
    except CheckpointError:
        raise
    except Exception as error:  # Whatever a decoder trips over, the user needs to know in which tensor of which file.
        raise CheckpointError(f"{source}: tensor {label} cannot be read: {error}") from error
    if tuple(value.shape) != shape:  # Before it is copied to the device and cast.
        raise _wrong_shape(label, value.shape, shape, source)
    value = place(value).astype(dtype)
    _check(value, label, shape, source)
    return value


def _check(value: jax.Array, label: str, shape: tuple[int, ...], source: str) -> None:
    if tuple(value.shape) != shape:
        raise _wrong_shape(label, value.shape, shape, source)
    if _sum_is_finite(value):
        return
    bad = int(np.sum(~np.isfinite(np.asarray(value, np.float32))))
    if bad:  # Otherwise the sum has overflowed.
        raise CheckpointError(
            f"{source}: tensor {label} holds {bad} values that are NaN or infinite as {value.dtype}, of {value.size}; "
            "expected none."
        )


@jax.jit
def _sum_is_finite(x: jax.Array) -> jax.Array:
    """True only if all elements are finite; eight times faster than looking at each."""
    return jnp.isfinite(jnp.sum(x, dtype=jnp.float32))


def _wrong_shape(label: str, found: Iterable[int], expected: Iterable[int], source: str) -> CheckpointError:
    return CheckpointError(f"{source}: tensor {label} has shape {tuple(found)}, expected {tuple(expected)}.")


def _dotted(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _count(names: set[str]) -> str:
    return "1 tensor is" if len(names) == 1 else f"{len(names)} tensors are"


def _some(names: set[str], limit: int = 5) -> str:
    shown = ", ".join(sorted(names)[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
