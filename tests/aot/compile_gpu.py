"""Compiles the kernels of decode and paged attention for an H200, which need not be there:
`python -m tests.aot.compile_gpu`, or only some cases: `... KIVI`.

Prints one line of JSON for every case: its name and either an error or the registers, spilled bytes and shared memory
that it takes, and what XLA does to the cache before the kernel may read it.
"""

import json
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kvjax.kernels.decode import Request, gpu
from kvjax.kernels.paged import PagedRequest, gpu as paged
from tests.aot.compile_tpu import paged_request, relayouts, request, size_of

ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"}
TARGET = Path(__file__).parent / "h200.textproto"
SHARED_MEMORY = 227 * 1024
SLOTS = 2**18  # Parts of programs are small beside it.
KINDS = {
    "bfloat16": ("bfloat16", "bfloat16"),
    "int8": ("int8", "int8"),
    "float8": ("float8_e4m3fn", "float8_e4m3fn"),
    "8-bit": ("8 token 64 bfloat16", "8 token 64 bfloat16"),
    "4-bit": ("4 token 32 float16", "4 token 32 float16"),
    "KIVI, 4-bit": ("4 channel 32 float16", "4 token 32 float16"),
    "KIVI, 2-bit": ("2 channel 32 float16", "2 token 32 float16"),
}


def cases() -> dict[str, Request | PagedRequest]:
    return decode_cases() | paged_cases()


def decode_cases() -> dict[str, Request]:
    kinds = {f"{name}, D = {d}": request(*kind, d=d, s=SLOTS) for name, kind in KINDS.items() for d in (64, 128, 256)}
    some = {
        "2-bit, one scale per token": request("2 token 128", d=128, s=SLOTS),
        "2-bit values of 128 tokens per scale": request("bfloat16", "2 channel 128", d=128, s=SLOTS),
        "4 tokens": request("bfloat16", t=4, pos=1, s=SLOTS),
        "4 tokens, 4-bit": request("4 token 32 float16", t=4, pos=1, s=SLOTS),
        "2 tokens, D = 256": request("int8", t=2, pos=1, s=SLOTS, d=256),
        "window, softcap": request("4 token 64 float16", t=2, pos=1, window=100, softcap=30.0, r=32, s=SLOTS),
    }
    tails = {
        "tail of 33": request("bfloat16", r=33, s=SLOTS),
        "tail of 129, KIVI, 2-bit": request(*KINDS["KIVI, 2-bit"], r=129, s=SLOTS),
        "tail of 33, KIVI, 2-bit, 4 tokens": request(*KINDS["KIVI, 2-bit"], t=4, pos=1, r=33, s=2 * SLOTS),
        "bias": request("bfloat16", bias=True, s=SLOTS),
        "bias, tail, KIVI, 2-bit, 2 tokens": request(*KINDS["KIVI, 2-bit"], t=2, pos=1, r=33, bias=True, s=SLOTS),
    }
    wide = {f"tail on {name}, D = 256": request(*kind, d=256, r=1, s=SLOTS) for name, kind in KINDS.items()}
    return kinds | some | tails | wide


def paged_cases() -> dict[str, PagedRequest]:
    pages = {f"pages of {name}, D = 256": paged_request(*kind, d=256) for name, kind in KINDS.items()}
    pools = {f"pool of {name}": paged_request(*kind, pool=True) for name, kind in KINDS.items()}
    some = {
        "Quest": paged_request("bfloat16", page=16, m=128),
        "Quest, int8": paged_request("int8", page=16, m=128),
        "Quest, 4-bit": paged_request("4 token 32 float16", page=16, m=128),
        "Quest, int8 by position": paged_request("int8", page=16, m=128, t=2, pos=True),
        "KIVI in pages of 32": paged_request(*KINDS["KIVI, 2-bit"], page=32),
        "pages of bfloat16, D = 64": paged_request("bfloat16", d=64),
        "pages of 8": paged_request("bfloat16", page=8, m=128),
        "4 tokens by position": paged_request("bfloat16", page=64, t=4, pos=True, window=100, softcap=30.0, pool=True),
    }
    return pages | pools | some


def usage(folder: Path) -> dict[str, int]:
    """What the one kernel takes whose dumps lie in a folder, which is emptied."""
    text = "".join(path.read_text() for path in folder.iterdir() if path.suffix in (".ptxas", ".txt"))
    for path in folder.iterdir():
        path.unlink()
    number = lambda pattern: max(int(found) for found in re.findall(pattern, text))  # noqa: E731
    return {
        "registers": number(r"Used (\d+) registers"),
        "spills": number(r"(\d+) bytes spill"),
        "smem": number(r"smem_scratch_bytes=(\d+)"),
    }


def main(only: str = "") -> None:
    from jax.experimental import topologies

    folder = Path(os.environ["MOSAIC_GPU_DUMP_TO"])
    topology = topologies.get_topology_desc(platform="cuda", target_config=TARGET.read_text(), topology="1x1x1")
    placed = NamedSharding(Mesh(topology.devices[:1], ("x",)), PartitionSpec())
    place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed)  # noqa: E731
    for name, case in cases().items():
        if only not in name:
            continue
        result: dict[str, Any] = {"name": name}
        try:
            run = paged.attend if isinstance(case, PagedRequest) else gpu.decode
            compiled = jax.jit(run).lower(jax.tree.map(place, case)).compile()
            cache = size_of((case.k, case.v))
            result |= {
                "cache": cache,
                "temp": compiled.memory_analysis().temp_size_in_bytes,
                "relayouts": relayouts(compiled.as_text(), cache // 100),
            } | usage(folder)
        except Exception as error:  # Whatever the compiler says is what the test shows.
            result["error"] = f"{type(error).__name__}: {error}"[:2000]
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as dumps:
        # Read when the kernel library is loaded, which nothing above does.
        os.environ.update(ENVIRONMENT | {"MOSAIC_GPU_DUMP_TO": dumps})
        main(*sys.argv[1:])
