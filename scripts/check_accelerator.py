"""One command for a machine with a GPU or a TPU: are the kernels right there, how fast are they, and next to whom?

    python scripts/check_accelerator.py                      # everything, in about eight minutes
    python scripts/check_accelerator.py --only numerics      # parts: numerics, bandwidth, steps, peers, shapes
    python scripts/check_accelerator.py --quick --seconds 120

- numerics: every kernel (decode, prefill, paged, write) against its definition in float32 on the host: all kinds of
  store, 64 to 256 channels, one token and several, ragged lengths, positions, windows, soft-caps, tails and NaN in
  unused slots.
- bandwidth: stored bytes that decode attention reads per second, as a part of what a copy moves in the same run.
- steps: whole decode steps of a Llama-3.1-8B-shaped model with random weights over random caches, at 32k and 128k
  tokens, against the time that a copy of parameters and cache would take.
- peers: `jax.nn.dot_product_attention`, tokamax, and PyTorch's SDPA and FlexAttention (in a process of their own) on
  the same shapes; those that are not installed are named.
- shapes: bandwidth for 64 and 256 channels, for other groups of heads, and ragged batches.

Every row is written as soon as it is there, to `benchmarks/<device>/<date>.json` and, after each part, to a table
beside it: an interruption loses nothing. The work is done in a process of its own: where a kernel hangs or takes it
down, that is recorded, and another process goes on with the rest. A part that runs out of its share of the time says
how much it left out. With `--quick --small` all of it runs on a CPU with tiny shapes and interpreted kernels: that it
runs, and no more.

The exit code is 1 if a kernel is wrong, or fails where it should serve.
"""

import argparse
import collections
import dataclasses
import datetime
import functools
import importlib
import importlib.metadata
import json
import math
import os
import re
import signal
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # Examples are those of the tests.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch needs memory too.
if "cpu" not in os.environ.get("JAX_PLATFORMS", "cpu"):
    os.environ["JAX_PLATFORMS"] += ",cpu"  # Where the definitions are computed that kernels are compared with.

Row = dict[str, Any]
SHARES = {"numerics": 0.25, "bandwidth": 0.25, "steps": 0.25, "peers": 0.15, "shapes": 0.10}
BYTE_CYCLE = 2**27  # As `kvjax.evaluation.kernels.CHIP_CACHE`, for the process that does not import kvjax.
RESTARTS = 6


@dataclasses.dataclass(frozen=True)
class Run:
    """What all parts know.

    Attributes:
      options: Of the command line.
      bandwidth: Of a copy, in bytes per second.
      until: `time.monotonic()` after which a part begins nothing new.
      tried: What this part has begun already, by name, in a process before this one.
      begin: To be told what is begun.
      alive: To be told that work goes on, where nothing begins for long.
    """

    options: argparse.Namespace
    bandwidth: float
    until: float
    tried: frozenset[str]
    begin: Callable[[str], None]
    alive: Callable[[], None]

    @property
    def over(self) -> bool:
        return time.monotonic() > self.until


def main() -> None:
    options = arguments()
    if options.torch_peers:
        torch_peers(json.loads(options.torch_peers))
    elif options.date:
        work(options)
    else:
        supervise(options)


