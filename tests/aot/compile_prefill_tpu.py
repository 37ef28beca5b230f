"""Compiles prefill attention ahead of time for one generation of TPUs, which need not be there:
`python -m tests.aot.compile_prefill_tpu v5e`.

Prints one line of JSON for every case: its name, and either an error or the bytes of its arguments and of what it needs
besides, and what XLA does to the past before the kernel may read it. A process of its own, because XLA may abort it.
"""

import json
import os
import sys

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from kvjax.kernels.prefill import ColumnSums, Past, Request, Statistics, tpu
from kvjax.kernels.prefill.request import make_request
from tests.aot.compile_tpu import ENVIRONMENT, GENERATIONS, relayouts, size_of

MOST = Statistics(
    lse=True,
    entropy=True,
    column_sums=(ColumnSums(), ColumnSums(forgetting=0.95, window=64, normalized=True)),
    window=32,
)
SUMS = Statistics(lse=True, entropy=True, column_sums=MOST.column_sums)


def request(
    tokens: int,
    dim: int,
    *,
    batch: int = 1,
    heads: int = 2,
    group: int = 4,
    value_dim: int | None = None,
    past: int = 0,
    by_head: bool = False,
    packed: bool = False,
    dtype: str = "bfloat16",
    statistics: Statistics = MOST,
    **keywords,
) -> Request:
    """Shapes only."""
    floats = lambda *size: jax.ShapeDtypeStruct(size, dtype)  # noqa: E731
    ints = lambda *size: jax.ShapeDtypeStruct(size, jnp.int32)  # noqa: E731
    value_dim = value_dim or dim
    old = Past(
        k=floats(batch, heads, past, dim),
        v=floats(batch, heads, past, value_dim),
        pos=ints(batch, heads if by_head else 1, past),
    )
    return jax.eval_shape(
        lambda *args, **arrays: make_request(
            *args, **arrays, scale=dim**-0.5, statistics=statistics, **keywords
        ),
        floats(batch, heads * group, tokens, dim),
        floats(batch, heads, tokens, dim),
        floats(batch, heads, tokens, value_dim),
        ints(batch, tokens),
        segments=ints(batch, tokens) if packed else None,
        past=old if past else None,
    )  # fmt: skip


def cases() -> dict[str, Request]:
    plain = {f"output alone, D = {dim}": request(8192, dim, statistics=Statistics()) for dim in (64, 128, 256)}
    growing = {f"D = {dim}, T = {tokens}": request(tokens, dim) for dim in (64, 128) for tokens in (4096, 8192)}
    long = {f"long past, D = {dim}": request(256, dim, past=2**16, statistics=SUMS) for dim in (64, 128)}
    some = {
        "float32, D = 64": request(2048, 64, dtype="float32"),
        "float32, D = 256": request(2048, 256, dtype="float32"),
        "D = 96": request(2048, 96),
        "D = 256": request(2048, 256),
        "latent": request(2048, 576, value_dim=512, heads=1, group=16),
        "latent, 128 heads": request(1024, 576, value_dim=512, heads=1, group=128, statistics=Statistics()),
        "window": request(8192, 256, window=1024),
        "packed, soft-cap, ragged": request(4000, 128, batch=2, packed=True, softcap=50.0),
        "past": request(2048, 128, past=8200),
        "past by head, D = 64": request(2048, 64, past=8192, by_head=True),
        "shorter than a tile": request(40, 128),
        "five query heads a KV head": request(2048, 128, group=5),
        "one query head a KV head": request(2048, 128, group=1),
        "40 query heads a KV head": request(2048, 128, group=40),
    }
    return plain | growing | long | some


def main(generation: str) -> None:
    os.environ.update(ENVIRONMENT)
    from jax.experimental import topologies

    topology = topologies.get_topology_desc(GENERATIONS[generation], platform="tpu")
    mesh = jax.sharding.Mesh(topology.devices[:1], ("x",))
    everywhere = PartitionSpec()
    place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, everywhere))  # noqa: E731
    mapped = jax.jit(
        jax.shard_map(tpu.prefill, mesh=mesh, in_specs=everywhere, out_specs=everywhere, check_vma=False)
    )  # fmt: skip
    for name, case in cases().items():
        print(json.dumps({"name": name}), flush=True)
        try:
            compiled = mapped.lower(jax.tree.map(place, case)).compile()
            memory = compiled.memory_analysis()
            copies = relayouts(compiled.as_text(), size_of(case.past.k)) if name.startswith("long") else []
            result = {"arguments": memory.argument_size_in_bytes, "temp": memory.temp_size_in_bytes, "copies": copies}
        except Exception as error:  # Whatever the compiler says is what the test shows.
            result = {"error": str(error)[:2000]}
        print(json.dumps({"name": name} | result), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
