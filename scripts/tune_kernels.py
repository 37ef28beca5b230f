"""Finds the options that make decode attention fastest on this machine, and writes the table that kernels read.

    python scripts/tune_kernels.py                                   # all kinds of store, in about eight minutes
    python scripts/tune_kernels.py --kinds int8,kivi2 --dims 128 --contexts 32768

For each kind of store, number of channels and context it times all combinations of the kernel's options, but for blocks
of more slots than there are; what does not compile is left out. The table is `kvjax/kernels/tuned/<device>.json`, which
is part of the package; `--out` names another folder, which the environment variable KVJAX_TUNED makes kernels read.
Entries that are there already stay, unless they are measured anew; each is written as soon as it is found.

Where there is no Pallas kernel, as on CPUs, the blocks of the path in plain JAX are measured, under a name of its own.
"""

import argparse
import dataclasses
import datetime
import importlib
import inspect
import itertools
import json
import os
import subprocess
import time
from collections.abc import Callable, Container, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from jax import Array

from kvjax.evaluation import kernels
from kvjax.evaluation.kernels import Case
from kvjax.kernels import choose, tuning
from kvjax.kernels.decode import Request

ROOT = Path(__file__).parents[1]
VALUES: Mapping[str, Mapping[str, Sequence[int]]] = {
    "tpu": {"block": (512, 1024, 2048, 4096, 8192), "splits": (1, 2)},
    "gpu": {"block": (64, 128), "stages": (2, 3, 4), "programs": (264, 396, 528)},
    "xla": {"block": (128, 256, 512, 1024, 2048, 4096)},
}
Options = dict[str, int]


def main() -> None:
    options = arguments()
    device, name = choose.device_kind(), choose.NATIVE.get(jax.default_backend(), "xla")
    path = Path(options.out) / tuning.file_name(device)
    end = time.monotonic() + options.seconds
    bandwidth = kernels.copy_bandwidth()
    about = {
        "device": device,
        "jax": jax.__version__,
        "commit": options.commit or commit(),
        "date": datetime.date.today().isoformat(),
    }
    print(f"{device}, {name} kernel: a copy moves {bandwidth / 1e9:,.0f} GB/s", flush=True)
    for case in cases(options):
        if time.monotonic() > end:
            print(f"No time for {case.kind}, {case.dim} channels at {case.context:,} and what follows.")
            break
        entry = tune(case, name, bandwidth)
        if entry is None:
            continue
        merged = merge(json.loads(path.read_text())["entries"] if path.is_file() else [], entry)
        tuning.write_table(path, about, merged)
    print(path)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    on_cpu = jax.default_backend() == "cpu"
    parser.add_argument("--kinds", default=",".join(kernels.KINDS), help="of store, separated by commas")
    parser.add_argument("--dims", default="128,64,256", help="channels of a head, most important first")
    parser.add_argument("--contexts", default="4096,16384" if on_cpu else "32768,131072,4096", help="stored tokens")
    parser.add_argument("--groups", default="4", help="query heads for each KV head")
    parser.add_argument("--seconds", type=float, default=480.0, help="nothing new is begun afterwards")
    parser.add_argument("--out", default=str(tuning.FOLDER), help="folder of the table")
    parser.add_argument("--commit", default="", help="of the code, where there is no git to ask")
    return parser.parse_args()


def commit() -> str:
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def cases(options: argparse.Namespace) -> list[Case]:
    """A single long sequence, or several shorter ones: what fills the device either way."""
    numbers = lambda text: [int(part) for part in text.split(",")]  # noqa: E731
    batch = lambda context: 1 if jax.default_backend() == "cpu" or context > 65536 else 8  # noqa: E731
    return [
        Case(kind=kind, context=context, batch=batch(context), group=group, dim=dim)
        for dim in numbers(options.dims)
        for group in numbers(options.groups)
        for context in numbers(options.contexts)
        for kind in options.kinds.split(",")
    ]


def tune(case: Case, name: str, bandwidth: float) -> dict[str, Any] | None:
    """The table's entry for a case, or None where the kernel does not serve it."""
    module = importlib.import_module(f"kvjax.kernels.decode.{name}")
    request = kernels.abstract_request(case)
    where = f"{case.kind}, {case.dim} channels at {case.context:,} x {case.batch}"
    refused = module.refuse(request) if hasattr(module, "refuse") else None
    if refused:
        print(f"{where}: {refused}", flush=True)
        return None
    candidates = every_option(VALUES[name], inspect.signature(module.decode).parameters, request.k.slots)
    times = measure(module, case, candidates, bandwidth)
    for each, seconds in zip(candidates, times, strict=True):
        print(f"  {in_words(each)}: {1e6 * seconds:,.1f} us", flush=True)
    best = min(range(len(times)), key=times.__getitem__)
    usual, seconds, options = times[0], times[best], candidates[best]
    if seconds == float("inf"):
        print(f"{where}: nothing compiles", flush=True)
        return None
    print(f"{where}: {in_words(options)}, {1e6 * seconds:,.1f} us instead of {1e6 * usual:,.1f}", flush=True)
    about = dataclasses.asdict(tuning.shape(request)) | {
        "options": options,
        "seconds": seconds,
        "untuned_seconds": usual,
    }
    return {"kernel": "decode" if name != "xla" else "decode xla", **about}


def every_option(values: Mapping[str, Sequence[int]], accepted: Container[str], slots: int) -> list[Options]:
    """All combinations of what a kernel accepts, after none; no block of more slots than there are."""
    names = [name for name in values if name in accepted]
    combinations = (dict(zip(names, each, strict=True)) for each in itertools.product(*(values[n] for n in names)))
    return [{}, *(each for each in combinations if each.get("block", 0) <= slots)]


def in_words(options: Options) -> str:
    return ", ".join(f"{name}={value}" for name, value in options.items()) or "as it is"


def measure(module: Any, case: Case, candidates: Sequence[Options], bandwidth: float) -> list[float]:
    """Seconds per call under each candidate's options; infinite where it fails."""
    usual = kernels.kernel_program(case)
    programs = [dataclasses.replace(usual, run=runner(module, each)) for each in candidates]
    seconds = 0.01 if jax.default_backend() == "cpu" else 0.03
    compiled = kernels.compile_all(programs, bandwidth, seconds, workers=os.cpu_count() or 1)
    return [kernels.time_one(one, bandwidth, repeats=5).get("seconds", float("inf")) for one in compiled]


def runner(module: Any, options: Options) -> Callable[[Array, Request], Array]:
    """The kernel itself: what a table says already has no say."""
    return lambda q, request: module.decode(dataclasses.replace(request, q=q), **options).out


def merge(entries: Sequence[Mapping[str, Any]], new: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Entries in a fixed order; the new one in place of an old one for the same shape."""
    key = lambda entry: tuple(entry[name] for name in ("kernel", "kind", "dim", "rows", "slots"))  # noqa: E731
    return sorted([entry for entry in entries if key(entry) != key(new)] + [new], key=key)


if __name__ == "__main__":
    main()
