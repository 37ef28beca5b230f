"""Compiles the loop that decodes with a whole model for one generation of TPUs, which need not be there:
`python -m tests.aot.compile_model v5e`, or for some policies only: `... v5e int8`.

Prints one line of JSON for every policy: an error, or which kernels are in the program, what memory it takes and where
it copies large parts of the cache. A process of its own, because XLA may abort it.
"""

import dataclasses
import json
import math
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

import kvjax
from kvjax.generation import decode, prefill_logits
from kvjax.models.config import Config, Rope
from kvjax.models.params import abstract_params
from tests.aot.compile_tpu import ENVIRONMENT, GENERATIONS, size_of

LAYERS, BATCH, TOKENS, MORE = 2, 16, 8192, 64
POLICIES = (
    "full",
    "int8",
    "int4",
    "kivi(bits=2, residual=128)",
    "snapkv(0.25)",
    "h2o(0.25)",
    "adakv(0.25)",
    "streaming_llm(1024)",
)
MOVES = {"copy", "transpose", "convert", "bitcast-convert", "reshape", "gather", "pad", "concatenate"}


def model() -> Config:
    rope = Rope(theta=1e4, rotary_dim=128)
    return Config(
        family="llama",
        vocab_size=512,
        hidden_size=1024,
        mlp_size=2048,
        num_heads=16,
        num_kv_heads=4,
        head_dim=128,
        layer_types=("full",) * LAYERS,
        rope=rope,
        sliding_rope=rope,
        query_scale=128**-0.5,
        max_length=2**20,
    )


def moves(text: str, sizes: set[int]) -> list[str]:
    """Operations of a compiled program that move an array with one of these numbers of elements as a whole: a copy, a
    change of layout or type, a gather. Updates are none, which XLA makes in place or copies for; nor are its prefetches
    into fast memory, which start and end apart.
    """
    roots = {name: op for name, _, op, line in _operations(text, fused=True) if line.startswith("ROOT")}
    found = []
    for _, size, op, line in _operations(text, fused=False):
        if op == "fusion":  # Does what its root does.
            body = re.search(r"calls=%([\w.\-]+)", line)
            op = roots.get(body[1] if body else "", op)
        if op in MOVES and size in sizes:
            found.append(line[:200])
    return found


def _operations(text: str, fused: bool) -> Iterator[tuple[str, int, str, str]]:
    """Operations in the bodies of fusions, or outside: computation, elements of the (first) result, name, line."""
    bodies, name = set(re.findall(r" fusion\(.*calls=%([\w.\-]+)", text)), ""
    for line in map(str.strip, text.splitlines()):
        if head := re.match(r"(?:ENTRY )?%([\w.\-]+) .*\{$", line):
            name = head[1]
        op = re.search(r" = \(?\w+\[([\d,]*)\].*? ([a-z][a-z\-]*)\(", line)
        if op and (name in bodies) == fused:
            yield name, math.prod(int(n) for n in op[1].split(",") if n), op[2], line


def compile_decode(policy: kvjax.Policy, mesh: jax.sharding.Mesh) -> tuple[jax.stages.Compiled, kvjax.Cache]:
    """The loop over tokens after a prompt, and the shapes of its cache."""
    config = model()
    place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, PartitionSpec()))  # noqa: E731
    params = abstract_params(config, jnp.bfloat16)
    prompt = jax.ShapeDtypeStruct((BATCH, TOKENS), jnp.int32)

    def start(params, prompt):
        logits, cache = prefill_logits(params, config, policy, prompt)
        return logits, cache.reserve(MORE), jax.random.key(0), jnp.zeros((BATCH,), bool)

    logits, cache, key, done = jax.eval_shape(start, params, prompt)
    cache = dataclasses.replace(cache, policy=policy.after_prompt)
    params, arguments = jax.tree.map(place, (params, (cache, logits, key, done)))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        lowered = decode.lower(params, config, cache.policy, *arguments, max_new_tokens=MORE)
    return lowered.compile(), cache


def main(generation: str, only: str = "") -> None:
    os.environ.update(ENVIRONMENT)
    from jax.experimental import topologies

    topology = topologies.get_topology_desc(GENERATIONS[generation], platform="tpu")
    mesh = jax.sharding.Mesh(topology.devices[:1], ("x",))
    for name in POLICIES:
        if only not in name:
            continue
        print(json.dumps({"name": name}), flush=True)
        try:
            compiled, cache = compile_decode(kvjax.parse_policy(name), mesh)
        except Exception as error:  # Whatever the compiler says is what the test shows.
            print(json.dumps({"name": name, "error": str(error)[:2000]}), flush=True)
            continue
        leaves = jax.tree.leaves(cache.layers)
        text, memory = compiled.as_text(), compiled.memory_analysis()
        assert text and memory
        result = {
            "name": name,
            "cache": cache.nbytes,
            "temp": memory.temp_size_in_bytes,
            "kernels": Counter(re.findall(r'%(kvjax_\w+)[.\d]* = .*custom_call_target="tpu_custom_call"', text)),
            "moves": moves(text, {x.size for x in leaves if size_of(x) * 16 * LAYERS >= cache.nbytes}),
        }
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
