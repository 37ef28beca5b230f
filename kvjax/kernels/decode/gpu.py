"""Decode attention on NVIDIA Hopper GPUs, in Pallas' Mosaic GPU dialect.

`gpu_schedule.py` divides the work, `gpu_kernel.py` does it, reading what `gpu_stored.py` knows, and `gpu_join.py` joins
the parts; here a request becomes what the kernel reads. Nothing that is large is copied for that.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from kvjax.kernels import choose
from kvjax.kernels.decode.gpu_join import join
from kvjax.kernels.decode.gpu_kernel import ROWS, Config, run, shared_memory
from kvjax.kernels.decode.gpu_schedule import schedule
from kvjax.kernels.decode.gpu_stored import merge_planes, refuse_vectors, side, sort_planes, views, weave
from kvjax.kernels.decode.request import Request, Tail
from kvjax.kernels.hopper import PROCESSORS, RESERVED, SHARED_MEMORY, interpreter
from kvjax.kernels.parts import NEG, Part
from kvjax.kernels.vectors import Vectors

NEEDED = (0, 11)  # Earlier compilers infer fewer layouts, and earlier interpreters cannot read transposed tiles.
BLOCK = 64  # The smallest number of tokens per step.
SMALL = 12 << 10  # Bytes of a block.
OUTPUTS = 4096  # Channels of values times query rows that registers can hold; half of it with a bias.


@dataclasses.dataclass(frozen=True)
class Tuning:
    """How the kernel works, whatever it works on.

    Attributes:
      block: Stored tokens per step, a multiple of 64.
      stages: Blocks that are on their way from memory at a time. None: more where blocks are small.
      programs: Over how many programs the work is divided. None: as many as run on an H100 or H200 at a time.
      interpret: None, True, or parameters of Pallas' interpreter, to run without a GPU.
    """

    block: int = BLOCK
    stages: int | None = None
    programs: int | None = None
    interpret: Any = None


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
      block, stages, programs, interpret: See `Tuning`.

    Raises:
      ValueError: The kernel cannot serve the request; says why.
    """
    if reason := refuse(request):
        raise ValueError(reason)
    if block % BLOCK or block > request.k.slots:
        raise ValueError(f"block must be a multiple of {BLOCK} and at most the {request.k.slots} slots, got {block}.")
    assert request.v is not None
    lengths = jnp.minimum(request.lengths, request.k.slots).reshape(-1)
    return attend(
        request,
        request.k,
        request.v,
        blocks=(lengths + block - 1) // block,
        where={"lengths": lengths},
        piece=block,
        tuning=Tuning(block, stages, programs, interpret),
        tail=request.tail if request.tail is not None and request.tail.k.shape[2] else None,
        bias=request.bias,
    )


def refuse(request: Request) -> str | None:
    """Why the kernel cannot serve a request and what would change that, in a sentence; None where it can."""
    slots = request.k.slots
    if request.v is None:
        return "values that are a part of the keys (latent) are not supported."
    if request.logits:
        return "it does not return logits."
    if reason := refuse_rows(request, request.v.dim, request.bias is not None):
        return reason
    if slots < BLOCK:
        return f"{slots} slots are fewer than a block of {BLOCK}."
    if slots % ROWS:
        return f"{slots} slots cannot be copied, which needs a multiple of {ROWS}."
    for name, vectors in (("k", request.k), ("v", request.v)):
        if reason := refuse_vectors(vectors):
            return f"{name} {reason}"
    return None


