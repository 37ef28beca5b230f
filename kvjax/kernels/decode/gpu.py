"""Decode attention on NVIDIA Hopper GPUs, in Pallas' Mosaic GPU dialect.

`gpu_schedule.py` divides the work, `gpu_kernel.py` does it; here a request becomes what the kernel reads. Nothing that
is large is copied for that: packed words are seen as 4-bit integers of the same bytes. Where those hold two codes each,
the kernel works on even and odd channels in turn, and queries and outputs are reordered outside, where they are small.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from kvjax.kernels import choose
from kvjax.kernels.decode.gpu_kernel import Config, Side, run, shared_memory
from kvjax.kernels.decode.gpu_schedule import join, schedule
from kvjax.kernels.decode.request import Request, Tail
from kvjax.kernels.parts import NEG, Part, attend_part, dot_keys, dot_values, merge, visible
from kvjax.kernels.vectors import Vectors

NEEDED = (0, 11)  # Earlier compilers infer fewer layouts, and earlier interpreters cannot read transposed tiles.
BLOCK = 64  # The smallest number of tokens per step.
SMALL = 12 << 10  # Bytes of a block.
PROCESSORS, SHARED_MEMORY, RESERVED = (
    132,
    228 << 10,
    4 << 10,
)  # Of an H100 or H200; bytes per processor, and per program.
OUTPUTS = 4096  # Channels of values times query rows that registers can hold.
CODES = (jnp.int8, jnp.float8_e4m3fn)
SCALES = (jnp.float32, jnp.bfloat16, jnp.float16)
VIEWS = {0: None, 2: jnp.int4, 4: jnp.int4, 8: jnp.int8}


def decode(
    request: Request,
    *,
    block: int = BLOCK,
    stages: int | None = None,
    programs: int | None = None,
    interpret: Any = None,
) -> Part:
    """The answer to a request.

    Args:
      block: Stored tokens per step, a multiple of 64.
      stages: Blocks that are on their way from memory at a time. None: more where blocks are small.
      programs: Over how many programs the work is divided. None: as many as run on an H100 or H200 at a time.
      interpret: True, or parameters of Pallas' interpreter, to run without a GPU.

    Raises:
      ValueError: The kernel cannot serve the request; says why.
    """
    if reason := refuse(request):
        raise ValueError(reason)
    if block % BLOCK or block > request.k.slots:
        raise ValueError(f"block must be a multiple of {BLOCK} and at most the {request.k.slots} slots, got {block}.")
    if interpret is True:
        interpret = interpreter()
    old = _stored(request, block, stages, programs, interpret or None)
    return old if request.tail is None else merge([old, _tail(request, request.tail)])


def interpreter(**options: Any) -> Any:
    """Parameters of Pallas' interpreter."""
    return getattr(plgpu, "InterpretGPUParams")(**options)  # noqa: B009