def supervise(options: argparse.Namespace) -> None:
    """Lets a process work, and another one after it where it does not come to its end."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("Stopped."))  # So that the working process ends too.
    date = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    job = ["--date", date, "--end", str(time.time() + options.seconds)]
    found = lambda: next(Path(options.out).glob(f"*/{file_stem(date)}.json"), None)  # noqa: E731
    for _ in range(RESTARTS + 1):
        worker = subprocess.Popen([sys.executable, *sys.argv, *job])
        try:
            ended = wait(worker, found, options.stall)
        finally:
            worker.kill()
            worker.wait()
        if ended == 0:
            break
        print("The working process " + ("hangs" if ended is None else f"ended with {ended}") + ".", flush=True)
        if found() is None:
            sys.exit("It did not get as far as its first result.")
    path = found()
    assert path is not None
    report = json.loads(path.read_text())
    print(f"{path}\n{path.with_suffix('.md')}")
    checks = report["parts"].get("numerics", [])
    wrong = [row["check"] for row in checks if row.get("verdict", "PASS") not in ("PASS", "refused")]
    broken = [part for part in options.only if part not in report["ended"]]
    if wrong or broken:
        sys.exit(f"Wrong: {'; '.join(wrong) or 'nothing'}. Parts that broke off: {', '.join(broken) or 'none'}.")


def wait(worker: subprocess.Popen, found: Callable[[], Path | None], stall: float) -> int | None:
    """The exit code of a process; None where it gives no sign of life for so many seconds."""
    sign = time.time()
    while time.time() < sign + stall:
        try:
            return worker.wait(timeout=1)
        except subprocess.TimeoutExpired:
            path = found()
            sign = max(sign, path.stat().st_mtime if path else 0.0)
    return None


def work(options: argparse.Namespace) -> None:
    """All parts that have not ended; what a process before this one was at counts as tried."""
    import jax

    from kvjax.evaluation.kernels import copy_bandwidth
    from kvjax.kernels import choose
    from kvjax.kernels.tuning import file_name

    device, bandwidth = choose.device_kind(), copy_bandwidth(2**24 if options.small else None)
    print(f"{device}, jax {jax.__version__}: a copy moves {bandwidth / 1e9:,.0f} GB/s", flush=True)
    fresh: Row = {
        "device": device,
        "backend": jax.default_backend(),
        "jax": jax.__version__,
        "commit": options.commit or commit(),
        "date": options.date,
        "quick": options.quick,
        "small": options.small,
        "copy_bytes_per_s": bandwidth,
        "parts": {},
        "tried": [],
        "running": False,
        "ended": [],
    }
    path = Path(options.out) / file_name(device).removesuffix(".json") / f"{file_stem(options.date)}.json"
    report = json.loads(path.read_text()) if path.is_file() else fresh
    save = lambda: write(path, json.dumps(report, indent=1))  # noqa: E731
    if report["running"]:
        lost(report, report["tried"][-1])
    save()
    parts = [part for part in options.only if part not in report["ended"]]
    left = sum(SHARES[part] for part in parts)
    for name in parts:  # What a part does not use, the next ones have.

        def begin(item: str, name: str = name) -> None:
            report["tried"].append([name, item])
            report["running"] = True
            save()

        tried = frozenset(item for part, item in report["tried"] if part == name)
        begun = time.monotonic()
        until = begun + (options.end - time.time()) * SHARES[name] / left
        left -= SHARES[name]
        rows = report["parts"].setdefault(name, [])
        try:
            run = Run(options, report["copy_bytes_per_s"], until, tried, begin, path.touch)
            for row in PARTS[name](run, report):
                rows.append(row)
                report["running"] = False
                print(f"{name}: {sentence(row)}", flush=True)
                save()
                if "CUDA_ERROR" in row.get("error", ""):  # After which nothing runs any more in this process.
                    os._exit(3)
            report["ended"].append(name)
        except Exception:  # What was measured so far counts, and so do the parts that follow.
            traceback.print_exc()
        report["running"] = False
        save()
        write(path.with_suffix(".md"), markdown(report))
        print(f"{name} took {time.monotonic() - begun:.0f} s", flush=True)


def lost(report: Row, tried: Sequence[str]) -> None:
    """A row for what took the process down."""
    part, item = tried
    error = "the process hung or died"
    row = {"check": item, "verdict": "ERROR"} if part == "numerics" else {"item": item}
    report["parts"].setdefault(part, []).append(row | {"error": error})


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(SHARES), help="parts, separated by commas, in this order")
    parser.add_argument("--seconds", type=float, default=480.0, help="for everything; most important first")
    parser.add_argument("--quick", action="store_true", help="fewer cases of everything")
    parser.add_argument("--small", action="store_true", help="tiny shapes, and kernels of other machines interpreted")
    parser.add_argument("--implementations", default="", help="whose numerics are checked; default: this machine's")
    parser.add_argument("--out", default=str(ROOT / "benchmarks"), help="folder of results")
    parser.add_argument("--commit", default="", help="of the code, where there is no git to ask")
    parser.add_argument("--keep", default="", help="folder for what kernels that are wrong say, and should, as .npz")
    parser.add_argument("--stall", type=float, default=75.0, help="seconds without a sign of life that mean: it hangs")
    parser.add_argument("--torch-peers", help=argparse.SUPPRESS)
    parser.add_argument("--date", help=argparse.SUPPRESS)
    parser.add_argument("--end", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.only = [part.strip() for part in options.only.split(",") if part.strip()]
    for part in options.only:
        if part not in SHARES:
            parser.error(f"there is no part {part!r}: {', '.join(SHARES)}")
    return options


def commit() -> str:
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def file_stem(date: str) -> str:
    """Of a report: "2031-05-01T1030" and seconds, from a date in ISO's form."""
    return date[:19].replace(":", "")


def write(path: Path, text: str) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(path.name + ".part")
    scratch.write_text(text + "\n")
    scratch.replace(path)


def skipped(names: Sequence[str]) -> Row:
    """What a part had no time for."""
    return {"left_out": list(names)}


# Numerics


@dataclasses.dataclass(frozen=True)
class Check:
    """One comparison.

    Attributes:
      name: For people.
      refuse: Why the kernel does not serve it, or None.
      run: What the kernel says of `arguments`, on the device.
      arguments: A pytree on the host.
      wanted: Says, on the host, what `run` should return.
      tolerance: Largest error, as a part of the largest value of each leaf.
    """

    name: str
    refuse: str | None
    run: Callable[[Any], Any]
    arguments: Any
    wanted: Callable[[], Any]
    tolerance: float


def numerics(run: Run, report: Row) -> Iterator[Row]:
    """Checks are judged in their order, while later ones are made and compiled."""
    del report
    import jax

    device, waiting = jax.devices()[0], collections.deque[tuple[Check, Future[Any]]]()
    with ThreadPoolExecutor(2 if run.options.small else 8) as pool:
        for check in all_checks(run.options):
            if check.name in run.tried:
                continue
            if check.refuse:
                run.begin(check.name)
                yield {"check": check.name, "verdict": "refused", "why": check.refuse}
                continue
            waiting.append((check, pool.submit(prepare_check, check)))
            while waiting and waiting[0][1].done() and not run.over:
                yield judge(run, *waiting.popleft(), device)
            if run.over:
                break
        else:
            while waiting and not run.over:
                yield judge(run, *waiting.popleft(), device)
            if not waiting:
                return
        for _, future in waiting:
            future.cancel()
        yield skipped([check.name for check, _ in waiting] + ["what would follow"])


def prepare_check(check: Check) -> tuple[Any, Any]:
    """The compiled kernel, and what it should say."""
    import jax

    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), check.arguments)
    with jax.default_device(host()):
        wanted = check.wanted()
    return jax.jit(check.run).lower(shapes).compile(), wanted


def host() -> Any:
    import jax

    return jax.local_devices(backend="cpu")[0]


