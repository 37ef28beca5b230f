"""Compiles kernels for one generation of TPUs, which need not be there: `python -m tests.aot.compile_tpu v5e`,
or only some of them: `... v5e KIVI`.

Prints one line of JSON for every case: its name and either an error or what memory it takes and what XLA does to the
cache before the kernel may read it. A process of its own, because XLA may abort it.
"""

import dataclasses
import json
import os
import re
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from kvjax.kernels.decode import Request, Tail, tpu as decode
from kvjax.kernels.paged import PagedRequest, tpu as paged
from kvjax.kernels.vectors import Vectors
from kvjax.kernels.write import tpu as write

GENERATIONS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # Others may compile at the same time.
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "JAX_PLATFORMS": "cpu",
}
KINDS = [
    "float32",
    "bfloat16",
    "int8",
    "float8_e4m3fn",
    "2 token 32 float16",
    "4 token 64",
    "8 token 32 bfloat16",  # One per token would be copied: XLA mixes heads and tokens in its tiles then.
    "2 channel 32 float16",
    "4 channel 128 bfloat16",
    "8 channel 64",
    f"2 channel {2**15} float16",
    "int8 channel 64",
]
KIVI = ("2 channel 32 float16", "2 token 32 float16")


def shape(size: tuple[int, ...], dtype) -> Any:
    return jax.ShapeDtypeStruct(size, jnp.dtype(dtype))


