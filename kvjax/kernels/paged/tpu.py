"""Paged attention on TPUs: the index maps of a Pallas kernel read the table, so that pages come straight from where
they lie, several of them in a step.

The arithmetic is that of decode attention; see there. A page that the table does not name properly (a number that does
not exist, an unused column) is replaced by one that exists, and masked.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kvjax.kernels.decode.tpu import (
    LANES,
    SUBLANES,
    TOKENS,
    Form,
    State,
    Stored,
    dot_keys,
    form_of,
    mix_values,
    numbers_of,
    only_seen,
    padded,
    refuse_vectors,
    rows_see,
    weigh,
)
from kvjax.kernels.paged.request import PagedRequest
from kvjax.kernels.parts import NEG, Part
from kvjax.kernels.vectors import Vectors

SLOTS = 1024  # Of one step, unless pages are larger.
MOST = 16  # Pages of one step.
TABLE = 96 << 10  # Numbers that fit scalar memory.
VMEM = 10 << 20


def attend(request: PagedRequest, *, block: int = SLOTS, interpret: Any = False) -> Part:
    """The answer to a request: `Part` of [B, Hq, N, D].

    Args:
      request: What `refuse` does not refuse.
      block: Slots of a step, rounded to pages.
      interpret: True or `pltpu.InterpretParams(...)` to run on any device.

    Raises:
      ValueError: The request is refused.
    """
    if reason := refuse(request):
        raise ValueError(reason)
    per_slot = 4 * max(x.dim * request.q.dtype.itemsize + x.nbytes_per_slot for x in (request.k, request.v))
    together = min(block, int(VMEM / per_slot)) // request.page
    together = max(1, min(together, MOST, request.table.shape[2]))
    out, lse = _call(request, together, interpret)
    n = request.q.shape[2]
    return Part(out=out[:, :, :n], lse=lse[:, :, :n, 0])


def refuse(request: PagedRequest) -> str | None:
    """Why the kernel cannot serve a request, or None."""
    if request.q.dtype not in (jnp.bfloat16, jnp.float32):
        return f"Products are taken in bfloat16 or float32 on TPUs, not {request.q.dtype}: cast q."
    if request.tokens > TOKENS:
        return f"{request.tokens} new tokens are a prefill: decode at most {TOKENS} at a time."
    if request.table.size + request.lengths.size > TABLE:
        return f"A table of {request.table.size} pages does not fit scalar memory ({TABLE}): use larger pages."
    if request.pos is not None and request.page % LANES:
        return f"Positions are read in pages of {LANES} slots, not {request.page}."
    for name, x in (("keys", request.k), ("values", request.v)):
        if reason := refuse_vectors(x, padded(request.q.shape[2], SUBLANES)):
            return f"The {name}: {reason}"
        if request.page % LANES == 0:
            if x.group[0] > 1 and request.page % x.group[0]:
                return f"The {name}: {x.group[0]} tokens share a scale, and pages of {request.page} would cut them."
            continue
        rows = 32 // x.codes.dtype.itemsize
        if x.scale is not None or form_of(x, request.page).lanes or request.page % rows:
            return (
                f"The {name}: pages of {request.page} slots can only be read where they are rows of tokens without "
                f"scales, a multiple of {rows} of them, with channels a multiple of {LANES}: make a page {LANES} slots."
            )
    return None


class Inputs(NamedTuple):
    """Arrays, block specs or blocks of a request; one block for every page of a step."""

    q: Any
    q_pos: Any
    k: list[Stored]
    v: list[Stored]
    pos: list[Any]


class Plan(NamedTuple):
    """What the kernel knows beforehand."""

    page: int
    pages: int
    columns: int
    together: int
    share: int
    pool: bool
    k: Form
    v: Form
    window: int
    softcap: float


@functools.partial(jax.jit, static_argnums=(1, 2))
def _call(request: PagedRequest, together: int, interpret: Any) -> tuple[Array, Array]:
    batch, heads, n, dim = request.q.shape
    rows, columns = padded(n, SUBLANES), request.table.shape[2]
    steps = pl.cdiv(columns, together)
    plan = Plan(
        page=request.page,
        pages=request.pages,
        columns=columns,
        together=together,
        share=request.share,
        pool=request.pool,
        k=form_of(request.k, request.page),
        v=form_of(request.v, request.page),
        window=request.window,
        softcap=request.softcap,
    )
    arrays, specs = _inputs(request, rows, plan)
    lengths = jnp.minimum(request.lengths, request.k.slots)
    halves = any(x.dtype == jnp.float16 for x in jax.tree.leaves((request.k, request.v)))
    out = lambda width: pl.BlockSpec((None, None, rows, width), lambda b, h, i, *_: (b, h, 0, 0))  # noqa: E731
    slots = batch * heads * columns * request.page
    return pl.pallas_call(
        functools.partial(_kernel, plan=plan),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(batch, heads, steps),
            in_specs=[specs],
            out_specs=[out(request.v.dim), out(1)],
            scratch_shapes=[State(*(pltpu.VMEM((rows, w), jnp.float32) for w in (LANES, LANES, request.v.dim)))],
        ),
        out_shape=[jax.ShapeDtypeStruct((batch, heads, rows, w), jnp.float32) for w in (request.v.dim, 1)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            allow_input_fusion=[False] * 3 + [True] * len(jax.tree.leaves(arrays)) if halves else None,
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * slots * rows * (dim + request.v.dim),
            bytes_accessed=int(slots * (request.k.nbytes_per_slot + request.v.nbytes_per_slot)),
            transcendentals=slots * rows,
        ),
        interpret=interpret,
        name="kvjax_paged",
    )(*(x.astype(jnp.int32).reshape(-1) for x in (request.table, request.count, lengths)), arrays)


def _inputs(request: PagedRequest, rows: int, plan: Plan) -> tuple[Inputs, Inputs]:
    """Arrays as the kernel reads them, and which block of each a step reads."""
    _, heads, n, dim = request.q.shape
    q_pos = jnp.tile(request.q_pos, (1, n // request.tokens))
    q_pos = jnp.pad(q_pos, ((0, 0), (0, rows - n)), constant_values=-1)[..., None]
    q = jnp.pad(request.q, ((0, 0), (0, 0), (0, rows - n), (0, 0)))

    def spec(x: Array, lanes: bool, size: int, index, j: int) -> pl.BlockSpec:
        """The block of page j of a step in x [B, Hk or 1 or pages, S, D], `index(page)` of those along S."""
        many = x.shape[1] > 1

        def at(b, h, i, table, count, _):
            column = jnp.minimum(i * plan.together + j, jnp.maximum(count[b * heads + h], 1) - 1)
            column = jnp.minimum(column, plan.columns - 1)
            page = jnp.clip(table[(b * heads + h) * plan.columns + column], 0, plan.pages - 1)
            head, place = (page * many, 0) if plan.pool else (h // plan.share * many, index(page))
            return (b, head, 0, place) if lanes else (b, head, place, 0)

        return pl.BlockSpec((None, None, x.shape[3], size) if lanes else (None, None, size, x.shape[3]), at)

    def vectors(x: Vectors, form: Form) -> tuple[list[Stored], list[Stored]]:
        def one(y: Array | None, lanes: bool, size: int, index) -> tuple[Any, Any]:
            if y is None:
                return None, [None] * plan.together
            y = y.astype(jnp.float32) if y.dtype == jnp.float16 else y
            specs = [spec(y, lanes, size, index, j) for j in range(plan.together)]
            return jnp.swapaxes(y, 2, 3) if lanes else y, specs

        group = lambda page: page * plan.page // form.tokens // form.stored  # noqa: E731
        scales = (form.scale_lanes, form.stored, group) if form.tokens else (True, plan.page, lambda page: page)
        parts = [one(x.codes, form.lanes and not form.turn, plan.page, lambda page: page)]
        parts += [one(y, *scales) for y in (x.scale, x.zero)]
        arrays = Stored(*(a for a, _ in parts))
        return [arrays] * plan.together, [Stored(*(s[j] for _, s in parts)) for j in range(plan.together)]

    pos_arrays, pos_specs = [], []
    if request.pos is not None:
        pos = request.pos[:, :, None]
        pos_arrays = [pos] * plan.together
        turned = jnp.swapaxes(pos, 2, 3)
        pos_specs = [spec(turned, True, plan.page, lambda page: page, j) for j in range(plan.together)]
    k, v = vectors(request.k, plan.k), vectors(request.v, plan.v)
    q_spec = pl.BlockSpec((None, None, rows, dim), lambda b, h, i, *_: (b, h, 0, 0))
    q_pos_spec = pl.BlockSpec((None, rows, 1), lambda b, h, i, *_: (b, 0, 0))
    return Inputs(q, q_pos, k[0], v[0], pos_arrays), Inputs(q_spec, q_pos_spec, k[1], v[1], pos_specs)


def _kernel(table, count, lengths, x: Inputs, out, lse, state: State, *, plan: Plan):
    b, h, i = (pl.program_id(axis) for axis in range(3))
    head = b * pl.num_programs(1) + h
    used = jnp.minimum(count[head], plan.columns)
    first = i * plan.together

    @pl.when(i == 0)
    def _():
        state.top[...] = jnp.full_like(state.top, NEG)
        state.total[...] = jnp.zeros_like(state.total)
        state.out[...] = jnp.zeros_like(state.out)

    @pl.when(first < used)
    def _():
        q, q_pos = x.q[...], x.q_pos[...]
        pages, held = [], []
        for j in range(plan.together):
            column = first + j
            number = table[head * plan.columns + jnp.minimum(column, plan.columns - 1)]
            page = jnp.clip(number, 0, plan.pages - 1)
            if plan.pool:
                length = lengths[b * plan.pages + page]
            else:
                kv_heads = pl.num_programs(1) // plan.share
                length = lengths[b * kv_heads + h // plan.share] - page * plan.page
            there = (column < used) & (number == page)
            pages.append(0 if plan.pool else page)
            held.append(jnp.where(there, jnp.clip(length, 0, plan.page), 0))
        mask = _mask(held, plan) & (q_pos >= 0)
        if x.pos:
            mask &= jnp.concatenate([rows_see(q_pos, pos[...], plan.window) for pos in x.pos], 1)
        keys = [numbers_of(k.codes, plan.k, q.dtype) for k in x.k]
        values = [numbers_of(v.codes, plan.v, q.dtype) for v in x.v]
        if plan.page % LANES:  # Short pages follow one another as rows and are multiplied together.
            logits = dot_keys(q, jnp.concatenate(keys, 0), x.k[0], plan.k, 0, plan.page)
        else:
            of = zip(keys, x.k, pages, strict=True)
            logits = jnp.concatenate([dot_keys(q, c, k, plan.k, page, plan.page) for c, k, page in of], 1)
        _, p = weigh(logits, mask, plan.softcap, state)

        def mix(clean: bool) -> Array:
            if plan.page % LANES:
                codes = jnp.concatenate(values, 0)
                codes = codes if clean else only_seen(codes, mask, plan.v.lanes)
                return mix_values(p, mask, codes, x.v[0], plan.v, 0, plan.page, q.dtype)
            total = jnp.zeros(state.out.shape, jnp.float32)
            for j, (codes, v, page) in enumerate(zip(values, x.v, pages, strict=True)):
                own = slice(j * plan.page, (j + 1) * plan.page)
                codes = codes if clean else only_seen(codes, mask[:, own], plan.v.lanes)
                total += mix_values(p[:, own], mask[:, own], codes, v, plan.v, page, plan.page, q.dtype)
            return total

        if jnp.issubdtype(x.v[0].codes.dtype, jnp.integer):
            state.out[...] += mix(True)
        elif x.pos:
            state.out[...] += mix(False)
        else:
            full = functools.reduce(jnp.minimum, held) == plan.page
            state.out[...] += lax.cond(full, lambda: mix(True), lambda: mix(False))

    @pl.when(i == pl.num_programs(2) - 1)
    def _():
        total = state.total[:, :1]
        safe = jnp.where(total > 0, total, 1.0)
        out[...] = jnp.where(total > 0, state.out[...] / safe, 0.0)
        lse[...] = jnp.where(total > 0, state.top[:, :1] + jnp.log(safe), NEG)


def _mask(held: list[Any], plan: Plan) -> Array:
    """Which slots of the pages of a step are occupied [1, W * P]; `held` of each."""
    slot = lax.broadcasted_iota(jnp.int32, (1, plan.page * plan.together), 1)
    seen = jnp.zeros(slot.shape, jnp.bool_)
    for j, n in enumerate(held):
        start = j * plan.page
        seen |= (slot >= start) & (slot < start + n)
    return seen