def refuse_rows(request: Any, value_dim: int, biased: bool = False) -> str | None:
    """Why the kernel cannot serve any request that asks like this one, or None."""
    if jax.__version_info__ < NEEDED:
        return (
            f"it needs JAX {'.'.join(map(str, NEEDED))} or newer, which needs Python 3.12; this is {jax.__version__}."
        )
    if reason := choose.unless_hopper():
        return reason
    if request.q.dtype != jnp.bfloat16:
        return f"products are taken in bfloat16, but queries are {request.q.dtype}."
    rows, most = request.q.shape[2], OUTPUTS // value_dim // (2 if biased else 1)
    if most < -(-rows // 8) * 8:
        return f"{rows} query rows per KV head do not fit registers; {most} or fewer do: ask for fewer new tokens."
    return None


def attend(
    request: Any,
    k: Vectors,
    v: Vectors,
    *,
    blocks: Array,
    where: dict[str, Array],
    piece: int,
    tuning: Tuning,
    tail: Tail | None = None,
    bias: Array | None = None,
) -> Part:
    """Attention of q [B, Hq, N, D] of a request over the tokens of its rows, wherever they lie.

    Args:
      request: Decode or paged: its q, q_pos, pos [B, Hk or 1, S], window and softcap are read.
      k, v: [B, Hk, S, D], Hq a multiple of Hk.
      blocks: How many blocks each query head has [B * Hq] int32.
      where: And where they are, in pieces of `piece` slots: see `gpu_kernel.run`.
      tail, bias: As in `Request`.
    """
    batch, heads, rows, dim = request.q.shape
    config = _config(request, k, v, piece, "first" in where, tuning, tail, bias)
    pad = lambda x, value=0: jnp.pad(  # noqa: E731
        x, [(0, 0)] * (x.ndim - 2) + [(0, config.rows - rows), (0, 0)], constant_values=value
    )
    q = order_keys(request.q, config).reshape(batch * heads, rows, dim)
    arrays = where | {"q": pad(q)}
    for name, vectors in (("k", k), ("v", v)):
        arrays |= {name + suffix: x for suffix, x in views(vectors).items()}
    if request.pos is not None:
        arrays["pos"] = request.pos.reshape(-1, k.slots)
    if bias is not None:
        arrays["bias"] = bias.astype(jnp.float32).reshape(batch * heads, rows, k.slots)
    if tail is not None:
        arrays |= _tail(tail, config, request.q.dtype)
        blocks = blocks + config.tail
    if config.masked or config.tail:
        q_pos = jnp.tile(request.q_pos, (1, rows // request.tokens))
        arrays["q_pos"] = pad(q_pos[..., None], -1)[..., 0]
    out, lse = _solve(config, interpreter() if tuning.interpret is True else tuning.interpret or None, blocks, arrays)
    out = jnp.swapaxes(out, 1, 2)[:, :rows].reshape(batch, heads, rows, v.dim)
    lse = lse[:, :rows].reshape(batch, heads, rows)
    known = jnp.tile(request.q_pos >= 0, (1, rows // request.tokens))[:, None]
    out = jnp.where(known[..., None], merge_planes(out, config.v.planes), 0.0)
    return Part(out=out, lse=jnp.where(known, lse, NEG))


@functools.partial(jax.jit, static_argnums=(0, 1))  # Layers are alike: traced and lowered once for all of them.
def _solve(config: Config, interpret: Any, blocks: Array, arrays: dict[str, Array]) -> tuple[Array, Array]:
    plan = schedule(blocks, config.programs)
    out, sums = run(config, plan, arrays, interpret)
    return join(out, sums, plan, interpret)


def _config(
    request: Any, k: Vectors, v: Vectors, piece: int, table: bool, tuning: Tuning, tail: Tail | None, bias: Array | None
) -> Config:
    k_side, v_side = side(k), side(v)
    few = k_side.nbytes(tuning.block) + v_side.nbytes(tuning.block) > SMALL
    config = Config(
        k=k_side,
        v=v_side,
        rows=-(-request.q.shape[2] // 8) * 8,
        slots=k.slots,
        block=tuning.block,
        piece=piece,
        table=table,
        stages=tuning.stages or (2 if few else 4),
        programs=tuning.programs or PROCESSORS,
        tail=0 if tail is None else -(-tail.k.shape[2] // tuning.block),
        masked=request.pos is not None,
        bias=0 if bias is None else bias.shape[2],
        window=request.window,
        softcap=request.softcap,
    )
    if tuning.programs is None:
        together = max(1, min(4, SHARED_MEMORY // (shared_memory(config) + RESERVED)))
        config = dataclasses.replace(config, programs=PROCESSORS * together)
    return config


def order_keys(x: Array, config: Config) -> Array:
    """Channels [..., D] in the order in which stored keys are multiplied."""
    x = sort_planes(x, config.k.planes)
    return weave(x) if config.k.in_registers(config.block) else x


def _tail(tail: Tail, config: Config, dtype: Any) -> dict[str, Array]:
    """A tail in whole blocks, channels in the order of what is stored."""

    def blocks(x: Array, axis: int, value: int) -> Array:
        missing = config.tail * config.block - x.shape[axis]
        x = jnp.pad(x, [(0, missing if i == axis else 0) for i in range(x.ndim)], constant_values=value)
        return x.reshape(-1, *x.shape[2:])

    k, v = order_keys(tail.k.astype(dtype), config), sort_planes(tail.v.astype(dtype), config.v.planes)
    return {"tail_k": blocks(k, 2, 0), "tail_v": blocks(v, 2, 0), "tail_pos": blocks(tail.pos, 2, -1)}
