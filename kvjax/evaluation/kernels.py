"""How fast attention over stored tokens is on this machine, measured against what its memory can do.

A decode step has to read every stored byte once, so a kernel is judged by the bytes it reads per second, as a part of
what a plain copy moves in the same run. Nothing is quantized for it: codes and scales are drawn at random where they
are used.

One call takes microseconds on an accelerator, less than its dispatch. So many calls run in one compiled loop, each
with a query that depends on the output before, and where stores are small several take turns, so that the chip's cache
does not hold them.
"""

import dataclasses
import functools
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from rich.table import Table

from kvjax.evaluation.report import plain_table
from kvjax.evaluation.results import Row
from kvjax.kernels import choose
from kvjax.kernels.decode import Request, Tail, explain, make_request, serve
from kvjax.kernels.parts import attend_part, dot_keys, dot_values
from kvjax.kernels.vectors import Vectors

CHIP_CACHE = 2**27  # No smaller than the last-level cache of any accelerator in use.
MOST_COPIES = 8  # Of a small store: each is a call of its own in the compiled loop.
SEED = jax.ShapeDtypeStruct((), jnp.uint32)
STEP = 128  # Contexts are multiples of it, so that all groups of tokens are whole.


# What is measured


@dataclasses.dataclass(frozen=True)
class Form:
    """How vectors are written.

    Attributes:
      dtype: Of codes that are numbers of their own; packed ones lie in int32 words.
      bits: Of a packed code; 0 where codes are not packed.
      tokens, channels: So many share a scale (and, packed, a zero); 0 channels: all of them.
      scale: Type of scales; "" where there are none.
    """

    dtype: str = "int32"
    bits: int = 0
    tokens: int = 1
    channels: int = 0
    scale: str = ""


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of store: how keys and values are written, and how many tokens stay in full precision besides."""

    k: Form
    v: Form
    tail: int = 0


def _alike(form: Form) -> Kind:
    return Kind(form, form)


def _kivi(bits: int) -> Kind:
    """KIVI (arXiv 2402.02750): keys per channel, values per token."""
    keys = Form(bits=bits, tokens=32, channels=1, scale="float16")
    return Kind(keys, Form(bits=bits, channels=32, scale="float16"), tail=128)


KINDS: Mapping[str, Kind] = {
    "bf16": _alike(Form("bfloat16")),
    "int8": _alike(Form("int8", scale="float32")),
    "fp8": _alike(Form("float8_e4m3fn", scale="float32")),
    "int4": _alike(Form(bits=4, channels=64, scale="float16")),
    "int4-token": _alike(Form(bits=4, scale="float16")),
    "kivi4": _kivi(4),
    "kivi2": _kivi(2),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One measurement; the default shape is that of Llama 3.1 8B.

    Attributes:
      kind: One of `KINDS`.
      context: Stored slots, a multiple of 128.
      batch, heads, group, dim: Rows, KV heads, query heads for each of them, channels.
      tokens: New tokens.
      ragged: Rows hold between a quarter of the context and all of it, instead of all.
    """

    kind: str
    context: int
    batch: int = 1
    heads: int = 8
    group: int = 4
    dim: int = 128
    tokens: int = 1
    ragged: bool = False

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"There is no kind of store {self.kind!r}: {', '.join(KINDS)}.")
        if self.context < STEP or self.context % STEP:
            raise ValueError(f"A context is a multiple of {STEP} tokens, got {self.context}.")
        for name in ("batch", "heads", "group", "tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.dim < 64 or self.dim % 64:
            raise ValueError(f"dim must be a multiple of 64, got {self.dim}.")

    @property
    def shape(self) -> tuple[int | bool, ...]:
        """All but the kind."""
        return dataclasses.astuple(self)[1:]

    @property
    def lengths(self) -> list[int]:
        """Occupied slots of each row."""
        if not self.ragged or self.batch == 1:
            return [self.context] * self.batch
        least, steps = self.context // 4, self.batch - 1
        return [least + (self.context - least) * row // steps for row in range(self.batch)]

    @property
    def nbytes(self) -> int:
        """Stored bytes that have to be read."""
        kind, tokens = KINDS[self.kind], sum(self.lengths)
        stored = sum(_bytes_per_token(form, self.dim) for form in (kind.k, kind.v))
        tail = 2 * self.batch * kind.tail * self.dim * query_dtype().itemsize
        return self.heads * (round(tokens * stored) + tail)


def _bytes_per_token(form: Form, dim: int) -> float:
    codes = dim * (form.bits / 8 if form.bits else jnp.dtype(form.dtype).itemsize)
    if not form.scale:
        return codes
    scales = dim / (form.channels or dim) / form.tokens
    return codes + scales * jnp.dtype(form.scale).itemsize * (2 if form.bits else 1)


def query_dtype() -> Any:
    """What products are taken in: float32 on CPUs, bfloat16 elsewhere."""
    return jnp.dtype(jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16)


def noise(seed: Array, shape: Sequence[int]) -> Array:
    """Random words [*shape] uint32, hashes of where they stand: compiles at once, and needs no memory besides."""
    x = lax.iota(jnp.uint32, math.prod(shape)).reshape(shape) + seed * jnp.uint32(0x9E3779B9)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = (x ^ (x >> shift)) * jnp.uint32(factor)
    return x ^ (x >> 16)


def uniform(seed: Array, shape: Sequence[int], low: float = -math.sqrt(3), high: float = math.sqrt(3)) -> Array:
    """[*shape] float32; the default has mean 0 and variance 1."""
    return low + (high - low) * (noise(seed, shape) >> 8).astype(jnp.float32) * 2.0**-24


def random_vectors(seed: Array, form: Form, shape: tuple[int, int, int, int]) -> Vectors:
    """[B, H, S, D] of mean 0 and variance of about 1, as they are stored."""
    if not form.scale:
        return Vectors(codes=uniform(seed, shape).astype(form.dtype))
    *outer, slots, dim = shape
    scale = uniform(seed + 1, (*outer, slots // form.tokens, dim // (form.channels or dim)), 0.5, 1.5)
    if form.bits:
        words = lax.bitcast_convert_type(noise(seed, (*outer, slots, dim * form.bits // 32)), jnp.int32)
        scale = scale * math.sqrt(12) / 2**form.bits
        zero = -scale * (2**form.bits - 1) / 2
        return Vectors(codes=words, scale=scale.astype(form.scale), zero=zero.astype(form.scale), bits=form.bits)
    codes = (64 * uniform(seed, shape)).astype(form.dtype)
    return Vectors(codes=codes, scale=(scale / 64).astype(form.scale))


def random_request(case: Case, seed: Array) -> Request:
    """What a case asks for, with random content; seed [] uint32."""
    kind, dtype, seeds = KINDS[case.kind], query_dtype(), [8 * seed + jnp.uint32(i) for i in range(0, 8, 2)]
    stored = (case.batch, case.heads, case.context, case.dim)
    recent = (2, case.batch, case.heads, kind.tail, case.dim)
    first = case.context + kind.tail
    q_pos = jnp.broadcast_to(first + jnp.arange(case.tokens, dtype=jnp.int32), (case.batch, case.tokens))
    k_tail, v_tail = uniform(seeds[3], recent).astype(dtype)
    pos = jnp.broadcast_to(case.context + jnp.arange(kind.tail, dtype=jnp.int32), (case.batch, 1, kind.tail))
    return make_request(
        uniform(seeds[0], (case.batch, case.heads * case.group, case.tokens, case.dim)).astype(dtype),
        random_vectors(seeds[1], kind.k, stored),
        random_vectors(seeds[2], kind.v, stored),
        jnp.asarray(case.lengths, jnp.int32),
        scale=case.dim**-0.5,
        q_pos=q_pos,
        tail=Tail(k=k_tail, v=v_tail, pos=pos) if kind.tail else None,
    )


# Programs: what can be timed


@dataclasses.dataclass(frozen=True)
class Program:
    """Something that reads stored keys and values.

    Attributes:
      make: A seed [] uint32 -> queries, and what is read: any pytree.
      run: (queries, what is read) -> output of the queries' shape.
      nbytes: That have to be read.
    """

    make: Callable[[Array], tuple[Array, Any]]
    run: Callable[[Array, Any], Array]
    nbytes: int

    @property
    def copies(self) -> int:
        """How many stores take turns."""
        if jax.default_backend() == "cpu":
            return 1
        return min(max(-(-CHIP_CACHE // max(self.nbytes, 1)), 1), MOST_COPIES)

    @property
    def in_cache(self) -> bool:
        """Whether they may fit the chip's cache all the same, so that its memory is not what is measured."""
        return self.copies * self.nbytes < CHIP_CACHE


def kernel_program(case: Case, implementation: choose.Implementation = "auto", **options: Any) -> Program:
    """Decode attention over a store."""

    def make(seed: Array) -> tuple[Array, Request]:
        request = random_request(case, seed)
        return request.q, request

    def run(q: Array, request: Request) -> Array:
        return serve(dataclasses.replace(request, q=q), implementation, **options).out

    return Program(make, run, case.nbytes)


def dense_program(case: Case) -> Program:
    """Plain attention over keys and values in the queries' type, masked by length: what one writes without kernels."""
    shape = (case.batch, case.heads, case.context, case.dim)

    def make(seed: Array) -> tuple[Array, tuple[Array, Array, Array]]:
        rows = (case.batch, case.heads, case.group * case.tokens, case.dim)
        shapes = (rows, shape, shape)
        q, k, v = (uniform(3 * seed + jnp.uint32(i), x).astype(query_dtype()) for i, x in enumerate(shapes))
        return q, (k, v, jnp.asarray(case.lengths, jnp.int32))

    def run(q: Array, data: tuple[Array, Array, Array]) -> Array:
        k, v, lengths = data
        mask = jnp.arange(case.context)[None, None, None] < lengths[:, None, None, None]
        mask = jnp.broadcast_to(mask, (case.batch, 1, case.tokens, case.context))
        q = q * jnp.asarray(case.dim**-0.5, q.dtype)
        return attend_part(dot_keys(q, k), mask, lambda p: dot_values(p, v)).out

    return Program(make, run, 2 * math.prod(shape) * query_dtype().itemsize)


def looped(run: Callable[[Array, Any], Array], steps: int) -> Callable[[Array, Sequence[Any]], Array]:
    """So many rounds of calls over several stores, none of which can start before the last one has ended."""

    def loop(q: Array, stores: Sequence[Any]) -> Array:
        def step(_: Array, q: Array) -> Array:
            for data in stores:
                # Else what does not depend on the query, such as a copy in another layout, would move out of the loop.
                q, data = lax.optimization_barrier((q, data))
                q = q + (1e-6 * run(q, data)).astype(q.dtype)
            return q

        return lax.fori_loop(0, steps, step, q)

    return loop


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A program, ready to be timed: both functions compiled, for so many steps of its loop."""

    program: Program
    make: Any
    loop: Any
    steps: int

    @property
    def temp_nbytes(self) -> int | None:
        """Memory that the loop takes besides its arguments and result; a copy of the store would show here."""
        memory = self.loop.memory_analysis()
        return None if memory is None else memory.temp_size_in_bytes


def compile_make(program: Program) -> Any:
    """What draws queries and stores."""
    return jax.jit(program.make).lower(SEED).compile()


def compile_loop(program: Program, bandwidth: float, seconds: float) -> tuple[Any, int]:
    """A loop of about so many seconds, if it reads at `bandwidth` bytes per second, and its steps."""
    steps = round(seconds * bandwidth / (program.copies * max(program.nbytes, 1)))
    steps = min(max(steps, 2), 2000)
    q, data = jax.eval_shape(program.make, SEED)
    return jax.jit(looped(program.run, steps)).lower(q, (data,) * program.copies).compile(), steps


def seconds_per_call(compiled: Compiled, repeats: int = 5) -> float:
    """Median over repeats of the loop, after one that does not count."""
    made = [compiled.make(jnp.uint32(i)) for i in range(compiled.program.copies)]
    q, stores = made[0][0], tuple(data for _, data in made)
    return median_seconds(lambda: compiled.loop(q, stores), repeats) / (compiled.steps * len(stores))


def median_seconds(run: Callable[[], Any], repeats: int) -> float:
    """Of `run`, to the end of its computation, after one that does not count."""
    jax.block_until_ready(run())
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def copy_bandwidth(nbytes: int | None = None, repeats: int = 5) -> float:
    """Bytes per second, read and written, of `x + 1` over an array that no cache holds."""
    on_cpu = jax.default_backend() == "cpu"
    nbytes = nbytes or (2**27 if on_cpu else 2**30)
    steps = 4 if on_cpu else 32
    copy = jax.jit(lambda x: lax.fori_loop(0, steps, lambda _, x: x + 1, x), donate_argnums=0)
    x, times = jnp.zeros(nbytes // 4, jnp.float32), []
    for _ in range(repeats + 1):  # The first does not count. Each takes over the array of the one before.
        start = time.perf_counter()
        x = jax.block_until_ready(copy(x))
        times.append(time.perf_counter() - start)
    return 2 * nbytes * steps / statistics.median(times[1:])


# Rows


def bench_kernels(
    cases: Sequence[Case],
    implementation: choose.Implementation = "auto",
    *,
    bandwidth: float | None = None,
    seconds: float | None = None,
    repeats: int = 5,
    workers: int = 8,
    until: float = math.inf,
) -> Iterator[Row]:
    """Times cases, those of one shape together with dense attention of that shape.

    Args:
      cases: Those of one shape one after another.
      implementation: As in `decode_attention`.
      bandwidth: Of a copy, in bytes per second; None: it is measured first.
      seconds: That a timed loop takes at the bandwidth of a copy; None: enough to hide its dispatch.
      repeats: The median of so many counts.
      workers: Programs that compile at the same time; nothing is timed meanwhile.
      until: No case begins after this `time.monotonic()`.

    Yields:
      A row per case, bfloat16 first among those of one shape. Ratios are times of the other by the kernel's: above 1
      the kernel is faster. A case that fails has an "error" and no times.
    """
    bandwidth = bandwidth or copy_bandwidth(repeats=repeats)
    seconds = seconds or (0.01 if jax.default_backend() == "cpu" else 0.05)
    for _, group in itertools.groupby(cases, key=lambda case: case.shape):
        if time.monotonic() > until:
            return
        together = sorted(group, key=lambda case: case.kind != "bf16")  # What the others are compared with.
        programs = [dense_program(together[0])] + [kernel_program(case, implementation) for case in together]
        dense, *compiled = compile_all(programs, bandwidth, seconds, workers)
        references = {"dense": time_one(dense, bandwidth, repeats).get("seconds"), "bf16": None}
        for case, one in zip(together, compiled, strict=True):
            if time.monotonic() > until:
                return
            row = _about(case, implementation) | time_one(one, bandwidth, repeats)
            if "seconds" in row:
                references |= {"bf16": row["seconds"]} if case.kind == "bf16" else {}
                row |= {f"{name}_ratio": other and other / row["seconds"] for name, other in references.items()}
            yield row


def compile_all(
    programs: Sequence[Program], bandwidth: float, seconds: float, workers: int
) -> list[Compiled | Exception]:
    """Compiles in parallel; a program that cannot be is replaced by what it raised."""

    with ThreadPoolExecutor(workers) as pool:
        makes = {program.make: pool.submit(compile_make, program) for program in programs}  # Some share one.
        loops = [pool.submit(compile_loop, program, bandwidth, seconds) for program in programs]

    def one(program: Program, loop: Future[tuple[Any, int]]) -> Compiled | Exception:
        try:
            return Compiled(program, makes[program.make].result(), *loop.result())
        except Exception as error:  # Compilers of kernels raise of everything; the other cases still count.
            return error

    return [one(program, loop) for program, loop in zip(programs, loops, strict=True)]


def time_one(compiled: Compiled | Exception, bandwidth: float, repeats: int) -> Row:
    """What was measured of a program, or its error."""
    if isinstance(compiled, Exception):
        return {"error": first_line(compiled)}
    try:
        seconds = seconds_per_call(compiled, repeats)
    except Exception as error:  # Memory that is not there, mostly.
        return {"error": first_line(error)}
    program = compiled.program
    return {
        "seconds": seconds,
        "bytes_per_s": program.nbytes / seconds,
        "copy_fraction": program.nbytes / seconds / bandwidth,
        "nbytes": program.nbytes,
        "temp_nbytes": compiled.temp_nbytes,
        "copies": program.copies,
        "steps": compiled.steps,
        "in_cache": program.in_cache,
    }


def first_line(error: BaseException) -> str:
    """Of an exception, with its type."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


def check_implementation(cases: Sequence[Case], implementation: choose.Implementation) -> None:
    """Raises KernelError where an implementation cannot serve a case, or would only be interpreted on this machine."""
    for name in {explain(abstract_request(case), implementation).implementation for case in cases}:
        if name not in ("xla", "reference") and choose.interpreted(name):
            raise choose.KernelError(
                f"The {name} kernel would be interpreted here, which says nothing about its speed."
            )


def abstract_request(case: Case) -> Request:
    """Shapes and types of what a case asks for."""
    return jax.eval_shape(functools.partial(random_request, case), SEED)


def _about(case: Case, implementation: choose.Implementation) -> Row:
    """The case, and who serves it."""
    choice = explain(abstract_request(case), implementation)
    return {**dataclasses.asdict(case), "implementation": choice.implementation, "reason": choice.reason}


def kernel_cases(
    kinds: Sequence[str] = tuple(KINDS), contexts: Sequence[int] = (), batches: Sequence[int] = (), **shape: Any
) -> list[Case]:
    """Kinds of store at contexts and batch sizes; what is left out suits the machine.

    Raises:
      ValueError: A kind is unknown, or a number makes no sense.
    """
    on_cpu = jax.default_backend() == "cpu"
    contexts = contexts or ((4096, 16384) if on_cpu else (4096, 32768, 131072))
    batches = batches or ((1,) if on_cpu else (1, 8))
    return [
        Case(kind=kind, context=context, batch=batch, **shape)
        for context, batch, kind in itertools.product(contexts, batches, kinds)
    ]


def kernel_table(rows: Sequence[Row], heading: str = "") -> Table:
    """Of `bench_kernels`, for the terminal."""
    out = plain_table(heading)
    out.add_column("store", no_wrap=True)
    for name in ("context", "batch", "µs", "GB/s", "of copy", "vs dense", "vs bf16"):
        out.add_column(name, justify="right", no_wrap=True)
    out.add_column("served by", no_wrap=True)
    for row, before in zip(rows, [None, *rows], strict=False):
        if before and (row["context"], row["batch"]) != (before["context"], before["batch"]):
            out.add_section()
        out.add_row(row["kind"], f"{row['context']:,}", str(row["batch"]), *_cells(row), row["implementation"])
    return out


def _cells(row: Row) -> list[str]:
    if "error" in row:
        return ["-"] * 5
    ratios = [f"{ratio:.2f}x" if (ratio := row[f"{name}_ratio"]) else "-" for name in ("dense", "bf16")]
    fraction = f"{row['copy_fraction']:.0%}" + ("*" if row["in_cache"] else "")
    return [f"{1e6 * row['seconds']:,.1f}", f"{row['bytes_per_s'] / 1e9:,.1f}", fraction, *ratios]


def reasons(rows: Sequence[Row]) -> list[str]:
    """Why each implementation was chosen, and what failed: one line each."""
    chosen = [f"{row['implementation']}: {row['reason'].rstrip('.')}." for row in rows]
    failed = [f"{row['kind']} at {row['context']:,}: {row['error']}" for row in rows if "error" in row]
    return list(dict.fromkeys(chosen + failed))