def judge(run: Run, check: Check, prepared: Future[Any], device: Any) -> Row:
    import jax

    run.begin(check.name)
    row: Row = {"check": check.name}
    try:
        compiled, wanted = prepared.result()
        found = jax.device_get(compiled(jax.device_put(check.arguments, device)))
    except Exception as error:  # Whatever a compiler or a driver raises is what this is to find out.
        return row | {"verdict": "ERROR", "error": f"{type(error).__name__}: {str(error).strip()[:300]}"}
    pairs = zip(jax.tree_util.tree_leaves_with_path(wanted), jax.tree.leaves(found), strict=True)
    errors = {jax.tree_util.keystr(path): relative_error(got, leaf) for (path, leaf), got in pairs}
    verdict = "PASS" if max(errors.values()) <= check.tolerance else "FAIL"
    if verdict == "FAIL" and run.options.keep:
        keep(Path(run.options.keep), check.name, {"found": found, "wanted": wanted})
    return row | {"verdict": verdict, "errors": errors, "tolerance": check.tolerance}


def keep(folder: Path, name: str, trees: Row) -> None:
    """Pytrees of arrays as one file, to look at elsewhere."""
    import jax
    import numpy as np

    folder.mkdir(parents=True, exist_ok=True)
    arrays: dict[str, Any] = {
        f"{which}{jax.tree_util.keystr(path)}": np.asarray(leaf, np.float32)
        for which, tree in trees.items()
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
    np.savez_compressed(folder / f"{re.sub(r'[^A-Za-z0-9]+', '-', name)}.npz", **arrays)


def relative_error(found: Any, wanted: Any) -> float:
    """Largest difference, by the largest wanted value or 1; infinite for NaN, or where only one is masked (-1e30)."""
    import numpy as np

    found, wanted = np.asarray(found, np.float32), np.asarray(wanted, np.float32)
    masked = wanted < -1e29
    if found.shape != wanted.shape or not np.array_equal(found < -1e29, masked) or np.isnan(found).any():
        return math.inf
    difference = np.abs(np.where(masked, 0, found - wanted)).max(initial=0)
    return float(difference / max(np.abs(np.where(masked, 0, wanted)).max(initial=0), 1))


def implementations(options: argparse.Namespace) -> list[Any]:
    """Whose numerics are checked."""
    import jax

    from kvjax.kernels.choose import NATIVE

    if options.implementations:
        return options.implementations.split(",")
    native = NATIVE.get(jax.default_backend())
    return ([native] if native else ["tpu"] if options.small else []) + ["xla"]


def all_checks(options: argparse.Namespace) -> Iterator[Check]:
    """Most important first: 128 channels, then the other kernels, then other numbers of channels."""
    first, *others = (64,) if options.small else (128,) if options.quick else (128, 64, 256)
    yield from decode_checks(options, first)
    yield from prefill_checks(options)
    yield from paged_checks(options)
    yield from write_checks(options)
    for dim in others:
        yield from decode_checks(options, dim)


def decode_checks(options: argparse.Namespace, dim: int) -> Iterator[Check]:
    """Decode attention over every kind of store."""
    import jax

    from kvjax.kernels.decode import explain, reference, serve
    from tests.kernels.stores import KINDS

    for name, request in decode_examples(("2-bit tokens",) if options.small else KINDS, dim, options.small):
        for implementation in implementations(options):
            yield Check(
                name=f"decode {implementation} {name}",
                refuse=refusal(request, implementation, explain),
                run=functools.partial(serve, implementation=implementation),
                arguments=request,
                wanted=functools.partial(jax.jit(reference.decode), request),
                tolerance=1.5e-2 if request.q.dtype == "bfloat16" else 1e-4,
            )


def refusal(request: Any, implementation: Any, explain: Callable[..., Any]) -> str | None:
    """Why an implementation does not serve a request, or None."""
    from kvjax.kernels import KernelError

    try:
        explain(request, implementation)
    except KernelError as error:
        return str(error)
    return None


def decode_examples(kinds: Sequence[str], dim: int, small: bool) -> Iterator[tuple[str, Any]]:
    """Requests for every kind of store, and for KIVI's two."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from tests.kernels.stores import example, poison

    bf16 = jnp.bfloat16
    for kind in kinds:
        with jax.default_device(host()):
            rng = np.random.default_rng(0)
            short = example(rng, kind, dim, dtype=bf16)
            assert short.v is not None
            short = dataclasses.replace(short, k=poison(short.k, 150), v=poison(short.v, 150))
            every = example(rng, kind, dim, rows=4, options=True)
        yield f"{kind} D={dim} ragged, NaN unused, bfloat16", short
        yield f"{kind} D={dim} T=4, positions, window, soft-cap, bias, tail, logits, float32", every
        if small:
            continue
        with jax.default_device(host()):
            masked = example(rng, kind, dim, rows=4, options=True, dtype=bf16)
            long = example(rng, kind, dim, slots=4224, dtype=bf16, groups=8)
            lengths = jnp.asarray([[4100, 1], [2047, 0]], jnp.int32)
        masked = dataclasses.replace(masked, bias=None, logits=False)
        yield f"{kind} D={dim} T=4, positions, window, soft-cap, tail, bfloat16", masked
        yield f"{kind} D={dim} 4k slots, G=8, bfloat16", dataclasses.replace(long, lengths=lengths)
    for bits, slots, dtype in (
        ((2, 192, jnp.float32),) if small else ((2, 192, jnp.float32), (2, 4224, bf16), (4, 4224, bf16))
    ):
        with jax.default_device(host()):  # KIVI: keys per channel, values per token.
            rng = np.random.default_rng(1)
            keys, values = (
                example(rng, f"{bits}-bit {along}", dim, slots=slots, options=True, dtype=dtype)
                for along in ("tokens", "channels")
            )
            kivi = dataclasses.replace(keys, v=values.v, bias=None, logits=False, window=0, pos=None)
            kivi = dataclasses.replace(kivi, lengths=jnp.asarray([[slots, 1], [slots - 33, 0]], jnp.int32))
        yield f"KIVI-{bits} D={dim}, {slots} slots and a tail, {jnp.dtype(dtype).name}", kivi


def prefill_checks(options: argparse.Namespace) -> Iterator[Check]:
    """Prefill attention with its statistics, against NumPy in float64."""
    import jax

    from kvjax.kernels.prefill import explain
    from kvjax.kernels.prefill.request import make_request
    from tests.kernels.prefill_cases import Case, draw, naive

    length = 40 if options.small else 300
    two = (length, length // 2 + 3)
    cases = {
        "causal, every statistic": Case(length, two),
        "bfloat16, 128 channels": Case(length, two, dim=128, dtype="bfloat16"),
        "window, soft-cap": Case(length, two, window=length // 4, softcap=5.0),
        "past by head": Case(length, two, past=length // 3, by_head=True),
        "packed": Case(length, two, packed=(length // 2, length // 4, length - length // 2 - length // 4)),
        "256 channels, G=4": Case(length, two, dim=256, kv_heads=1, group=4),
    }
    for name, case in list(cases.items())[: 1 if options.small else 2 if options.quick else None]:
        with jax.default_device(host()):
            args, drawn = draw(case)
        keywords: dict[str, Any] = dict(drawn)
        arrays = {key: keywords.pop(key) for key in ("segments", "past")}
        request = make_request(*args, **arrays, **keywords)
        for implementation in implementations(options):
            yield Check(
                name=f"prefill {implementation} {name}",
                refuse=refusal(request, implementation, explain),
                run=functools.partial(run_prefill, keywords, implementation),
                arguments=(args, arrays),
                wanted=functools.partial(naive, case),
                tolerance=1.5e-2 if case.dtype == "bfloat16" else 1e-4,
            )


def missing_check(kernel: str) -> Check:
    """For kernels whose examples lie in a file of tests."""
    return Check(kernel, "its examples need pytest (pip install pytest).", lambda given: given, None, lambda: None, 0.0)


def paged_checks(options: argparse.Namespace) -> Iterator[Check]:
    """Heads that read pages by a table."""
    import jax
    import numpy as np

    from kvjax.kernels.paged import explain, paged_attention, reference

    if not installed("pytest"):
        yield missing_check("paged")
        return
    from tests.kernels import test_paged_gpu, test_paged_tpu

    # Hopper takes products in bfloat16 alone, so its kernel has examples of its own.
    exact = [(name, case, 1e-4) for name, case in test_paged_tpu.CASES.items()]
    rounded = [(name, case | {"q": "bfloat16"}, bound) for name, (case, bound) in test_paged_gpu.CASES.items()]
    for implementation in implementations(options):
        cases = rounded if implementation == "gpu" else exact
        for name, case, tolerance in cases[: 1 if options.small else 4 if options.quick else None]:
            with jax.default_device(host()):
                request = test_paged_tpu.make(np.random.default_rng(0), **case)
            yield Check(
                name=f"paged {implementation} {name}",
                refuse=refusal(request, implementation, explain),
                run=functools.partial(paged_attention, implementation=implementation),
                arguments=request,
                wanted=functools.partial(jax.jit(reference.attend), request),
                tolerance=max(tolerance, 1.5e-2) if request.q.dtype == "bfloat16" else tolerance,
            )


def write_checks(options: argparse.Namespace) -> Iterator[Check]:
    """Tokens that are written in place: every bit is compared."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from kvjax.kernels.write import explain, put, reference

    if not installed("pytest"):
        yield missing_check("write")
        return
    from tests.kernels.test_write_tpu import data

    for tokens in (1,) if options.small else (1, 5):
        with jax.default_device(host()):
            leaves, values = data(np.random.default_rng(0), 2, 3, 300, tokens)
            slot = jnp.asarray([[np.arange(tokens) * 57 + 7 * head for head in range(3)] for _ in range(2)], jnp.int32)
            slot = slot.at[0, 0, 0].set(300)  # Is not written.
        for implementation in implementations(options):
            refused = refusal(slot, implementation, functools.partial(explain, leaves))
            yield Check(
                name=f"write {implementation}, {tokens} tokens",
                refuse=refused,
                run=functools.partial(run_put, put, implementation),
                arguments=(leaves, slot, values),
                wanted=functools.partial(reference.put, leaves, slot, values),
                tolerance=0.0,
            )


def run_put(put: Callable[..., Any], implementation: Any, given: tuple[Any, Any, Any]) -> Any:
    return put(*given, implementation=implementation)


def run_prefill(keywords: Mapping[str, Any], implementation: Any, given: tuple[Any, Mapping[str, Any]]) -> Any:
    from kvjax.kernels.prefill import prefill_attention

    args, arrays = given
    return prefill_attention(*args, **arrays, **keywords, implementation=implementation)


# Bandwidth


def bandwidth(run: Run, report: Row) -> Iterator[Row]:
    """Llama 3.1 8B's shape."""
    del report
    from kvjax.evaluation.kernels import kernel_cases

    if run.options.small:
        cases = kernel_cases(("bf16", "kivi2"), (256,), (1,), heads=2)
    else:
        quick = run.options.quick
        grid = [(32768, 8), (131072, 1)] if quick else [(32768, 8), (131072, 1), (131072, 8), (4096, 8), (32768, 1)]
        cases = [case for context, batch in grid for case in kernel_cases(contexts=(context,), batches=(batch,))]
    yield from measured(run, cases)


def shapes(run: Run, report: Row) -> Iterator[Row]:
    """Other channels and heads, and ragged rows."""
    del report
    from kvjax.evaluation.kernels import kernel_cases

    if run.options.small:
        others = [{"dim": 64, "heads": 1, "ragged": True}]
        cases = [case for shape in others for case in kernel_cases(("int8",), (256,), (2,), **shape)]
    else:
        others = [{"ragged": True}, {"dim": 64}, {"dim": 256}, {"heads": 32, "group": 1}, {"heads": 1, "group": 32}]
        others = others[:2] if run.options.quick else others
        cases = [case for shape in others for case in kernel_cases(contexts=(32768,), batches=(8,), **shape)]
    yield from measured(run, cases)


def measured(run: Run, cases: Sequence[Any]) -> Iterator[Row]:
    """Rows of cases, in order: bfloat16 comes first among those of a shape."""
    from kvjax.evaluation.kernels import bench_kernels

    left = collections.deque(case for case in cases if str(case) not in run.tried)
    seconds = 1e-4 if run.options.small else None
    rows = bench_kernels(tuple(left), bandwidth=run.bandwidth, seconds=seconds, until=run.until)
    while left and not run.over:
        run.begin(str(left[0]))
        if (row := next(rows, None)) is None:
            break
        left.popleft()
        yield row
    if left:
        yield skipped([f"{case.kind} at {case.context:,} x {case.batch}" for case in left])


# Peers


def peers(run: Run, report: Row) -> Iterator[Row]:
    """Attention over bfloat16 keys and values, by others, next to our kernels over every kind of store."""
    import jax

    from kvjax.evaluation import kernels

    if run.options.small:
        cases = [kernels.Case(kind="bf16", context=256, heads=2)]
    else:
        grid = [(32768, 8), (131072, 1)] + ([] if run.options.quick else [(131072, 8), (4096, 8), (32768, 1)])
        cases = [kernels.Case(kind="bf16", context=context, batch=batch) for context, batch in grid]
    every, missing = jax_peers()
    seconds = 1e-4 if run.options.small else 0.05
    for case in cases:
        where = f"{case.context} x {case.batch}"
        functions = {name: function for name, function in every.items() if f"{name} at {where}" not in run.tried}
        if run.over:
            yield skipped([f"all at {where}"])
            continue
        programs = [peer_program(case, function) for function in functions.values()]
        compiled = kernels.compile_all(programs, run.bandwidth, seconds, workers=8)
        for name, one in zip(functions, compiled, strict=True):
            run.begin(f"{name} at {where}")
            yield peer_row(name, case, kernels.time_one(one, run.bandwidth, 5), report)
    if jax.default_backend() == "gpu" and installed("torch") and not run.over and "PyTorch" not in run.tried:
        run.begin("PyTorch")
        for row in torch_rows(cases, run):
            case = next(case for case in cases if (case.context, case.batch) == (row["context"], row["batch"]))
            name, found = row["peer"], {key: row[key] for key in ("error", "seconds") if key in row}
            if "seconds" in found:
                found["bytes_per_s"] = case.nbytes / found["seconds"]
                found["copy_fraction"] = found["bytes_per_s"] / run.bandwidth
            yield peer_row(name, case, found, report)
    elif not installed("torch"):
        missing.append("PyTorch SDPA and FlexAttention (pip install torch)")
    yield from ({"peer": name, "missing": True} for name in missing)


def peer_row(name: str, case: Any, found: Row, report: Row) -> Row:
    """With the ratio of its time to that of each of our kernels at this shape in this run."""
    row = {"peer": name, "context": case.context, "batch": case.batch, **found}
    ours = [
        other
        for other in report["parts"].get("bandwidth", [])
        if (other.get("context"), other.get("batch")) == (case.context, case.batch) and "seconds" in other
    ]
    if "seconds" in found:
        row["our_speedup"] = {other["kind"]: found["seconds"] / other["seconds"] for other in ours}
    return row


def installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def jax_peers() -> tuple[dict[str, Callable[..., Any]], list[str]]:
    """Functions of q [B, T, N, D], k and v [B, S, H, D]; and what is missing."""
    import jax

    functions: dict[str, Callable[..., Any]] = {}
    missing = []
    for implementation in ("cudnn", "xla"):
        if implementation == "cudnn" and jax.default_backend() != "gpu":
            missing.append("jax.nn.dot_product_attention (cudnn): needs an NVIDIA GPU")
            continue
        attention = functools.partial(jax.nn.dot_product_attention, implementation=implementation)
        functions[f"jax.nn ({implementation})"] = attention
    if installed("tokamax"):
        tokamax: Any = importlib.import_module("tokamax")
        names = ("mosaic", "triton", "xla_chunked") if jax.default_backend() == "gpu" else ("xla_chunked",)
        for name in names:
            functions[f"tokamax ({name})"] = functools.partial(tokamax.dot_product_attention, implementation=name)
    else:
        missing.append("tokamax (pip install tokamax)")
    return functions, missing


def peer_program(case: Any, attention: Callable[..., Any]) -> Any:
    """Keys and values lie as the peer wants them: tokens before heads."""
    import jax.numpy as jnp

    from kvjax.evaluation.kernels import Program, query_dtype, uniform

    q_shape = (case.batch, case.tokens, case.heads * case.group, case.dim)
    kv_shape = (case.batch, case.context, case.heads, case.dim)

    def make(seed: Any) -> Any:
        drawn = [uniform(3 * seed + jnp.uint32(i), shape) for i, shape in enumerate((q_shape, kv_shape, kv_shape))]
        q, k, v = (x.astype(query_dtype()) for x in drawn)
        return q, (k, v)

    return Program(make, lambda q, data: attention(q, *data), 2 * math.prod(kv_shape) * query_dtype().itemsize)


def torch_rows(cases: Sequence[Any], run: Run) -> list[Row]:
    """What the process that imports PyTorch says, as far as it gets."""
    wanted = [dataclasses.asdict(case) for case in cases]
    command = [sys.executable, __file__, "--torch-peers", json.dumps(wanted)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    until, text = max(run.until, time.monotonic() + 60), None
    while text is None:
        try:
            text, errors = process.communicate(timeout=5)
            why = (errors.strip().splitlines() or ["it failed"])[-1][:200] if process.returncode else ""
        except subprocess.TimeoutExpired:
            run.alive()
            if time.monotonic() > until:
                process.kill()
                (text, _), why = process.communicate(), "no time for the rest"
    rows = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    shape = {"context": cases[-1].context, "batch": cases[-1].batch}
    return rows + ([{"peer": "PyTorch", **shape, "error": why}] if why else [])


def torch_peers(cases: Sequence[Mapping[str, Any]]) -> None:
    """SDPA and FlexAttention over bfloat16 keys and values, by CUDA events; runs in a process without JAX.

    Prints a row of JSON for each.
    """
    torch: Any = importlib.import_module("torch")
    flex: Any = importlib.import_module("torch.nn.attention.flex_attention")
    compiled = torch.compile(flex.flex_attention, dynamic=False)
    sdpa = torch.nn.functional.scaled_dot_product_attention
    functions = {
        "PyTorch SDPA": lambda q, k, v: sdpa(q, k, v, enable_gqa=True),
        "PyTorch FlexAttention": lambda q, k, v: compiled(q, k, v, enable_gqa=True),
    }
    for case in cases:
        batch, heads, dim, context = (case[name] for name in ("batch", "heads", "dim", "context"))
        copies = min(max(-(-BYTE_CYCLE // (4 * batch * heads * context * dim)), 1), 8)
        draw = functools.partial(torch.randn, device="cuda", dtype=torch.bfloat16)
        q = draw((batch, heads * case["group"], case["tokens"], dim))
        stores = [tuple(draw((batch, heads, context, dim)) for _ in range(2)) for _ in range(copies)]
        for name, function in functions.items():
            row = {"peer": name, "context": context, "batch": batch}
            try:
                row["seconds"] = torch_seconds(torch, function, q, stores)
            except Exception as error:  # A peer that cannot serve a shape is a result.
                row["error"] = f"{type(error).__name__}: {str(error).strip()[:200]}"
            print(json.dumps(row), flush=True)


def torch_seconds(torch: Any, function: Callable[..., Any], q: Any, stores: Sequence[Any]) -> float:
    """Per call, captured in a CUDA graph so that launches by the host do not count; median of five."""
    calls = len(stores) * max(16 // len(stores), 1)
    with torch.inference_mode():
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for k, v in stores:
                function(q, k, v)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for i in range(calls):
                function(q, *stores[i % len(stores)])
        times = []
        for _ in range(6):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            times.append(begin.elapsed_time(end) / 1e3 / calls)
    return statistics.median(times[1:])


# Whole steps

LLAMA = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072 + 1024,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
}
SMALL = {"vocab_size": 256, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2} | {
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
STEPS, REPEATS = 32, 3
POSITIONS = ("pos", "order")  # What caches call the positions of their tokens.


def steps(run: Run, report: Row) -> Iterator[Row]:
    """Decode loops over caches that are built at their size, for every policy."""
    del report
    import jax

    from kvjax.evaluation.kernels import query_dtype
    from kvjax.models.families import config_from_hf

    options = run.options
    config = config_from_hf(LLAMA | (SMALL if options.small else {}), "Llama 3.1 8B")
    contexts = (256,) if options.small else (131072,) if options.quick else (131072, 32768)
    snapkv = "snapkv(128)" if options.small else "snapkv(4096)"
    policies = ("full", "kivi", snapkv) if options.small else ("full", "int8", "kivi(bits=4)", "kivi", snapkv)
    try:
        params = jax.block_until_ready(random_params(config, query_dtype()))
    except jax.errors.JaxRuntimeError as error:  # Of memory that the device does not have.
        yield {"item": "parameters", "error": str(error).strip().splitlines()[0][:300]}
        return
    abstract = jax.eval_shape(lambda: params)
    read = sum(x.nbytes for x in jax.tree.leaves(params)) - (0 if config.tied else params["embed"].nbytes)
    for context in contexts:
        if run.over:
            yield skipped([f"all at {context}"])
            return
        left = [policy for policy in policies if f"{policy} at {context}" not in run.tried]
        with ThreadPoolExecutor(2 if options.small else 8) as pool:  # Nothing is timed while others compile.
            preparing = [pool.submit(prepare_steps, abstract, config, context, policy) for policy in left]
            for _ in as_completed(preparing):
                run.alive()
        for i, (policy, prepared) in enumerate(zip(left, preparing, strict=True)):
            if run.over:
                yield skipped([f"{policy} at {context}" for policy in left[i:]])
                return
            run.begin(f"{policy} at {context}")
            row: Row = {"policy": policy, "context": context, "batch": 1}
            try:
                yield row | time_steps(prepared.result(), params, read, run.bandwidth)
            except Exception as error:  # Of a single policy; the others still count.
                yield row | {"error": f"{type(error).__name__}: {str(error).strip()[:300]}"}


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A decode loop, compiled, and how to make the cache that it starts from.

    Attributes:
      decode: (params, cache, logits, key, done) -> what `kvjax.generation.decode` returns.
      make_layer: A seed -> one layer's cache.
      assemble: Layers -> the cache.
      vocab: Tokens that the model knows.
    """

    decode: Any
    make_layer: Callable[[Any], Any]
    assemble: Callable[[tuple[Any, ...]], Any]
    layers: int
    vocab: int


def random_params(config: Any, dtype: Any) -> Any:
    """One dict per layer, made on the device, one layer after another."""
    import jax
    import jax.numpy as jnp

    from kvjax.models.params import abstract_params

    shapes = abstract_params(config, dtype)
    draw = lambda tree: jax.jit(lambda seed: fill(tree, seed, fill_param))  # noqa: E731
    make_layer, make_rest = draw(shapes["layers"][0]), draw({k: v for k, v in shapes.items() if k != "layers"})
    layers = tuple(make_layer(jnp.uint32(97 * i)) for i in range(config.num_layers))
    return {**make_rest(jnp.uint32(89)), "layers": layers}


def fill(tree: Any, seed: Any, draw: Callable[[str, Any, Any], Any]) -> Any:
    """Every leaf of a pytree of shapes by `draw(its name, its shape, a seed of its own)`."""
    import jax
    import jax.numpy as jnp

    leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
    drawn = [draw(leaf_name(path), leaf, 1000 * seed + jnp.uint32(i)) for i, (path, leaf) in enumerate(leaves)]
    return jax.tree.unflatten(structure, drawn)


def leaf_name(path: tuple[Any, ...]) -> str:
    """The last step of a path into a pytree: an attribute or a key."""
    return str(getattr(path[-1], "name", getattr(path[-1], "key", path[-1])))


def fill_param(name: str, leaf: Any, seed: Any) -> Any:
    import jax.numpy as jnp

    from kvjax.evaluation.kernels import uniform

    if name.endswith("norm"):
        return jnp.ones(leaf.shape, leaf.dtype)
    fan_in = leaf.shape[-1] if name in ("embed", "lm_head") else leaf.shape[0]
    return (uniform(seed, leaf.shape) * fan_in**-0.5).astype(leaf.dtype)


def prepare_steps(params: Any, config: Any, context: int, text: str) -> Prepared:
    """All from shapes: nothing is allocated."""
    import jax
    import jax.numpy as jnp

    import kvjax
    from kvjax.cache import Cache
    from kvjax.policies.plan import abstract_cache, plan

    dtype = params["embed"].dtype
    policy, one = kvjax.parse_policy(text), dataclasses.replace(config, layer_types=config.layer_types[:1])
    tight = abstract_cache(plan(policy, one, context, dtype), one, 1, dtype)
    roomy = jax.eval_shape(lambda cache: cache.reserve(STEPS * (REPEATS + 1)), tight)
    one_layer, named = roomy.layers[0], jax.tree_util.tree_leaves_with_path(tight.layers[0])
    held = {leaf_name(path): min(leaf.shape[-1], context) for path, leaf in named if leaf_name(path) in POSITIONS}
    draw = functools.partial(fill_cache, context, held)
    make_layer = jax.jit(lambda seed: fill(one_layer, seed, draw))

    def assemble(layers: tuple[Any, ...]) -> Any:
        seen = jnp.full((1,), context, jnp.int32)
        return Cache(layers=layers, seen=seen, shared=None, config=config, policy=policy.after_prompt)

    cache = jax.eval_shape(lambda: assemble((make_layer(jnp.uint32(0)),) * config.num_layers))
    logits = jax.ShapeDtypeStruct((1, config.vocab_size), jnp.float32)
    key, done = jax.eval_shape(lambda: jax.random.key(0)), jax.ShapeDtypeStruct((1,), bool)
    lowered = kvjax.decode.lower(params, config, policy.after_prompt, cache, logits, key, done, max_new_tokens=STEPS)
    return Prepared(lowered.compile(), make_layer, assemble, config.num_layers, config.vocab_size)


def fill_cache(context: int, held: Mapping[str, int], name: str, leaf: Any, seed: Any) -> Any:
    """Random content; the positions of the last tokens of the context in the first slots, none in the others."""
    import jax.numpy as jnp
    from jax import lax

    from kvjax.evaluation.kernels import noise, uniform

    if name in held:
        slot = jnp.arange(leaf.shape[-1], dtype=jnp.int32)
        pos = jnp.where(slot < held[name], context - held[name] + slot, -1)
        return jnp.broadcast_to(pos, leaf.shape)
    if name == "scale":
        return uniform(seed, leaf.shape, 0.01, 0.03).astype(leaf.dtype)
    if jnp.issubdtype(leaf.dtype, jnp.floating):
        return uniform(seed, leaf.shape).astype(leaf.dtype)
    if leaf.dtype == jnp.int32 and leaf.ndim == 4:
        return lax.bitcast_convert_type(noise(seed, leaf.shape), jnp.int32)
    if leaf.dtype in (jnp.int8, jnp.uint8):
        return noise(seed, leaf.shape).astype(leaf.dtype)
    raise ValueError(f"{name} {leaf.shape} {leaf.dtype}: no random content is known for this part of a cache.")


def time_steps(made: Prepared, params: Any, read: int, bandwidth: float) -> Row:
    """The loop goes on from where it stopped, on the cache that it returns; the first one does not count."""
    import jax
    import jax.numpy as jnp

    cache = made.assemble(tuple(made.make_layer(jnp.uint32(i)) for i in range(made.layers)))
    nbytes, logits = cache.nbytes, jnp.zeros((1, made.vocab), jnp.float32)
    key, done, times = jax.random.key(0), jnp.zeros((1,), bool), []
    jax.block_until_ready(cache)
    for _ in range(REPEATS + 1):
        start = time.perf_counter()
        tokens, _, logits, done, cache = made.decode(params, cache, logits, key, done)
        jax.block_until_ready((tokens, cache))
        times.append((time.perf_counter() - start) / STEPS)
    seconds = statistics.median(times[1:])
    if not bool(jnp.isfinite(logits).all()):
        raise ValueError("the logits are not finite")
    memory = made.decode.memory_analysis()
    return {
        "seconds": seconds,
        "tokens_per_s": 1 / seconds,
        "cache_nbytes": nbytes,
        "param_nbytes": read,
        "temp_nbytes": None if memory is None else memory.temp_size_in_bytes,
        "roofline_seconds": (read + nbytes) / bandwidth,
        "roofline_fraction": (read + nbytes) / bandwidth / seconds,
    }


# What people read


def sentence(row: Row) -> str:
    """A row in one line."""
    if "left_out" in row:
        return f"no time for {len(row['left_out'])} more, from {row['left_out'][0]} on"
    if "missing" in row:
        return f"missing: {row['peer']}"
    if "item" in row:
        return f"{row['item']}: {row['error']}"
    if "verdict" in row:
        told = row.get("why") or row.get("error") or f"largest error {max(row['errors'].values()):.1e}"
        return f"{row['verdict']} {row['check']}: {told}"
    name = row.get("kind") or row.get("peer") or row.get("policy")
    where = f"{name} at {row['context']:,} x {row['batch']}"
    if "error" in row:
        return f"{where}: {row['error']}"
    told = f"{where}: {1e6 * row['seconds']:,.1f} us"
    for key, text in (("copy_fraction", "of a copy"), ("roofline_fraction", "of the roofline")):
        told += f", {row[key]:.0%} {text}" if key in row else ""
    return told


def markdown(report: Row) -> str:
    lines = [
        f"# Kernels on {report['device']}",
        "",
        f"Measured {report['date']} with jax {report['jax']} at commit {report['commit']}; a copy moves "
        f"{report['copy_bytes_per_s'] / 1e9:,.0f} GB/s." + (" Tiny shapes: no measurement." if report["small"] else ""),
    ]
    for name, rows in report["parts"].items():
        remarks = [row for row in rows if "left_out" in row or "item" in row]
        lines += ["", f"## {name}", "", *TABLES[name]([row for row in rows if row not in remarks])]
        lines += ["", *(f"- {sentence(row)}" for row in remarks)]
    return "\n".join(lines).rstrip()


def grid(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (columns, ["---"] * len(columns), *rows)]


def numerics_table(rows: Sequence[Row]) -> list[str]:
    def cells(row: Row) -> list[str]:
        told = row.get("why") or row.get("error") or f"{max(row['errors'].values()):.1e} (of {row['tolerance']:.0e})"
        return [row["check"], row["verdict"], told.replace("|", "\\|").replace("\n", " ")]

    return grid(["check", "verdict", "largest error"], [cells(row) for row in rows])


def kernels_table(rows: Sequence[Row]) -> list[str]:
    columns = ["store", "context", "batch", "heads", "D", "served by", "us", "GB/s", "of copy", "vs dense", "vs bf16"]

    def cells(row: Row) -> list[str]:
        heads = f"{row['heads']} x {row['group']}" + (", ragged" if row["ragged"] else "")
        about = [row["kind"], f"{row['context']:,}", str(row["batch"]), heads, str(row["dim"]), row["implementation"]]
        if "error" in row:
            return [*about, row["error"].replace("|", "\\|"), *["-"] * 4]
        ratios = [f"{ratio:.2f}x" if (ratio := row[f"{name}_ratio"]) else "-" for name in ("dense", "bf16")]
        part = f"{row['copy_fraction']:.0%}" + (" (in cache)" if row["in_cache"] else "")
        return [*about, f"{1e6 * row['seconds']:,.1f}", f"{row['bytes_per_s'] / 1e9:,.0f}", part, *ratios]

    return grid(columns, [cells(row) for row in rows])


def steps_table(rows: Sequence[Row]) -> list[str]:
    columns = ["policy", "context", "ms a step", "tokens/s", "cache GB", "roofline ms", "of roofline"]

    def cells(row: Row) -> list[str]:
        if "error" in row:
            return [row["policy"], f"{row['context']:,}", row["error"].replace("|", "\\|"), *["-"] * 4]
        times = [f"{1e3 * row['seconds']:.2f}", f"{row['tokens_per_s']:.1f}", f"{row['cache_nbytes'] / 1e9:.2f}"]
        line = [f"{1e3 * row['roofline_seconds']:.2f}", f"{row['roofline_fraction']:.0%}"]
        return [row["policy"], f"{row['context']:,}", *times, *line]

    return grid(columns, [cells(row) for row in rows])


def peers_table(rows: Sequence[Row]) -> list[str]:
    kinds = list(dict.fromkeys(kind for row in rows for kind in row.get("our_speedup", {})))
    columns = ["peer", "context", "batch", "us", "of copy", *(f"ours, {kind}" for kind in kinds)]

    def cells(row: Row) -> list[str]:
        if "error" in row:
            text = row["error"].replace("|", "\\|").replace("\n", " ")
            return [row["peer"], f"{row['context']:,}", str(row["batch"]), text, "-", *["-"] * len(kinds)]
        ours = [f"{row['our_speedup'][kind]:.2f}x" if kind in row["our_speedup"] else "-" for kind in kinds]
        times = [f"{1e6 * row['seconds']:,.1f}", f"{row['copy_fraction']:.0%}"]
        return [row["peer"], f"{row['context']:,}", str(row["batch"]), *times, *ours]

    found = [row for row in rows if "missing" not in row]
    missing = [f"Missing: {row['peer']}." for row in rows if "missing" in row]
    return [*grid(columns, [cells(row) for row in found]), "", "\n\n".join(missing)]


PARTS: Mapping[str, Callable[[Run, Row], Iterator[Row]]] = {
    "numerics": numerics,
    "bandwidth": bandwidth,
    "steps": steps,
    "peers": peers,
    "shapes": shapes,
}
TABLES: Mapping[str, Callable[[Sequence[Row]], list[str]]] = {
    "numerics": numerics_table,
    "bandwidth": kernels_table,
    "steps": steps_table,
    "peers": peers_table,
    "shapes": kernels_table,
}


if __name__ == "__main__":
    main()