def refuse(request: Request) -> str | None:
    """Why the kernel cannot serve a request and what would change that, in a sentence; None where it can."""
    if jax.__version_info__ < NEEDED:
        return (
            f"it needs JAX {'.'.join(map(str, NEEDED))} or newer, which needs Python 3.12; this is {jax.__version__}."
        )
    if reason := choose.unless_hopper():
        return reason
    if request.q.dtype != jnp.bfloat16:
        return f"products are taken in bfloat16, but queries are {request.q.dtype}."
    if request.v is None:
        return "values that are a part of the keys (latent) are not supported."
    if request.bias is not None or request.logits:
        return "it neither adds a bias nor returns logits."
    rows, slots = request.q.shape[2], request.k.slots
    if (most := OUTPUTS // request.v.dim) < -(-rows // 8) * 8:
        return f"{rows} query rows per KV head do not fit registers; {most} or fewer do: ask for fewer new tokens."
    if slots < BLOCK:
        return f"{slots} slots are fewer than a block of {BLOCK}."
    if request.pos is not None and slots % 4:
        return f"positions of {slots} slots cannot be copied, which needs a multiple of 4."
    for name, vectors in (("k", request.k), ("v", request.v)):
        if reason := _refuse_vectors(vectors):
            return f"{name} {reason}"
    return None


def _refuse_vectors(x: Vectors) -> str | None:
    dtype, (tokens, channels) = x.codes.dtype, x.group
    if x.dim % 64 or x.dim > 256:
        return f"has {x.dim} channels; 64, 128, 192 and 256 are possible."
    if x.scale is None:
        return None if dtype == jnp.bfloat16 else f"is stored as {dtype} without a scale; bfloat16 is possible."
    if x.scale.dtype not in SCALES or (x.zero is not None and x.zero.dtype != x.scale.dtype):
        return f"has scales in {x.scale.dtype}; float32, bfloat16 and float16 are possible, for scale and zero alike."
    if not x.bits and (dtype not in CODES or x.zero is not None or (tokens, channels) != (1, x.dim)):
        return f"is stored as {dtype}; int8 and float8_e4m3fn are possible, with one scale per token and no zero."
    if x.bits and (x.zero is None or (tokens > 1 and channels > 1)):
        return "has packed codes, which need a scale and a zero, per token or per channel."
    if tokens == 1 and channels != x.dim and channels not in (32, 64, 128):
        return f"shares a scale among {channels} channels; 32, 64, 128 or all are possible."
    if tokens > 1 and tokens not in (32, 64) and tokens % 128:
        return f"shares a scale among {tokens} tokens; 32, 64 and multiples of 128 are possible."
    if tokens == 1 and (x.slots * x.scale.shape[3] * x.scale.dtype.itemsize) % 16:
        return f"has scales of {x.slots} slots that cannot be copied; a multiple of 16 slots is always possible."
    return None


def _stored(request: Request, block: int, stages: int | None, programs: int | None, interpret: Any) -> Part:
    assert request.v is not None
    batch, heads, rows, dim = request.q.shape
    k, v = side(request.k), side(request.v)
    config = Config(
        k=k,
        v=v,
        rows=-(-rows // 8) * 8,
        slots=request.k.slots,
        block=block,
        stages=stages or (2 if k.nbytes(block) + v.nbytes(block) > SMALL else 4),
        programs=programs or PROCESSORS,
        masked=request.pos is not None,
        window=request.window,
        softcap=request.softcap,
    )
    if programs is None:
        together = max(1, min(3, SHARED_MEMORY // (shared_memory(config) + RESERVED)))
        config = dataclasses.replace(config, programs=PROCESSORS * together)
    lengths = jnp.minimum(request.lengths, request.k.slots).reshape(-1)
    q = sort_planes(request.q, k.planes).reshape(batch * heads, rows, dim)
    arrays = {"lengths": lengths, "q": jnp.pad(q, ((0, 0), (0, config.rows - rows), (0, 0)))}
    for name, vectors in (("k", request.k), ("v", request.v)):
        arrays |= {name + suffix: x for suffix, x in views(vectors).items()}
    if request.pos is not None:
        q_pos = jnp.tile(request.q_pos, (1, rows // request.tokens))
        arrays["pos"] = request.pos.reshape(-1, request.k.slots)
        arrays["q_pos"] = jnp.pad(q_pos, ((0, 0), (0, config.rows - rows)), constant_values=-1)
    plan = schedule(lengths, block, config.programs)
    out, sums = run(config, plan, arrays, interpret)
    out, lse = join(out, sums[:, 0], sums[:, 1], plan)
    out = out[:, :rows].reshape(batch, heads, rows, v.dim)
    lse = lse[:, :rows].reshape(batch, heads, rows)
    known = jnp.tile(request.q_pos >= 0, (1, rows // request.tokens))[:, None]
    out = jnp.where(known[..., None], merge_planes(out, v.planes), 0.0)
    return Part(out=out, lse=jnp.where(known, lse, NEG))


def _tail(request: Request, tail: Tail) -> Part:
    """Attention over the tail: a few tokens, left to XLA."""
    mask = visible(request.q_pos[:, None], tail.pos, request.window)
    v = jnp.where(mask.any(2)[..., None], tail.v, 0)
    logits = dot_keys(request.q, tail.k.astype(request.q.dtype))
    part = attend_part(logits, mask, lambda p: dot_values(p, v.astype(request.q.dtype)), request.softcap)
    return Part(out=part.out, lse=part.lse)


def side(vectors: Vectors) -> Side:
    """What the kernel has to know of how vectors are stored."""
    dtype = VIEWS[vectors.bits] or vectors.codes.dtype
    if vectors.scale is None:
        return Side(vectors.dim, dtype)
    tokens, channels = vectors.group
    scaled = "slot" if vectors.zero is None else "group" if tokens == 1 else "channel"
    group = tokens if scaled == "channel" else channels
    return Side(vectors.dim, dtype, vectors.bits, scaled, group, vectors.scale.dtype)


def views(vectors: Vectors) -> dict[str, Array]:
    """Codes and scales with rows and heads in one axis, as the kernel reads them: the same bytes."""
    flat = lambda x: x.reshape(-1, *x.shape[2:])  # noqa: E731
    codes = flat(vectors.codes)
    if view := VIEWS[vectors.bits]:
        codes = lax.bitcast_convert_type(codes, view).reshape(*codes.shape[:2], -1)
    found = {"": codes}
    for name, x in (("_scale", vectors.scale), ("_zero", vectors.zero)):
        if x is not None:
            found[name] = flat(x) if vectors.group[0] > 1 else x.reshape(x.shape[0] * x.shape[1], -1)
    return found


def sort_planes(x: Array, planes: int) -> Array:
    """[..., D] -> [..., D]: the first channel of each `planes` neighbours, then the second ones, and so on."""
    return jnp.swapaxes(x.reshape(*x.shape[:-1], -1, planes), -1, -2).reshape(x.shape)


def merge_planes(x: Array, planes: int) -> Array:
    """The inverse of `sort_planes`."""
    return jnp.swapaxes(x.reshape(*x.shape[:-1], planes, -1), -1, -2).reshape(x.shape)