def stored(kind: str, size: tuple[int, int, int, int]) -> Vectors:
    """Shapes of vectors [B, H, S, D] of a kind: a type, or bits with "token" or "channel", group and type of scales."""
    b, h, s, d = size
    name, *rest = kind.split()
    if name in ("float32", "bfloat16"):
        return Vectors(codes=shape(size, name))
    axis, group, dtype = (*rest, "float32")[:3] if rest else ("token", d, "float32")
    scale = shape((b, h, s, d // int(group)) if axis == "token" else (b, h, s // int(group), d), dtype)
    if not name.isdigit():
        return Vectors(codes=shape(size, name), scale=scale)
    words = shape((b, h, s, d * int(name) // 32), "int32")
    return Vectors(codes=words, scale=scale, zero=scale, bits=int(name))


def request(
    k, v=None, *, b=4, h=8, s=2**15, d=128, g=8, t=1, q="bfloat16", pos=0, r=0, latent=0, bias=False, **kw
) -> Request:
    n, wide = g * t, latent or d
    return Request(
        q=shape((b, h, n, d), q),
        k=stored(k, (b, h, s, d)),
        v=None if latent else stored(v or k, (b, h, s, d)),
        lengths=shape((b, h), "int32"),
        q_pos=shape((b, t), "int32"),
        pos=shape((b, pos, s), "int32") if pos else None,
        bias=shape((b, h, n, s), "float32") if bias else None,
        tail=Tail(k=shape((b, h, r, d), q), v=shape((b, h, r, wide), q), pos=shape((b, 1, r), "int32")) if r else None,
        latent=latent,
        **kw,
    )


def decode_cases() -> dict[str, Request]:
    cases = {f"{kind}, D = {d}": request(kind, d=d) for kind in KINDS for d in (64, 128, 256)}
    some = {
        "bfloat16, D = 80": request("bfloat16", d=80),
        "bfloat16, D = 96": request("bfloat16", d=96),
        "latent": request("bfloat16", d=576, latent=512, h=1, g=16),
        "latent int8": request("int8", s=2**18, d=576, latent=512, h=1, g=128),
        "window, 3 tokens": request("bfloat16", t=3, pos=1, window=100, softcap=30.0),
        "16 tokens": request("4 token 32", t=16, pos=1, s=2**17),
        "logits": request("int8", logits=True),
        "bias": request("bfloat16", bias=True),
        "tail of 1": request("bfloat16", r=1),
        "tail of 33, one query head": request("4 token 64", r=33, g=1),
        "KIVI": request(*KIVI, r=32),
        "KIVI, D = 64": request(*KIVI, r=32, d=64),
        "KIVI, float32": request(*KIVI, r=32, q="float32"),
        "float32 queries, 16 tokens": request("int8", q="float32", t=16, pos=1, s=2**17),
        "a million tokens": request("8 token 64", b=1, h=1, s=2**20),
        "ragged end": request("bfloat16", s=2**15 + 8, d=64),
        "wide words": request("8 token 64", d=512),
    }
    return cases | some


def paged_request(k, v=None, *, page=128, d=128, m=16, g=8, t=1, pool=False, pos=False, **kw) -> PagedRequest:
    """A pool of many pages for 8 heads, or 8 heads of many slots that are read by 64 query heads, as in Quest."""
    b, hq, pages = 4, 8 if pool else 64, 4096 if k == "float32" else 16384
    size = (b, pages, page, d) if pool else (b, 8, pages * 16, d)
    return PagedRequest(
        q=shape((b, hq, g * t if pool else t, d), "bfloat16"),
        k=stored(k, size),
        v=stored(v or k, size),
        table=shape((b, hq, m), "int32"),
        count=shape((b, hq), "int32"),
        lengths=shape(size[:2], "int32"),
        q_pos=shape((b, t), "int32"),
        pos=shape(size[:3], "int32") if pos else None,
        page=page,
        pool=pool,
        **kw,
    )


def paged_cases() -> dict[str, PagedRequest]:
    cases = {f"{kind}, D = {d}": paged_request(kind, d=d) for kind in KINDS[:8] for d in (64, 128, 256)}
    pools = {f"pool of {kind}, D = {d}": paged_request(kind, d=d, pool=True) for kind in KINDS[:7] for d in (64, 128)}
    some = {
        "Quest": paged_request("bfloat16", page=16, m=128),
        "Quest, float32": paged_request("float32", page=16, m=128, d=256),
        "KIVI pool": paged_request(*KIVI, pool=True, m=100),
        "positions": paged_request("bfloat16", t=3, pos=True, window=100),
    }
    return cases | pools | some


class Case(NamedTuple):
    """What is compiled: a function, its arguments, which part of them must stay where it is, and whether the first is
    given away.
    """

    function: Callable
    arguments: tuple
    cache: Any
    donate: bool = False


def append_and_attend(cache: tuple, values: tuple, query: Request) -> tuple:
    """One step of decoding: the new token is stored, then everything is attended."""
    k, v, pos = write.put(cache, query.lengths[:, :1, None], values)
    full = dataclasses.replace(query, k=k, v=v, pos=pos, lengths=query.lengths + 1)
    return (k, v, pos), decode.decode(full).out


def step_case(kind: str, d: int) -> Case:
    query = request(kind, d=d, s=2**15)
    query = dataclasses.replace(query, pos=shape((4, 1, 2**15), "int32"))
    cache = (query.k, query.v, query.pos)
    values = jax.tree.map(lambda x: shape((*x.shape[:2], 1, *x.shape[3:]), x.dtype), cache)
    return Case(append_and_attend, (cache, values, dataclasses.replace(query, k=None, v=None, pos=None)), cache, True)


def take(cache: tuple, slot: jax.Array) -> tuple:
    return write.take(cache, slot)


def take_case(kind: str, d: int, heads: int = 1, tokens: int = 1) -> Case:
    """Of 8 heads, which have one slot together or their own."""
    vectors = stored(kind, (4, 8, 2**15, d))
    cache = (vectors, shape((4, heads, 2**15), "int32"))
    return Case(take, (cache, shape((4, heads, tokens), "int32")), cache)


def cases() -> dict[str, Case]:
    decoding = {f"decode: {name}": Case(decode.decode, (x,), (x.k, x.v)) for name, x in decode_cases().items()}
    kinds = ("bfloat16", "int8", "4 token 32", "4 token 32 float16", "2 token 32 bfloat16")
    steps = {f"append and decode: {kind}, D = {d}": step_case(kind, d) for kind in kinds for d in (64, 128, 256)}
    paging = {f"paged: {name}": Case(paged.attend, (x,), (x.k, x.v)) for name, x in paged_cases().items()}
    taking = {f"take: {kind}, D = {d}": take_case(kind, d) for kind in kinds for d in (64, 128)}
    several = {f"take 5 for each head: {kind}, D = {d}": take_case(kind, d, 8, 5) for kind in kinds for d in (64, 128)}
    return decoding | steps | paging | taking | several


def size_of(tree: Any) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def relayouts(text: str, least: int) -> list[str]:
    """Operations of the program, kernels and prefetches apart, that write `least` bytes or more."""
    found = []
    for line in text[text.index("\nENTRY ") :].splitlines():
        ops = "copy|transpose|convert|bitcast-convert|reshape|pad|slice|concatenate|broadcast|fusion|scatter|while"
        match = re.search(rf" = \(?(\w+)\[([\d,]*)\]\S* ({ops})\(", line)
        if not match or "kind=kCustom" in line:
            continue
        width = {"pred": 8, "bf16": 16}.get(match[1]) or int(re.search(r"\d+", match[1])[0])
        count = 1
        for n in filter(None, match[2].split(",")):
            count *= int(n)
        if count * width // 8 >= least:
            found.append(line.strip()[:200])
    return found


def main(generation: str, only: str = "") -> None:
    os.environ.update(ENVIRONMENT)
    from jax.experimental import topologies

    topology = topologies.get_topology_desc(GENERATIONS[generation], platform="tpu")
    mesh = jax.sharding.Mesh(topology.devices[:1], ("x",))
    place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, PartitionSpec()))  # noqa: E731
    for name, case in cases().items():
        if only not in name:
            continue
        print(json.dumps({"name": name}), flush=True)
        mapped = jax.shard_map(
            case.function, mesh=mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec(), check_vma=False
        )
        try:
            donate = (0,) if case.donate else ()
            compiled = jax.jit(mapped, donate_argnums=donate).lower(*jax.tree.map(place, case.arguments)).compile()
        except Exception as error:  # Whatever the compiler says is what the test shows.
            print(json.dumps({"name": name, "error": str(error)[:2000]}), flush=True)
            continue
        total = size_of(case.cache)
        result = {
            "name": name,
            "cache": total,
            "temp": compiled.memory_analysis().temp_size_in_bytes,
            "relayouts": relayouts(compiled.as_text(), total // 100),
        }
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
