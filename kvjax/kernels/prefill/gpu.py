"""Prefill attention on NVIDIA Hopper GPUs, in Pallas' Mosaic GPU dialect: two kernels, as on TPUs.

    logits^T [keys, queries] = K q^T        out^T [Dv, queries] += V^T weights^T

One warpgroup per program, keys on the tensor cores' M and queries on their N, so that a query's maximum, sum and places
are vectors along N for both products. Keys and values come through a few stages of shared memory. Only blocks between
the first and the last that a block has to see are fetched.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kvjax.kernels import choose
from kvjax.kernels.hopper import interpreter
from kvjax.kernels.parts import NEG, Part, merge
from kvjax.kernels.prefill.blocks import Tiles, make_tables, pad
from kvjax.kernels.prefill.request import Prefill, Request
from kvjax.kernels.prefill.statistics import normalize, query_weights
from kvjax.kernels.prefill.xla import window_weights

BLOCK = 64  # Queries, and keys, of a block.
STAGES = 2
LOG2E = 1.4426950408889634


def refuse(request: Request) -> str | None:
    """Why the kernels cannot serve a request and what would change that, in a sentence; None where they can."""
    if reason := choose.unless_hopper():
        return reason
    arrays = [request.k, request.v] + ([] if request.past is None else [request.past.k, request.past.v])
    dtypes = {x.dtype for x in arrays}
    if dtypes != {jnp.dtype(jnp.bfloat16)}:
        return f"It takes bfloat16 keys and values, not {', '.join(sorted(map(str, dtypes)))}: cast them first."
    dims = request.k.shape[-1], request.v.shape[-1]
    if any(dim % 64 or dim > 256 for dim in dims):
        return f"It takes keys and values of 64, 128, 192 or 256 channels, not {dims[0]} and {dims[1]}."
    if request.past is not None and request.past.k.shape[2] % BLOCK:
        return f"It takes a past of a multiple of {BLOCK} slots, not {request.past.k.shape[2]}."
    return None


def prefill(request: Request, *, interpret: Any = None) -> Prefill:
    """The answer to a request.

    Args:
      interpret: True, or parameters of Pallas' interpreter, to run without a GPU.
    """
    interpret = interpreter() if interpret is True else interpret or None
    batch, heads, group, length, dim = request.q.shape
    asked = request.statistics
    whole = length + -length % BLOCK
    q = pad(request.q, 3, whole, 0).reshape(batch, heads * group, whole, dim)
    low, high = pad(request.low, 1, whole, 0), pad(request.place, 1, whole, -1)
    stores = [(pad(request.k, 2, whole, 0), pad(request.v, 2, whole, 0), high[:, None])]
    if request.past is not None:
        stores = [(request.past.k, request.past.v, request.past_place), *stores]

    parts, means = zip(
        *(_flash(q, low, high, *store, request.softcap, asked.entropy, interpret) for store in stores), strict=True
    )
    part = merge(parts)
    entropy = None
    if asked.entropy:
        shares = [jnp.where(x.lse > NEG, jnp.exp(x.lse - part.lse), 0.0) for x in parts]
        mean = sum(share * mean for share, mean in zip(shares, means, strict=True))
        entropy = jnp.where(part.lse > NEG, jnp.maximum(part.lse - mean, 0.0), 0.0)[:, :, :length]

    counts = query_weights(asked.column_sums, request.age, request.place >= 0)
    padded = pad(counts, 2, whole, 0)
    slots = [store[0].shape[2] for store in stores[:-1]] + [length]

    def received(store: tuple[Array, Array, Array], slots: int) -> Array:
        k, _, place = store
        sums = _columns(q, low, high, part.lse, padded, k, place, request.softcap, interpret)
        sums = sums.reshape(len(asked.column_sums), batch, heads, group, -1)
        return normalize(asked.column_sums, sums, counts, request.low, request.place, place)[..., :slots]

    sums = ()
    if asked.column_sums:
        joined = jnp.concatenate([received(*pair) for pair in zip(stores, slots, strict=True)], -1)
        sums = tuple(joined.reshape(len(asked.column_sums), batch, heads * group, -1))
    return Prefill(
        out=part.out[:, :, :length].astype(request.v.dtype),
        lse=part.lse[:, :, :length] if asked.lse else None,
        entropy=entropy,
        column_sums=sums,
        window=window_weights(request) if asked.window else None,
    )


@functools.partial(jax.jit, static_argnums=(6, 7, 8))  # Layers are alike: traced and lowered once for all of them.
def _flash(
    q: Array, low: Array, high: Array, k: Array, v: Array, place: Array, softcap: float, entropy: bool, interpret: Any
) -> tuple[Part, Array]:
    """Attention of q [B, H * G, T, D] over one store: a part with arrays [B, H * G, T, ...], and the mean logit."""
    batch, heads, length, dim = q.shape
    group, value_dim = heads // k.shape[1], v.shape[-1]
    # Outputs stay in registers: where they are wide, fewer queries do.
    queries = BLOCK if value_dim <= 128 else BLOCK // 2
    blocks, keys, places = length // queries, k.shape[2] // BLOCK, place.shape[1]
    tables = make_tables(low, high, place, Tiles(1, queries, BLOCK))
    f32 = jnp.float32

    def kernel(first, last, q_low, q_high, k_low, k_high, low, high, place, q, k, v, out, sums, /, **mem):
        del q_low, q_high, k_high
        b, head = lax.axis_index("batch"), lax.axis_index("head")
        i = blocks - 1 - lax.axis_index("block")  # Those that see most first.
        kv_head = lax.div(head, jnp.int32(group))
        row = b * places + (kv_head if places > 1 else 0)
        begin = first[row * blocks + i]
        steps = last[row * blocks + i] + 1 - begin
        mine = pl.ds(i * queries, queries)
        plgpu.copy_gmem_to_smem(q.at[b, head, mine], mem["q"], mem["q_ready"])
        plgpu.copy_gmem_to_smem(low.at[b, mine], mem["low"], mem["q_ready"])
        plgpu.copy_gmem_to_smem(high.at[b, mine], mem["high"], mem["q_ready"])

        def fetch_keys(step: Array, slot: Array | int) -> None:
            block = pl.ds((begin + step) * BLOCK, BLOCK)
            ready = mem["k_ready"].at[slot]
            plgpu.copy_gmem_to_smem(k.at[b, kv_head, block], mem["k"].at[slot], ready)
            plgpu.copy_gmem_to_smem(place.at[b, kv_head if places > 1 else 0, block], mem["place"].at[slot], ready)

        def fetch_values(step: Array, slot: Array | int) -> None:
            block = pl.ds((begin + step) * BLOCK, BLOCK)
            plgpu.copy_gmem_to_smem(v.at[b, kv_head, block], mem["v"].at[slot], mem["v_ready"].at[slot])

        for stage in range(STAGES):

            @pl.when(stage < steps)
            def _(stage: int = stage) -> None:
                fetch_keys(jnp.int32(stage), stage)
                fetch_values(jnp.int32(stage), stage)

        plgpu.barrier_wait(mem["q_ready"])

        def step(n: Array, state: Any) -> Any:
            acc, top, total, mixed = state
            slot = lax.rem(n, jnp.int32(STAGES))
            refill = functools.partial(pl.when, n + STAGES < steps)
            plgpu.barrier_wait(mem["k_ready"].at[slot])
            s = _scores(mem["k"].at[slot], mem["q"], softcap)
            here = mem["place"][slot]
            seen = _seen(here, mem["low"][...], mem["high"][...])
            s = jnp.where(seen, s * LOG2E, NEG)
            above = jnp.maximum(top, s.max(axis=0))
            fade = jnp.exp2(top - above)
            p = jnp.where(seen, jnp.exp2(s - _wide(above, 1)), 0.0)
            total = total * fade + p.sum(axis=0)
            if entropy:
                mixed = mixed * fade + (p * s).sum(axis=0)
            mem["p"].T[...] = p.astype(jnp.bfloat16)
            plgpu.barrier_wait(mem["v_ready"].at[slot])

            @pl.when(k_low[row * keys + begin + n] < 0)
            def _() -> None:  # What is not there may be NaN, which zero weights do not silence.
                there = lax.broadcast_in_dim(here >= 0, (BLOCK, BLOCK), [0])
                for start in range(0, value_dim, BLOCK):
                    part = pl.ds(start, BLOCK)
                    values = mem["v"][slot, :, part]
                    mem["v"][slot, :, part] = jnp.where(there, values, jnp.zeros_like(values))

            plgpu.commit_smem()
            refill()(functools.partial(fetch_keys, n + STAGES, slot))

            def mix(ref: Any) -> Array:
                plgpu.wgmma(ref, mem["v"].at[slot].T, mem["p"].T)
                return ref[...]

            new = pl.run_scoped(mix, plgpu.WGMMAAccumulatorRef((value_dim, queries), f32))
            plgpu.commit_smem()
            refill()(functools.partial(fetch_values, n + STAGES, slot))
            return acc * lax.broadcast_in_dim(fade, acc.shape, [1]) + new, above, total, mixed

        zeros = jnp.zeros((queries,), f32)
        state = (jnp.zeros((value_dim, queries), f32), jnp.full((queries,), NEG, f32), zeros, zeros)
        acc, top, total, mixed = lax.fori_loop(0, steps, step, state)
        share = 1.0 / jnp.maximum(total, 1e-30)
        mem["out"].T[...] = (acc * lax.broadcast_in_dim(share, acc.shape, [1])).astype(jnp.bfloat16)
        mem["sums"][0] = top
        mem["sums"][1] = total
        mem["sums"][2] = mixed * share
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(mem["out"], out.at[b, head, mine])
        plgpu.copy_smem_to_gmem(mem["sums"], sums.at[b, head, i])
        plgpu.wait_smem_to_gmem(0)

    out, sums = plgpu.kernel(
        kernel,
        out_type=[
            jax.ShapeDtypeStruct((*q.shape[:3], value_dim), jnp.bfloat16),
            jax.ShapeDtypeStruct((batch, heads, blocks, 3, queries), f32),
        ],
        grid=(blocks, heads, batch),
        grid_names=("block", "head", "batch"),
        scratch_types={
            "q": plgpu.SMEM((queries, dim), jnp.bfloat16),
            "low": plgpu.SMEM((queries,), jnp.int32),
            "high": plgpu.SMEM((queries,), jnp.int32),
            "k": plgpu.SMEM((STAGES, BLOCK, dim), jnp.bfloat16),
            "place": plgpu.SMEM((STAGES, BLOCK), jnp.int32),
            "v": plgpu.SMEM((STAGES, BLOCK, value_dim), jnp.bfloat16),
            "p": plgpu.SMEM((queries, BLOCK), jnp.bfloat16),
            "out": plgpu.SMEM((queries, value_dim), jnp.bfloat16),
            "sums": plgpu.SMEM((3, queries), f32),
            "q_ready": plgpu.Barrier(num_arrivals=3),
            "k_ready": plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
            "v_ready": plgpu.Barrier(num_barriers=STAGES),
        },
        compiler_params=_params(),
        interpret=interpret,
    )(*tables, low, high, place, q, k, v)
    top, total, mean = jnp.moveaxis(sums, 3, 0).reshape(3, batch, heads, length)
    lse = jnp.where(total > 0, top / LOG2E + jnp.log(jnp.where(total > 0, total, 1.0)), NEG)
    return Part(out=out, lse=lse), mean / LOG2E


@functools.partial(jax.jit, static_argnums=(7, 8))
def _columns(
    q: Array,
    low: Array,
    high: Array,
    lse: Array,
    counts: Array,
    k: Array,
    place: Array,
    softcap: float,
    interpret: Any,
) -> Array:
    """Sums over queries of attention weights times counts [C, B, T]: [C, B, H * G, S] float32."""
    batch, heads, length, dim = q.shape
    number, slots, group, places = counts.shape[0], k.shape[2], heads // k.shape[1], place.shape[1]
    blocks = slots // BLOCK
    tables = make_tables(low, high, place, Tiles(1, BLOCK, BLOCK), (counts != 0).any(0))
    f32 = jnp.float32

    def kernel(first, last, low, high, place, q, lse, counts, k, out, /, **mem):
        b, head, i = (lax.axis_index(name) for name in ("batch", "head", "block"))
        kv_head = lax.div(head, jnp.int32(group))
        row = b * places + (kv_head if places > 1 else 0)
        begin = first[row * blocks + i]
        steps = last[row * blocks + i] + 1 - begin
        mine = pl.ds(i * BLOCK, BLOCK)
        plgpu.copy_gmem_to_smem(k.at[b, kv_head, mine], mem["k"], mem["k_ready"])
        plgpu.copy_gmem_to_smem(place.at[b, kv_head if places > 1 else 0, mine], mem["place"], mem["k_ready"])

        def fetch(step: Array, slot: Array | int) -> None:
            block, ready = pl.ds((begin + step) * BLOCK, BLOCK), mem["q_ready"].at[slot]
            plgpu.copy_gmem_to_smem(q.at[b, head, block], mem["q"].at[slot], ready)
            plgpu.copy_gmem_to_smem(low.at[b, block], mem["low"].at[slot], ready)
            plgpu.copy_gmem_to_smem(high.at[b, block], mem["high"].at[slot], ready)
            plgpu.copy_gmem_to_smem(lse.at[b, head, block], mem["lse"].at[slot], ready)
            for c in range(number):
                plgpu.copy_gmem_to_smem(counts.at[c, b, block], mem["counts"].at[slot, c], ready)

        for stage in range(STAGES):

            @pl.when(stage < steps)
            def _(stage: int = stage) -> None:
                fetch(jnp.int32(stage), stage)

        plgpu.barrier_wait(mem["k_ready"])

        def step(n: Array, state: tuple[Array, ...]) -> tuple[Array, ...]:
            slot = lax.rem(n, jnp.int32(STAGES))
            plgpu.barrier_wait(mem["q_ready"].at[slot])
            s = _scores(mem["k"], mem["q"].at[slot], softcap)
            seen = _seen(mem["place"][...], mem["low"][slot], mem["high"][slot])
            logs = _wide(mem["lse"][slot], 1)
            p = jnp.where(seen, jnp.exp2((jnp.where(seen, s, NEG) - logs) * LOG2E), 0.0)
            state = tuple(acc + (p * _wide(mem["counts"][slot, c], 1)).sum(axis=1) for c, acc in enumerate(state))
            plgpu.commit_smem()
            pl.when(n + STAGES < steps)(functools.partial(fetch, n + STAGES, slot))
            return state

        state = lax.fori_loop(0, steps, step, (jnp.zeros((BLOCK,), f32),) * number)
        for c, acc in enumerate(state):
            mem["out"][c] = acc
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(mem["out"], out.at[b, head, i])
        plgpu.wait_smem_to_gmem(0)

    sums = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((batch, heads, blocks, number, BLOCK), f32),
        grid=(blocks, heads, batch),
        grid_names=("block", "head", "batch"),
        scratch_types={
            "k": plgpu.SMEM((BLOCK, dim), jnp.bfloat16),
            "place": plgpu.SMEM((BLOCK,), jnp.int32),
            "q": plgpu.SMEM((STAGES, BLOCK, dim), jnp.bfloat16),
            "low": plgpu.SMEM((STAGES, BLOCK), jnp.int32),
            "high": plgpu.SMEM((STAGES, BLOCK), jnp.int32),
            "lse": plgpu.SMEM((STAGES, BLOCK), f32),
            "counts": plgpu.SMEM((STAGES, number, BLOCK), f32),
            "out": plgpu.SMEM((number, BLOCK), f32),
            "k_ready": plgpu.Barrier(num_arrivals=2),
            "q_ready": plgpu.Barrier(num_arrivals=4 + number, num_barriers=STAGES),
        },
        compiler_params=_params(),
        interpret=interpret,
    )(tables.first, tables.last, low, high, place, q, lse, counts, k)
    return jnp.moveaxis(sums, 3, 0).reshape(number, batch, heads, slots)


def _params() -> Any:
    return plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup)


def _scores(k: Any, q: Any, softcap: float) -> Array:
    """Logits [keys, queries] float32 of references [keys, D] and [queries, D]."""

    def product(ref: Any) -> Array:
        plgpu.wgmma(ref, k, q.T)
        return ref[...]

    s = pl.run_scoped(product, plgpu.WGMMAAccumulatorRef((k.shape[0], q.shape[0]), jnp.float32))
    return softcap * jnp.tanh(s * (1 / softcap)) if softcap else s


def _seen(place: Array, low: Array, high: Array) -> Array:
    """Which key each query sees: [keys, queries] bool."""
    place = _wide(place, 0, low.shape[0])
    return (place >= _wide(low, 1)) & (place <= _wide(high, 1))


def _wide(x: Array, axis: int, queries: int = 0) -> Array:
    """Repeats a vector that lies along `axis` of a block [keys, queries]; `queries` where it does not say."""
    return lax.broadcast_in_dim(x, (BLOCK, x.shape[0] if axis else queries), [axis])
