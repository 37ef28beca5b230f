"""One of several processes that run a program together; `test_processes.py` starts them.

Usage: python -m tests.sharding.process JOB.json  (and KVJAX_COORDINATOR, KVJAX_PROCESS_COUNT, KVJAX_PROCESS_INDEX)

A job: {"devices": of each process, "mesh": "model=2,...", "policies": {name: policy}, "folder": where caches are,
"load": whether they are loaded or made and saved, "out": file for the tokens that follow from each}
"""

import dataclasses
import json
import pathlib
import sys
from typing import Any

import jax

import kvjax
from kvjax.cache.host import HOST
from kvjax.cache.low_rank import FarChunks
from kvjax.checkpoints.orbax import abstract_pytree, load_cache, save_cache
from kvjax.sharding import cache_shardings, make_mesh, shard_cache, shard_params
from kvjax.sharding.distributed import batch_from_rows, everywhere, gather, initialize, local_rows
from tests import tiny

NEW = 4


def caches(job: dict[str, Any], params: Any, mesh: jax.sharding.Mesh):
    """Every policy's name and cache."""
    rows = local_rows(len(tiny.TOKENS), mesh)
    tokens, lengths = batch_from_rows(tiny.TOKENS[rows], mesh), everywhere(tiny.LENGTHS, mesh)
    for name, text in job["policies"].items():
        folder = pathlib.Path(job["folder"]) / name
        if job["load"]:
            yield name, load_cache(folder, placement=cache_shardings(abstract_pytree(folder), mesh))
        else:
            cache = kvjax.prefill(params, tiny.CONFIG, kvjax.parse_policy(text), tokens, lengths)
            cache = offloaded(shard_cache(cache, mesh))
            save_cache(folder, cache)
            yield name, cache


def offloaded(cache: Any) -> Any:
    """Far tokens in the host's memory, where accelerators put them by themselves."""

    def move(x: Any) -> Any:
        return dataclasses.replace(x, v=jax.device_put(x.v, HOST)) if isinstance(x, FarChunks) else x

    return jax.tree.map(move, cache, is_leaf=lambda x: isinstance(x, FarChunks))


def main(job: dict[str, Any]) -> None:
    jax.config.update("jax_num_cpu_devices", job["devices"])
    initialize(timeout_seconds=60)
    mesh = make_mesh(job["mesh"])
    rows = local_rows(len(tiny.TOKENS), mesh)
    found = {}
    with jax.set_mesh(mesh):
        params = shard_params(tiny.params(), tiny.CONFIG, mesh)
        question, lengths = batch_from_rows(tiny.QUESTION[rows], mesh), everywhere(tiny.QUESTION_LENGTHS, mesh)
        for name, cache in caches(job, params, mesh):
            out, _ = kvjax.generate(
                params, tiny.CONFIG, cache.policy, question, lengths, cache=cache, max_new_tokens=NEW
            )
            found[name] = gather(out).tolist()
    if jax.process_index() == 0:
        pathlib.Path(job["out"]).write_text(json.dumps(found))
    jax.distributed.shutdown()


if __name__ == "__main__":
    main(json.loads(pathlib.Path(sys.argv[1]).read_text()))
