"""Compiles ahead of time, in a process of its own: `python -m kvjax.sharding.plan.worker < request > answer`.

XLA may abort the process, and libtpu reads its settings from the environment before JAX starts; see `compile.py`,
which starts it.
"""

import contextlib
import dataclasses
import importlib.metadata
import json
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import topologies

from kvjax.cache import Cache
from kvjax.generation.extend import hidden_states
from kvjax.models.shapes import model_config
from kvjax.models.transformer import Params, unembed
from kvjax.policies.registry import parse_policy
from kvjax.sharding.mesh import make_mesh
from kvjax.sharding.plan import hlo
from kvjax.sharding.plan.abstract import Program, device_bytes, in_use, make_program
from kvjax.sharding.plan.chips import PlanError, parse_topology


def decode_step(params: Params, cache: Cache, tokens: Array) -> tuple[Array, Cache]:
    """One token more in every row: ids [B, 1] -> logits [B, vocab] float32, and the cache."""
    valid = jnp.ones(tokens.shape, bool)
    x, cache = hidden_states(params, cache.config, cache.policy, cache, tokens, valid)
    return unembed(params, cache.config, x[:, 0]), cache


def compile_decode(program: Program) -> jax.stages.Compiled:
    """A decode step as it is run: the cache is donated, and updated where it lies."""
    with in_use(program.mesh):
        lowered = jax.jit(decode_step, donate_argnums=1).lower(program.params, program.cache, program.tokens)
    return lowered.compile()


def describe(compiled: jax.stages.Compiled, devices: int) -> dict[str, Any]:
    """What a compiled program takes and sends on one device; memory in bytes."""
    memory, text, costs = compiled.memory_analysis(), compiled.as_text() or "", compiled.cost_analysis() or {}
    assert memory is not None
    return {
        "memory": {
            "arguments": memory.argument_size_in_bytes,
            "results": memory.output_size_in_bytes - memory.alias_size_in_bytes,
            "temporaries": memory.temp_size_in_bytes,
            "code": memory.generated_code_size_in_bytes,
        },
        "collectives": [dataclasses.asdict(one) for one in hlo.collectives(text, devices)],
        "kernels": hlo.kernels(text),
        "flops": costs.get("flops", 0.0),
        "bytes_accessed": costs.get("bytes accessed", 0.0),
    }


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """What was asked for, compiled: see `compile.compiled`."""
    topology = parse_topology(request["topology"])
    try:
        # It asks for the hosts' layout of larger ones only.
        described = topologies.get_topology_desc(str(topology), platform=topology.chip.compiler)
    except Exception as error:
        raise PlanError(f"libtpu knows no topology {topology}: {_first_line(error)}") from None
    mesh = make_mesh(request["mesh"], described.devices)
    program = make_program(
        model_config(request["model"]),
        parse_policy(request["policy"]),
        request["context"],
        request["batch"],
        mesh,
        request["dtype"],
    )

    def one(layers: int) -> dict[str, Any]:
        part, start = program.first(layers), time.perf_counter()
        compiled = compile_decode(part)
        described = describe(compiled, topology.devices)
        shapes = device_bytes((part.params, part.cache, part.tokens))
        return {"layers": layers, "seconds": time.perf_counter() - start, "shapes": shapes, **described}

    with ThreadPoolExecutor(2) as pool:
        programs = list(pool.map(one, request["layers"]))
    version = f"libtpu {importlib.metadata.version('libtpu')}, jax {jax.__version__}"
    return {"compiler": version, "device": described.devices[0].device_kind, "programs": programs}


def _first_line(error: Exception) -> str:
    return re.sub(r"^[A-Z_]+: ", "", str(error).strip().splitlines()[0])[:400]


def main() -> None:
    request = json.load(sys.stdin)
    out = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):  # What libraries print is not the answer.
        try:
            found = answer(request)
        except Exception as error:
            found = {"error": _first_line(error), "no_room": "exceeds available HBM" in str(error)}
            if not found["no_room"] and not isinstance(error, ValueError):
                import traceback

                traceback.print_exc()
    print(json.dumps(found), file=out)


if __name__ == "__main__":
    main()
