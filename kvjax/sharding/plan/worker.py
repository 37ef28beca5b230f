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
from jax.experimental import topologies

from kvjax.models.shapes import model_config
from kvjax.policies.registry import parse_policy
from kvjax.sharding.mesh import make_mesh
from kvjax.sharding.plan import hlo
from kvjax.sharding.plan.abstract import device_bytes, make_program
from kvjax.sharding.plan.chips import PlanError, parse_topology
from kvjax.sharding.plan.steps import compile_decode, compile_prefill, prefill_layers, prompt


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

    def decode(layers: int) -> dict[str, Any]:
        part, start = program.first(layers), time.perf_counter()
        found = describe(compile_decode(part), topology.devices)
        shapes = device_bytes((part.params, part.cache, part.tokens))
        return {"layers": layers, "seconds": time.perf_counter() - start, "shapes": shapes, **found}

    def prefill(kind: tuple[int, int]) -> dict[str, Any]:
        (layer, count), start = kind, time.perf_counter()
        seen, compressed = compile_prefill(program, layer)
        return {
            "layers": count,
            "weights": device_bytes(program.params["layers"][layer]),
            "hidden": device_bytes(prompt(program)[0]),
            "layer": describe(seen, topology.devices),
            "compress": compressed and describe(compressed, topology.devices),
            "seconds": time.perf_counter() - start,
        }

    kinds = list(prefill_layers(program)) if request.get("prefill") else []
    with ThreadPoolExecutor(2) as pool:
        decodes, prefills = pool.map(decode, request["layers"]), pool.map(prefill, kinds)
        found = {"programs": list(decodes), "prefill": list(prefills)}
    version = f"libtpu {importlib.metadata.version('libtpu')}, jax {jax.__version__}"
    return {"compiler": version, "device": described.devices[0].device_kind, **found}


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
