"""Asks a process of its own to compile, and says in a sentence where that fails."""

import importlib.util
import json
import os
import subprocess
import sys
from typing import Any

from kvjax.sharding.plan.chips import Topology

# libtpu looks for a TPU machine's settings otherwise, and for itself in other processes.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "JAX_PLATFORMS": "cpu",
}


class CompileError(RuntimeError):
    """The compiler failed; the message says how.

    Attributes:
      no_room: It is certain that the program does not fit the chip's memory.
    """

    def __init__(self, message: str, no_room: bool = False):
        super().__init__(message)
        self.no_room = no_room


def why_not(topology: Topology) -> str:
    """Why nothing is compiled for a topology here; "" where it can be."""
    if not topology.chip.compiler:
        return f"There is no compiler for {topology.chip.name} here: what follows is arithmetic."
    if importlib.util.find_spec("libtpu") is None:
        return "libtpu is not installed, so nothing was compiled (pip install libtpu): what follows is arithmetic."
    return ""


def compiled(request: dict[str, Any], timeout: float | None = None) -> dict[str, Any]:
    """What programs take and send, compiled by `worker`.

    Args:
      request: model, policy, context, batch, topology, mesh and dtype as `plan` names them; layers: numbers of layers
        whose decode step to compile; prefill: whether to compile what a prompt goes through, too.
      timeout: Seconds.

    Returns:
      compiler, device; programs: for each number of layers what `worker.describe` says, seconds, and the bytes that
      its arguments' shapes take on a device; prefill: likewise of a layer of every kind, and of its compression.

    Raises:
      CompileError: The compiler says no, or dies.
    """
    try:
        done = subprocess.run(
            [sys.executable, "-m", "kvjax.sharding.plan.worker"],
            input=json.dumps(request),
            env=os.environ | ENVIRONMENT,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
    except subprocess.TimeoutExpired:
        raise CompileError(f"Compiling took longer than {timeout:.0f} seconds and was stopped.") from None
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        said = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "nothing")
        how = f"was ended by signal {-done.returncode}" if done.returncode < 0 else f"ended with {done.returncode}"
        raise CompileError(f"The compiler's process {how}; the last it said: {said.strip()[:400]}")
    found = json.loads(lines[-1])
    if "error" in found:
        raise CompileError(f"The compiler says: {found['error']}", found["no_room"])
    return found
