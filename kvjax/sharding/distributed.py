"""Several processes, one program: how they find one another, and how data goes in and out.

Every process runs the same program. `initialize` first, before anything asks JAX for devices; then `jax.devices()` are
those of all processes, and a mesh spans them.

    initialize()
    mesh = make_mesh("data=2,model=4")
    tokens = batch_from_rows(my_rows, mesh)  # Each process gives its rows.
    with jax.set_mesh(mesh):
        out, count = generate(params, config, policy, tokens, max_new_tokens=64)
    everything = gather(out)  # Or my_rows(out): only this process's.
"""

import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kvjax.kernels.known import known
from kvjax.kernels.mesh import DATA
from kvjax.sharding.mesh import MeshError

COORDINATOR, COUNT, INDEX = "KVJAX_COORDINATOR", "KVJAX_PROCESS_COUNT", "KVJAX_PROCESS_INDEX"
LAUNCHED = ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")  # Processes that srun or mpirun has started.


class DistributedError(RuntimeError):
    """The processes cannot find one another; the message says what is missing."""


def initialize(
    coordinator: str | None = None,
    process_count: int | None = None,
    process_index: int | None = None,
    *,
    timeout_seconds: int = 300,
) -> None:
    """Connects this process with the others of its program. Does nothing if that is done, or if it is alone.

    Where to look is, in this order: the arguments; the environment variables KVJAX_COORDINATOR (host:port),
    KVJAX_PROCESS_COUNT and KVJAX_PROCESS_INDEX; what JAX finds out by itself on TPU pods and GKE, under SLURM (srun)
    and under Open MPI (mpirun).

    Args:
      coordinator: host:port of the first process, a free port that the others reach. process_count: Of all.
      process_index: From 0, another in each process.
      timeout_seconds: How long to wait for the others.

    Raises:
      DistributedError: Only a part of this is given, it makes no sense, JAX has already started its devices, or the
        others do not come in time.
    """
    if jax.distributed.is_initialized():
        return
    given = _settings(os.environ, coordinator, process_count, process_index)
    launched = next((int(os.environ[name]) for name in LAUNCHED if os.environ.get(name, "").isdecimal()), None)
    if (given[1] if given else launched) == 1:
        return  # JAX would show a process that srun has started one of its GPUs only.
    address, count, index = given or (None, None, None)
    try:
        jax.distributed.initialize(address, count, index, initialization_timeout=timeout_seconds)
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        late = "must be called before" in reason
        nobody_else = given is None and (late or "defined" in reason) and launched is None
        if nobody_else and (not late or jax.process_count() == 1):
            return
        if late:
            reason = "JAX has already started its devices; call this before anything that uses them."
        where = f" Process {index} of {count} looked for process 0 at {address}." if given and not late else ""
        raise DistributedError(f"The processes could not be connected: {reason}{where}") from error


def _settings(
    environ: Mapping[str, str], coordinator: str | None, process_count: int | None, process_index: int | None
) -> tuple[str, int, int] | None:
    """Address, count and index from arguments or environment; None where none is given."""
    names = dict(zip((COORDINATOR, COUNT, INDEX), (coordinator, process_count, process_index), strict=True))
    values = {name: environ.get(name) if value is None else value for name, value in names.items()}
    missing = [name for name, value in values.items() if value in (None, "")]
    if len(missing) == len(values):
        return None
    if missing:
        raise DistributedError(
            f"{' and '.join(missing)} not given. A program of several processes needs all of {COORDINATOR} "
            f"(host:port of the first), {COUNT} and {INDEX}, as environment variables or arguments; on TPU pods, under "
            "SLURM and Open MPI it needs none."
        )
    address, count, index = str(values[COORDINATOR]), values[COUNT], values[INDEX]
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise DistributedError(f"{COORDINATOR} is {address!r}, expected host:port of the first process.")
    try:
        count, index = int(count or 0), int(index or 0)
    except ValueError:
        raise DistributedError(f"{COUNT} and {INDEX} are whole numbers, got {count!r} and {index!r}.") from None
    if not 0 <= index < count:
        raise DistributedError(f"Process {index} of {count}: indices go from 0 to {count - 1}.")
    return address, count, index


# Data in and out


def local_rows(batch: int, mesh: Mesh) -> np.ndarray:
    """Which of a batch's rows lie on this process's devices, in order: those that it has to give [b] int64.

    Raises:
      MeshError: The rows do not divide over "data".
    """
    size = mesh.shape.get(DATA, 1)
    if batch % size:
        raise MeshError(f"A batch of {batch} rows does not divide over data={size}.")
    slices = _of_rows(mesh).addressable_devices_indices_map((batch,)).values()
    return np.unique(np.concatenate([np.arange(batch)[index] for index in slices if index is not None]))


def batch_from_rows(rows: Any, mesh: Mesh) -> Array:
    """One array [B, ...] on the mesh, of which each process gives its rows [b, ...]; see `local_rows`.

    Processes that differ only along "model" or "seq" hold the same rows, and give the same.

    Raises:
      MeshError: The rows do not divide over this process's part of "data".
    """
    rows, size = np.asarray(rows), mesh.shape.get(DATA, 1)
    mine = len(local_rows(size, mesh))
    if len(rows) % mine:
        raise MeshError(f"{len(rows)} rows do not divide over this process's part of data={size}, which is {mine}.")
    shape = (len(rows) // mine * size, *rows.shape[1:])
    return jax.make_array_from_process_local_data(_of_rows(mesh), rows, shape)


def everywhere(x: Any, mesh: Mesh) -> Array:
    """The same small array on every device, such as the lengths of all rows; each process gives all of it."""
    return jax.make_array_from_process_local_data(NamedSharding(mesh, PartitionSpec()), np.asarray(x), np.shape(x))


def gather(tree: Any) -> Any:
    """All of every array, as NumPy's, in every process; all of them have to call this. For small results.

    What a process has for itself stays its own.
    """
    return known(tree)


def my_rows(x: Array) -> np.ndarray:
    """The rows of an array [B, ...] that lie on this process's devices, in order [b, ...], without communication.

    Raises:
      MeshError: The array is spread along another axis than its rows.
    """
    parts = {part.index[0].indices(x.shape[0])[0]: part.data for part in x.addressable_shards}
    if any(part.shape[1:] != x.shape[1:] for part in parts.values()):
        raise MeshError(f"An array of shape {x.shape} is spread along other axes than its rows; use `gather`.")
    return np.concatenate([np.asarray(parts[row]) for row in sorted(parts)])


def _of_rows(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec(DATA))
