"""Decode attention on TPUs: one Pallas kernel that reads every stored byte once.

The grid walks over rows, KV heads, splits of the sequence and blocks of slots; softmax and output accumulate in
float32 scratch (arXiv:1805.02867). Blocks beyond a row's length are neither fetched nor computed. Codes become numbers
in registers only, and scales never touch them: whatever shares a scale is folded into the small side of the product.

Which side has scales of their own decides how (N rows, C groups):

- A scale per token and group of channels. Keys: the query is spread into C copies, each with its own channels, one
  product [C * N, block] follows, and its parts are scaled and added up. Values: the weights are scaled into C copies
  and every channel takes the product of its own copy.
- A scale per channel and group of tokens. The same with the sides exchanged, for tiles of 128 tokens or more: the
  query times the scales of every group, the weights of every group times values, then times the scales.
- `zero` and the offset of unpacked codes follow from sums of the same queries or weights.

The matrix unit loads codes as its stationary side, so that C * N rows cost about what N do while they are few.

Blocks have channels on lanes ([block, D]) where D is a multiple of 128. Otherwise, as for packed words, tokens
are on lanes ([D, block]): XLA lays such arrays out that way by itself, so that swapping axes is free.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kvjax.kernels.decode.request import Request, Tail
from kvjax.kernels.parts import NEG, Part, merge
from kvjax.kernels.vectors import Vectors

LANES, SUBLANES = 128, 8
VMEM = 11 << 20  # Of the 16 MiB that a kernel gets by default on v5e and v5p; the rest is for what is not counted.
TOKENS = 16  # New tokens that make sense here; a longer chunk is a prefill.
ROWS = 1024  # Rows of the largest product.
TAIL = 512 << 10  # Numbers of a head's tail.


def decode(request: Request, *, block: int | None = None, splits: int | None = None, interpret: Any = False) -> Part:
    """The answer to a request.

    Args:
      request: What `refuse` does not refuse.
      block: Slots per step, see `check_block`; None: `default_block`.
      splits: Parts of the sequence that the cores of a chip may work on at the same time; rounded down to a divisor of
        the number of blocks. None: two where there is a single row and head.
      interpret: True or `pltpu.InterpretParams(...)` to run on any device.

    Raises:
      ValueError: The request is refused, or the block does not fit it.
    """
    if reason := refuse(request):
        raise ValueError(reason)
    block = default_block(request) if block is None else block
    if reason := check_block(request, block):
        raise ValueError(reason)
    batch, heads, rows, _ = request.q.shape
    blocks = pl.cdiv(request.k.slots, block)
    splits = (2 if batch * heads == 1 else 1) if splits is None else splits
    splits = max(n for n in range(1, max(min(splits, blocks), 1) + 1) if blocks % n == 0)
    out, lse, logits = _call(request, block, blocks // splits, splits, interpret)
    out = out[..., -request.latent :] if request.v is None else out
    part = merge([Part(out=out[:, :, s, :rows], lse=lse[:, :, s, :rows, 0]) for s in range(splits)])
    if not request.logits:
        return part
    stored, tail = logits
    if request.tail is None:
        return dataclasses.replace(part, logits=stored)
    return dataclasses.replace(part, logits=jnp.concatenate([stored, tail[..., : request.tail.pos.shape[2]]], -1))


def refuse(request: Request) -> str | None:
    """Why the kernel cannot serve a request, or None."""
    if request.q.dtype not in (jnp.bfloat16, jnp.float32):
        return f"Products are taken in bfloat16 or float32 on TPUs, not {request.q.dtype}: cast q."
    if request.tokens > TOKENS:
        return f"{request.tokens} new tokens are a prefill: decode at most {TOKENS} at a time."
    if request.k.slots == 0:
        return "There are no stored slots: attend to the new tokens alone."
    if request.tail is not None and sum(x.size for x in (request.tail.k, request.tail.v)) > TAIL * request.lengths.size:
        return f"A tail of {request.tail.pos.shape[2]} tokens does not fit fast memory: store some of them."
    stores = {"keys": request.k} | ({} if request.v is None else {"values": request.v})
    for name, x in stores.items():
        if reason := refuse_vectors(x, padded(request.q.shape[2], SUBLANES)):
            return f"The {name}: {reason}"
    return None


def refuse_vectors(x: Vectors, rows: int) -> str | None:
    """Why vectors cannot be read for so many query rows, or None."""
    tokens, channels = x.group
    dtypes = (jnp.int32,) if x.bits else (jnp.bfloat16, jnp.float32, jnp.int8, jnp.float8_e4m3fn)
    if x.codes.dtype not in dtypes:
        return f"codes of type {x.codes.dtype} are not read here: store " + ", ".join(jnp.dtype(d).name for d in dtypes)
    if x.scale is not None and x.scale.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        return f"scales of type {x.scale.dtype} are not read here: make them float32, bfloat16 or float16."
    if x.zero is not None and (x.scale is None or x.scale.shape != x.zero.shape):
        return "`zero` needs a `scale` of its shape."
    if tokens > 1 and channels > 1:
        return f"a scale spans {tokens} tokens and {channels} channels: let it span one of them only."
    if tokens > 1 and tokens < x.slots and LANES % tokens and tokens % LANES:
        return f"{tokens} tokens share a scale: make it a divisor or a multiple of {LANES}, or all tokens."
    copies = _spread(x) if tokens == 1 else max(LANES // tokens, 1)
    if copies * rows > ROWS:
        return f"{copies} scale groups times {rows} rows exceed {ROWS}: use larger groups or fewer new tokens."
    return None


def check_block(request: Request, block: int) -> str | None:
    """Why a step cannot take so many slots, or None."""
    if block <= 0 or block % LANES:
        return f"A block of {block} slots is not a multiple of {LANES}."
    for x in (request.k, request.v):
        tokens = 1 if x is None else x.group[0]
        if x is None or x.scale is None or tokens in (1, x.slots):
            continue
        if block % tokens and tokens % block:
            return f"A block of {block} slots and groups of {tokens} tokens: one must divide the other."
        form = form_of(x, block)
        if form.stored < x.scale.shape[2] and form.stored % form.used:
            return f"A block of {block} slots has {form.used} groups of tokens, which does not divide {form.stored}."
    return None


def default_block(request: Request) -> int:
    """Slots per step, from shapes alone: as many as fast memory holds twice, with what they become on the way."""
    packed = all(0 < x.bits <= 4 for x in (request.k, request.v) if x is not None)
    block = min(4096 if packed else 2048, padded(request.k.slots, LANES))
    while block > LANES and (block * _bytes_per_slot(request) > VMEM or check_block(request, block)):
        block = padded(block // 2, LANES)
    return block


def _bytes_per_slot(request: Request) -> float:
    rows, item = padded(request.q.shape[2], SUBLANES), request.q.dtype.itemsize
    total = 0.0
    for x in (request.k, request.v):
        if x is not None:
            copies = _spread(x) if x.group[0] == 1 else 1
            # Twice in storage, once as numbers, and the float32 and rounded rows of its product.
            total += 2 * x.nbytes_per_slot + x.dim * item + copies * rows * (4 + item)
    total += 8 * (request.pos is not None) + 8 * rows * ((request.bias is not None) + request.logits)
    return total + 4 * 4 * rows


# What the kernel sees.


@dataclasses.dataclass(frozen=True)
class Form:
    """How one `Vectors` looks to the kernel.

    Attributes:
      dim: D.
      lanes: Tokens are on lanes: blocks of numbers are [D, block] (words: [W, block]), not [block, D].
      turn: Words come as [block, W] and have to be transposed.
      bits: 2, 4 or 8 where codes are packed.
      spread: Groups of channels with scales of their own, where every token has some; 0 for no such scales.
      tokens: Tokens that share a scale, where every channel has one; 0 for no such scales.
      scale_lanes: Groups of tokens are on the lanes of scale and zero.
      stored: Groups of tokens in a block of scales, and
      used: those that one step reads, `stored` or less.
      zero: Whether there are zeros.
    """

    dim: int
    lanes: bool
    turn: bool = False
    bits: int = 0
    spread: int = 0
    tokens: int = 0
    scale_lanes: bool = False
    stored: int = 0
    used: int = 0
    zero: bool = False

    @property
    def offset(self) -> int:
        """What was taken from unsigned codes."""
        return 2 ** (self.bits - 1) if self.bits else 0


class Stored(NamedTuple):
    """Arrays, block specs or blocks of one `Vectors`."""

    codes: Any
    scale: Any = None
    zero: Any = None


class Inputs(NamedTuple):
    """Arrays, block specs or blocks of a request."""

    q: Any
    q_pos: Any
    k: Stored
    v: Stored | None
    pos: Any
    bias: Any
    tail: tuple[Any, Any, Any] | None


class Plan(NamedTuple):
    """What the kernel knows beforehand."""

    block: int
    steps: int
    splits: int
    k: Form
    v: Form | None
    tail_k: Form | None
    tail_v: Form | None
    window: int
    softcap: float
    logits: bool


class State(NamedTuple):
    """Running softmax: maximum and total [N, 128] (all lanes alike) and weighted values [N, Dv]."""

    top: Any
    total: Any
    out: Any


def has_halves(request: Request) -> bool:
    """Whether scales are float16, which Mosaic does not know: XLA has to convert blocks on their way into the kernel,
    as the prologue of one fusion, instead of all of them before."""
    return any(x.dtype == jnp.float16 for x in jax.tree.leaves((request.k, request.v)))


def padded(n: int, unit: int) -> int:
    return pl.cdiv(n, unit) * unit


def _spread(x: Vectors) -> int:
    return 0 if x.scale is None else x.scale.shape[3]


def tokens_on_lanes(shape: tuple[int, ...]) -> bool:
    """Whether XLA puts axis 2 of [B, H, S, D] on lanes: where that pads less."""
    s, d = shape[2:]
    return padded(d, SUBLANES) * padded(s, LANES) < padded(s, SUBLANES) * padded(d, LANES)


def form_of(x: Vectors, block: int) -> Form:
    """How a block of so many slots looks."""
    tokens, _ = x.group
    turn = x.bits > 0 and x.codes.shape[3] % LANES == 0
    lanes = x.bits > 0 or tokens_on_lanes(x.codes.shape)
    form = Form(dim=x.dim, lanes=lanes, turn=turn, bits=x.bits, zero=x.zero is not None)
    if x.scale is None:
        return form
    if tokens == 1:
        return dataclasses.replace(form, spread=x.scale.shape[3])
    groups, lanes = x.scale.shape[2], tokens_on_lanes(x.scale.shape)
    unit = LANES if lanes else SUBLANES
    used = max(block // tokens, 1) if tokens < x.slots else 1
    stored = min(used if used % unit == 0 else unit, groups)
    return dataclasses.replace(form, tokens=tokens, scale_lanes=lanes, stored=stored, used=used)


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _call(request: Request, block: int, steps: int, splits: int, interpret: Any):
    batch, heads, n, _ = request.q.shape
    rows = padded(n, SUBLANES)
    tail = None if request.tail is None else _pad_tail(request.tail)
    plan = Plan(
        block=block,
        steps=steps,
        splits=splits,
        k=form_of(request.k, block),
        v=None if request.v is None else form_of(request.v, block),
        tail_k=None if tail is None else Form(dim=tail.k.shape[3], lanes=tokens_on_lanes(tail.k.shape)),
        tail_v=None if tail is None else Form(dim=tail.v.shape[3], lanes=tokens_on_lanes(tail.v.shape)),
        window=request.window,
        softcap=request.softcap,
        logits=request.logits,
    )
    arrays, specs = _inputs(request, tail, rows, plan, interpret)
    value_dim = (plan.k if plan.v is None else plan.v).dim
    split = lambda width: pl.BlockSpec((None, None, None, rows, width), lambda b, h, s, i, _: (b, h, s, 0, 0))  # noqa: E731
    shape = lambda *ends: jax.ShapeDtypeStruct((batch, heads, *ends), jnp.float32)  # noqa: E731
    out_specs, out_shape = [split(value_dim), split(1)], [shape(splits, rows, value_dim), shape(splits, rows, 1)]
    logits_specs: list[Any] = [None, None]
    logits_shape: list[Any] = [None, None]
    if request.logits:
        at = lambda b, h, s, i, _: (b, h, 0, s * steps + i)  # noqa: E731
        logits_specs[0] = pl.BlockSpec((None, None, rows, block), at)
        logits_shape[0] = shape(n, request.k.slots)
    if request.logits and tail is not None:
        r = tail.pos.shape[2]
        logits_specs[1] = pl.BlockSpec((None, None, rows, r), lambda b, h, s, i, _: (b, h, 0, 0))
        logits_shape[1] = shape(n, r)
    scratch = State(*(pltpu.VMEM((rows, width), jnp.float32) for width in (LANES, LANES, value_dim)))
    slots = batch * heads * request.k.slots
    return pl.pallas_call(
        functools.partial(_kernel, plan=plan),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, heads, splits, steps),
            in_specs=[specs],
            out_specs=[*out_specs, logits_specs],
            scratch_shapes=[scratch],
        ),
        out_shape=[*out_shape, logits_shape],
        compiler_params=pltpu.CompilerParams(
            # Splits are written apart; only tail logits are shared by them, and the last one writes these.
            dimension_semantics=("parallel", "parallel", "arbitrary" if plan.logits else "parallel", "arbitrary"),
            allow_input_fusion=[False, *(True for _ in jax.tree.leaves(arrays))] if has_halves(request) else None,
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * slots * rows * (request.k.dim + value_dim),
            bytes_accessed=sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(request)),
            transcendentals=slots * rows,
        ),
        interpret=interpret,
        name="kvjax_decode",
    )(jnp.minimum(request.lengths, request.k.slots).astype(jnp.int32).reshape(-1), arrays)


def _pad_tail(tail: Tail) -> Tail:
    """At least a full tile of tokens."""
    more = padded(tail.pos.shape[2], SUBLANES) - tail.pos.shape[2]
    k, v = (jnp.pad(x, ((0, 0), (0, 0), (0, more), (0, 0))) for x in (tail.k, tail.v))
    return Tail(k=k, v=v, pos=jnp.pad(tail.pos, ((0, 0), (0, 0), (0, more)), constant_values=-1))


def _inputs(request: Request, tail: Tail | None, rows: int, plan: Plan, interpret: Any) -> tuple[Inputs, Inputs]:
    """Arrays as the kernel reads them, and which block of each a step reads."""
    batch, heads, n, dim = request.q.shape
    pad = ((0, 0), (0, 0), (0, rows - n), (0, 0))
    q_pos = jnp.tile(request.q_pos, (1, n // request.tokens))
    q_pos = jnp.pad(q_pos, ((0, 0), (0, rows - n)), constant_values=-1)[..., None]

    def block_of(b, h, s, i, lengths):
        """The block of slots that a step reads; the last one again, and so no transfer, when the row has ended."""
        last = (jnp.maximum(lengths[b * heads + h], 1) - 1) // plan.block
        return jnp.minimum(s * plan.steps + i, last)

    def stored(x: Array, lanes: bool, size: int, index) -> tuple[Array, pl.BlockSpec]:
        """x [B, H or 1, S, D] in blocks of `size` along S, `index(block of slots)` of them."""
        x = x.astype(jnp.float32) if x.dtype == jnp.float16 else x
        many = x.shape[1] > 1
        shape = (x.shape[3], size) if lanes else (size, x.shape[3])

        def at(b, h, s, i, lengths):
            place = index(block_of(b, h, s, i, lengths))
            return (b, h * many, 0, place) if lanes else (b, h * many, place, 0)

        x = jnp.swapaxes(x, 2, 3) if lanes else x
        # Otherwise XLA fetches all of it beforehand where it fits, whatever the lengths.
        x = x if interpret or has_halves(request) else pltpu.with_memory_space_constraint(x, pltpu.HBM)
        return x, pl.BlockSpec((None, None, *shape), at)

    def vectors(x: Vectors, form: Form) -> tuple[Stored, Stored]:
        codes = stored(x.codes, form.lanes and not form.turn, plan.block, lambda block: block)
        if form.tokens:
            group = lambda block: _first_group(block, plan.block, form) // form.stored  # noqa: E731
            numbers = [stored(y, form.scale_lanes, form.stored, group) for y in (x.scale, x.zero) if y is not None]
        else:
            numbers = [stored(y, True, plan.block, lambda block: block) for y in (x.scale, x.zero) if y is not None]
        arrays, specs = zip(codes, *numbers, strict=True)
        return Stored(*arrays), Stored(*specs)

    def whole(x: Array, lanes: bool = False) -> tuple[Array, pl.BlockSpec]:
        """All of x [B, H or 1, R, D] for the row and head."""
        many = x.shape[1] > 1
        x = jnp.swapaxes(x, 2, 3) if lanes else x
        return x, pl.BlockSpec((None, None, *x.shape[2:]), lambda b, h, s, i, _: (b, h * many, 0, 0))

    nothing = (None, None)
    pos = nothing if request.pos is None else stored(request.pos[..., None], True, plan.block, lambda block: block)
    bias = nothing
    if request.bias is not None:
        at = lambda b, h, s, i, lengths: (b, h, 0, block_of(b, h, s, i, lengths))  # noqa: E731
        bias = request.bias, pl.BlockSpec((None, None, rows, plan.block), at)
    end: tuple[Any, Any] = nothing
    if tail is not None:
        assert plan.tail_k is not None and plan.tail_v is not None
        parts = whole(tail.k, plan.tail_k.lanes), whole(tail.v, plan.tail_v.lanes), whole(tail.pos[:, :, None])
        end = tuple(a for a, _ in parts), tuple(s for _, s in parts)
    values: tuple[Any, Any] = nothing
    if request.v is not None:
        assert plan.v is not None
        values = vectors(request.v, plan.v)
    pairs: Any = (
        (jnp.pad(request.q, pad), pl.BlockSpec((None, None, rows, dim), lambda b, h, s, i, _: (b, h, 0, 0))),
        (q_pos, pl.BlockSpec((None, rows, 1), lambda b, h, s, i, _: (b, 0, 0))),
        vectors(request.k, plan.k),
        values,
        pos,
        bias,
        end,
    )
    return Inputs(*(a for a, _ in pairs)), Inputs(*(s for _, s in pairs))


def _first_group(block, size: int, form: Form):
    """The group of tokens that a block of slots begins in."""
    return block * (size // form.tokens) if form.tokens <= size else block * size // form.tokens


# The kernel.


def _kernel(lengths, x: Inputs, out, lse, logits_out, state: State, *, plan: Plan):
    b, h, s, i = (pl.program_id(axis) for axis in range(4))
    length = lengths[b * pl.num_programs(1) + h]
    block = s * plan.steps + i
    q, q_pos = x.q[...], x.q_pos[...]

    @pl.when(i == 0)
    def _():
        state.top[...] = jnp.full_like(state.top, NEG)
        state.total[...] = jnp.zeros_like(state.total)
        state.out[...] = jnp.zeros_like(state.out)

    @pl.when(block * plan.block < length)
    def _():
        keys = numbers_of(x.k.codes, plan.k, q.dtype)
        logits = dot_keys(q, keys, x.k, plan.k, block, plan.block)
        logits = logits if x.bias is None else logits + x.bias[...]
        slot = block * plan.block + lax.broadcasted_iota(jnp.int32, logits.shape, 1)
        mask = (slot < length) & (q_pos >= 0)
        if x.pos is not None:
            mask &= rows_see(q_pos, x.pos[...], plan.window)
        logits, p = weigh(logits, mask, plan.softcap, state)
        if plan.logits:
            logits_out[0][...] = logits
        if plan.v is None:
            codes, source, form = keys, x.k, plan.k
        else:
            assert x.v is not None
            codes, source, form = numbers_of(x.v.codes, plan.v, q.dtype), x.v, plan.v
        mix = lambda codes: mix_values(p, mask, codes, source, form, block, plan.block, q.dtype)  # noqa: E731
        if jnp.issubdtype(source.codes.dtype, jnp.integer):
            state.out[...] += mix(codes)
        elif x.pos is not None:
            state.out[...] += mix(only_seen(codes, mask, form.lanes))
        else:
            full = (block + 1) * plan.block <= length
            state.out[...] += lax.cond(full, lambda: mix(codes), lambda: mix(only_seen(codes, mask, form.lanes)))

    if plan.logits:

        @pl.when(block * plan.block >= length)
        def _():
            logits_out[0][...] = jnp.full_like(logits_out[0], NEG)

    if x.tail is not None:

        @pl.when((i == plan.steps - 1) & (s == plan.splits - 1))
        def _():
            assert x.tail is not None and plan.tail_k is not None and plan.tail_v is not None
            k, v, pos = x.tail
            logits = times_keys(q, k[...].astype(q.dtype), plan.tail_k.lanes)
            mask = rows_see(q_pos, pos[...], plan.window)
            logits, p = weigh(logits, mask, plan.softcap, state)
            if plan.logits:
                logits_out[1][...] = logits
            values = only_seen(v[...].astype(q.dtype), mask, plan.tail_v.lanes)
            added = times_values(p.astype(q.dtype), values, plan.tail_v.lanes)
            width = state.out.shape[-1]
            state.out[:, width - added.shape[-1] :] += added

    @pl.when(i == plan.steps - 1)
    def _():
        total = state.total[:, :1]
        safe = jnp.where(total > 0, total, 1.0)
        out[...] = jnp.where(total > 0, state.out[...] / safe, 0.0)
        lse[...] = jnp.where(total > 0, state.top[:, :1] + jnp.log(safe), NEG)


def rows_see(q_pos: Array, k_pos: Array, window: int) -> Array:
    """q_pos [N, 1], k_pos [1, S] -> [N, S]; as `parts.visible`."""
    seen = (k_pos >= 0) & (k_pos <= q_pos)
    return seen & (q_pos - k_pos < window) if window else seen


def weigh(logits: Array, mask: Array, softcap: float, state: State) -> tuple[Array, Array]:
    """Logits as the softmax takes them, and weights p [N, block] relative to the new maximum; `state` moves on, its
    output scaled down to match."""
    logits = softcap * jnp.tanh(logits / softcap) if softcap else logits
    logits = jnp.where(mask, logits, NEG)
    before = state.top[:, :1]
    top = jnp.maximum(before, logits.max(-1, keepdims=True))
    p = jnp.where(mask, jnp.exp(logits - top), 0.0)
    shrink = jnp.exp(before - top)
    total = shrink * state.total[:, :1] + p.sum(-1, keepdims=True)
    state.top[...] = jnp.broadcast_to(top, state.top.shape)
    state.total[...] = jnp.broadcast_to(total, state.total.shape)
    state.out[...] *= shrink
    return logits, p


def numbers_of(codes, form: Form, dtype) -> Array:
    """Codes of a block as numbers [D, block] or [block, D]; those that were packed, less `form.offset`."""
    if form.bits:
        small = {2: jnp.int2, 4: jnp.int4, 8: jnp.int8}[form.bits]
        # A bitcast takes every field for a signed number; with its highest bit flipped it is that, plus the offset.
        flip = sum(form.offset << at for at in range(0, 32, form.bits))
        words = codes[...].T if form.turn else codes[...]
        x = pltpu.bitcast(words ^ jnp.int32(flip - (1 << 32)), small)
    else:
        x = codes[...]
    return x if x.dtype == dtype else _cast(x, dtype)


def _cast(x: Array, dtype) -> Array:
    """bfloat16 holds every number of eight bits."""
    return x.astype(dtype) if x.dtype == jnp.float32 else x.astype(jnp.bfloat16).astype(dtype)


def only_seen(codes: Array, mask: Array, lanes: bool) -> Array:
    """Values that some row sees; what nobody sees may be NaN, which a weight of zero does not silence."""
    seen = jnp.where(mask, 1.0, 0.0).max(0, keepdims=True)
    if not lanes:
        seen = jnp.broadcast_to(seen, (SUBLANES, seen.shape[1])).T[:, :1]
    return jnp.where(seen > 0, codes.astype(jnp.float32), 0.0).astype(codes.dtype)


def _product(a: Array, b: Array, contract: tuple[int, int]) -> Array:
    exact = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(a, b, dims, precision=exact, preferred_element_type=jnp.float32)


def times_keys(q: Array, keys: Array, lanes: bool) -> Array:
    """[N, D] with keys [D, S] or [S, D] -> [N, S]."""
    return _product(q, keys, (1, 0 if lanes else 1))


def times_values(p: Array, values: Array, lanes: bool) -> Array:
    """[N, S] with values [D, S] or [S, D] -> [N, D]."""
    return _product(p, values, (1, 1 if lanes else 0))


def dot_keys(q: Array, codes: Array, k: Stored, form: Form, block, size: int) -> Array:
    """Logits of rows q [N, D] with a block of keys: [N, size] float32."""
    if not form.spread and not form.tokens:
        return times_keys(q, codes, form.lanes)
    if form.spread:
        return _dot_by_token(q, codes, k, form)
    return _dot_by_channel(q, codes, k, form, block, size)


def mix_values(p, mask, codes: Array, v: Stored, form: Form, block, size: int, dtype) -> Array:
    """Values of a block weighted by p [N, size], which is zero outside the mask: [N, D] float32."""
    if not form.spread and not form.tokens:
        return times_values(p.astype(dtype), codes, form.lanes)
    if form.spread:
        return _mix_by_token(p, mask, codes, v, form, dtype)
    return _mix_by_channel(p, codes, v, form, block, size, dtype)


def _own(shape: tuple[int, ...], group: int, which: int) -> Array:
    """Lanes of group number `which`."""
    return lax.broadcasted_iota(jnp.int32, shape, len(shape) - 1) // group == which


def _dot_by_token(q: Array, codes: Array, k: Stored, form: Form) -> Array:
    n, q32 = q.shape[0], q.astype(jnp.float32)
    scale, zero = (None if x is None else x[...].astype(jnp.float32) for x in (k.scale, k.zero))
    assert scale is not None
    group = form.dim // form.spread
    spread = [q32 if form.spread == 1 else jnp.where(_own(q.shape, group, c), q32, 0.0) for c in range(form.spread)]
    product = times_keys(jnp.concatenate(spread, 0).astype(q.dtype), codes, form.lanes)
    logits = jnp.zeros((n, product.shape[1]), jnp.float32)
    for c, part in enumerate(spread):
        total = part.sum(-1, keepdims=True)
        logits += (product[c * n : (c + 1) * n] + form.offset * total) * scale[c : c + 1]
        if zero is not None:
            logits += total * zero[c : c + 1]
    return logits


def _mix_by_token(p: Array, mask: Array, codes: Array, v: Stored, form: Form, dtype) -> Array:
    n = p.shape[0]
    scale, zero = (None if x is None else x[...].astype(jnp.float32) for x in (v.scale, v.zero))
    assert scale is not None
    group = form.dim // form.spread
    scaled = [jnp.where(mask, p * scale[c : c + 1], 0.0) for c in range(form.spread)]
    product = times_values(jnp.concatenate(scaled, 0).astype(dtype), codes, form.lanes)
    out = jnp.zeros((n, form.dim), jnp.float32)
    for c, weights in enumerate(scaled):
        part = product[c * n : (c + 1) * n]
        if form.offset:
            part += form.offset * weights.sum(-1, keepdims=True)
        if zero is not None:
            part += jnp.where(mask, p * zero[c : c + 1], 0.0).sum(-1, keepdims=True)
        out = part if form.spread == 1 else jnp.where(_own(out.shape, group, c), part, out)
    return out


def _group_rows(x, form: Form, block, size: int) -> list[Array]:
    """Scales (or zeros) [1, D] of the groups of tokens that a step reads, in order."""
    rows = x[...].astype(jnp.float32)
    rows = rows.T if form.scale_lanes else rows
    if form.stored == form.used:
        return [rows[j : j + 1] for j in range(form.used)]
    first = _first_group(block, size, form) % form.stored
    number = lax.broadcasted_iota(jnp.int32, rows.shape, 0)
    return [jnp.where(number == first + j, rows, 0.0).sum(0, keepdims=True) for j in range(form.used)]


def _tiles(form: Form, size: int) -> tuple[int, int]:
    """Tokens that are multiplied together, and groups among them."""
    tile = min(max(form.tokens, LANES), size)
    return (size, 1) if form.used == 1 else (tile, max(tile // form.tokens, 1))


def _cut(codes: Array, lanes: bool, start: int, size: int) -> Array:
    return codes[:, start : start + size] if lanes else codes[start : start + size]


def _scales_and_zeros(x: Stored, form: Form, block, size: int) -> tuple[list[Array], list[Array]]:
    """What codes less their offset are multiplied by, and what is added: [1, D] for every group."""
    scales = _group_rows(x.scale, form, block, size)
    zeros = _group_rows(x.zero, form, block, size) if form.zero else [jnp.zeros_like(s) for s in scales]
    return scales, [z + form.offset * s for z, s in zip(zeros, scales, strict=True)]


def _dot_by_channel(q: Array, codes: Array, k: Stored, form: Form, block, size: int) -> Array:
    n, q32 = q.shape[0], q.astype(jnp.float32)
    scales, zeros = _scales_and_zeros(k, form, block, size)
    tile, groups = _tiles(form, size)
    tiles = []
    for t in range(size // tile):
        mine = range(t * groups, (t + 1) * groups)
        scaled = jnp.concatenate([q32 * scales[j] for j in mine], 0).astype(q.dtype)
        product = times_keys(scaled, _cut(codes, form.lanes, t * tile, tile), form.lanes)
        logits = jnp.zeros((n, tile), jnp.float32)
        for g, j in enumerate(mine):
            part = product[g * n : (g + 1) * n]
            if form.zero or form.offset:
                part += (q32 * zeros[j]).sum(-1, keepdims=True)
            logits = part if groups == 1 else jnp.where(_own(logits.shape, form.tokens, g), part, logits)
        tiles.append(logits)
    return tiles[0] if len(tiles) == 1 else jnp.concatenate(tiles, 1)


def _mix_by_channel(p: Array, codes: Array, v: Stored, form: Form, block, size: int, dtype) -> Array:
    n = p.shape[0]
    scales, zeros = _scales_and_zeros(v, form, block, size)
    tile, groups = _tiles(form, size)
    out = jnp.zeros((n, form.dim), jnp.float32)
    for t in range(size // tile):
        weights = p[:, t * tile : (t + 1) * tile]
        own = [
            weights if groups == 1 else jnp.where(_own(weights.shape, form.tokens, g), weights, 0.0)
            for g in range(groups)
        ]
        values = _cut(codes, form.lanes, t * tile, tile)
        product = times_values(jnp.concatenate(own, 0).astype(dtype), values, form.lanes)
        for g in range(groups):
            j, mass = t * groups + g, own[g].sum(-1, keepdims=True)
            part = product[g * n : (g + 1) * n] * scales[j] + mass * zeros[j]
            out += jnp.where(mass > 0, part, 0.0)  # Scales of a group that nobody sees may be NaN.
    return out
