"""Meshes by name: "seq=4,model=2" over the devices there are."""

import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from kvjax.kernels.mesh import DATA, MODEL, SEQ, MeshError

AXES = (DATA, SEQ, MODEL)


def parse_mesh(text: str) -> dict[str, int]:
    """ "seq=4,model=2" -> devices along each of `AXES`, 1 where none is named.

    Raises:
      MeshError: An axis is unknown or named twice, or a size is no positive number.
    """
    sizes: dict[str, int] = {axis: 1 for axis in AXES}
    named = set()
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, size = (piece.strip() for piece in part.partition("="))
        if name not in AXES:
            raise MeshError(f"A mesh has the axes {', '.join(AXES)}; {name!r} in {text!r} is none of them.")
        if name in named or not size.isdecimal() or int(size) < 1:
            raise MeshError(f"A mesh is written seq=4,model=2, every axis once and positive; got {text!r}.")
        named.add(name)
        sizes[name] = int(size)
    return sizes


def make_mesh(shape: str, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of devices with the axes "data" (rows of a batch), "seq" (slots) and "model" (heads, MLP, vocabulary).

    Use it with `jax.set_mesh(mesh)`: whatever runs under it is spread over it. Neighbours along "model" are neighbours
    in the machine, since they exchange the most.

    Args:
      shape: "seq=4,model=2"; axes that are not named have one device.
      devices: All of the mesh; default: all there are, of all processes.

    Raises:
      MeshError: The shape does not take as many devices as there are.
    """
    sizes = parse_mesh(shape)
    devices = jax.devices() if devices is None else list(devices)
    wanted = math.prod(sizes.values())
    if wanted != len(devices):
        factors = " * ".join(f"{name}={size}" for name, size in sizes.items())
        raise MeshError(f"{factors} takes {wanted} devices, and there are {len(devices)}.")
    grid = mesh_utils.create_device_mesh(tuple(sizes.values()), devices, allow_split_physical_axes=True)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))
