"""The programs that run on a pod, compiled: a decode step, and what a prompt goes through layer by layer."""

import importlib
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec

from kvjax.cache import Cache
from kvjax.generation.extend import hidden_states
from kvjax.kernels import mesh
from kvjax.kernels.mesh import DATA, SEQ
from kvjax.models.transformer import Params, layer_spec, unembed
from kvjax.sharding.plan.abstract import Program, in_use, placed

# The module: the package has a function of this name.
layers_of_prefill: Any = importlib.import_module("kvjax.generation.prefill")


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


def prefill_layers(program: Program) -> Iterator[tuple[int, int]]:
    """A layer of every kind, and how many there are: what `prefill` compiles once."""
    kinds = [layer_spec(program.config, i) for i in range(program.config.num_layers)]
    return ((kinds.index(kind), kinds.count(kind)) for kind in dict.fromkeys(kinds))


def compile_prefill(program: Program, layer: int) -> tuple[jax.stages.Compiled, jax.stages.Compiled | None]:
    """One layer over the whole prompt, and the compression of what it has seen (None for a sliding layer's ring)."""
    config, planned, stages = program.config, program.planned, layers_of_prefill
    spec, place = layer_spec(config, layer), lambda *axes: NamedSharding(program.mesh, PartitionSpec(*axes))  # type: ignore[arg-type]
    with in_use(program.mesh):
        x, pos = prompt(program)
        weights, chunk = program.params["layers"][layer], stages.Chunk()
        if config.layer_types[layer] == "sliding":
            ring = {"config": config, "spec": spec, "length": x.shape[1], "chunk": chunk}
            return stages._sliding_layer.lower(weights, x, pos, **ring).compile(), None
        number = jax.ShapeDtypeStruct((), jnp.int32, sharding=place())
        needs = {"config": config, "spec": spec, "needs": planned.policy.needs, "chunk": chunk}
        lowered = stages._full_layer.lower(weights, x, pos, number, **needs)
        compiled = lowered.compile()
        observed = placed(lowered.out_info[1], compiled.output_shardings[1])
        slots = jax.ShapeDtypeStruct((len(planned.policy.stages), program.batch), jnp.int32, sharding=place())
        at = planned.places[config.full_layers.index(layer)]
        compress = stages._compress_layer.lower(planned.policy, spec, planned.length, at, observed, slots)
    return compiled, compress.compile()


def prompt(program: Program) -> tuple[Any, Any]:
    """Shapes of hidden states [B, T, hidden], spread over rows and tokens, and of positions [B, T]."""
    length, sizes = program.planned.length, program.mesh.shape
    with in_use(program.mesh):
        length = mesh.even(length, 1, 2 if math.prod(sizes.values()) > 1 else 1)
    along = (DATA if program.batch % sizes[DATA] == 0 else None, SEQ)
    place = lambda *axes: NamedSharding(program.mesh, PartitionSpec(*axes))  # type: ignore[arg-type]  # noqa: E731
    hidden, dtype = program.config.hidden_size, program.params["embed"].dtype
    x = jax.ShapeDtypeStruct((program.batch, length, hidden), dtype, sharding=place(*along))
    return x, jax.ShapeDtypeStruct((program.batch, length), jnp.int32, sharding=place())
