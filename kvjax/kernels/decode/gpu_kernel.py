"""The kernel behind `gpu.py`: one warpgroup per program, tokens on the tensor cores' M, query rows on their N.

    logits^T [block, N] = K [block, D] q^T [D, N]        out^T [Dv, N] += V^T [Dv, block] weights^T [block, N]

So eight query rows cost eight columns and not a padded tile of 64. Blocks come through a few stages of shared memory in
their storage type. Codes become bfloat16 in registers and go back to shared memory, from where the tensor cores read
them: row by row for K, transposed for V, so that tokens stay on the same axis everywhere.
"""

import dataclasses
import functools
import typing
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mosaic
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, memref, vector as mlir_vector

from kvjax.kernels.decode.gpu_schedule import LOG2E, Schedule
from kvjax.kernels.parts import NEG

COPY = 256  # Elements along one axis that one asynchronous copy can move.
WIDTH = 64  # More channels at a time take more registers.


@dataclasses.dataclass(frozen=True)
class Side:
    """How keys or values are stored, as the kernel sees them.

    Attributes:
      dim: Channels.
      dtype: Of the codes: bfloat16, int8, float8, or int4 for packed words.
      bits: As in `Vectors`.
      scaled: "" for no scale; "slot": one per token, without a zero, applied to logits or weights; "group": one per
        token and `group` channels; "channel": one per channel and `group` tokens.
      group: See above.
      scale_dtype: Of scale and zero.
    """

    dim: int
    dtype: Any
    bits: int = 0
    scaled: str = ""
    group: int = 1
    scale_dtype: Any = None

    @property
    def planes(self) -> int:
        """Into how many parts the channels are sorted: of two-bit codes, the even ones come first."""
        return 2 if self.bits == 2 else 1

    @property
    def dense(self) -> bool:
        """Whether tensor cores can read what is stored."""
        return self.dtype == jnp.bfloat16

    @property
    def width(self) -> int:
        """Channels of a plane that are decoded together: they share a scale where tokens have several."""
        return min(WIDTH, (self.group if self.scaled == "group" else self.dim) // self.planes)

    def scales(self, block: int) -> tuple[int, int]:
        """Scales of a block: rows of them, each one a vector in memory."""
        if self.scaled == "channel":
            return max(1, block // self.group), self.dim
        return 1, block * (self.dim // self.group if self.scaled == "group" else 1)

    def arrivals(self, block: int) -> int:
        """Asynchronous copies that bring a block."""
        return 1 + len(self.extras()) * -(-self.scales(block)[1] // COPY)

    def nbytes(self, block: int) -> int:
        """Bytes of a block as it is stored, scales included."""
        bits = self.bits or 8 * jnp.dtype(self.dtype).itemsize
        rows, size = self.scales(block)
        scales = len(self.extras()) * rows * size * jnp.dtype(self.scale_dtype or jnp.float32).itemsize
        return block * self.dim * bits // 8 + scales

    @property
    def fragile(self) -> bool:
        """Whether what a block is decoded to may be NaN where nobody looks."""
        return self.dtype != jnp.int8 or self.bits == 8  # Scales may be; of int8 codes they come later.

    def extras(self) -> tuple[str, ...]:
        """Names of what accompanies the codes."""
        return {"": (), "slot": ("scale",)}.get(self.scaled, ("scale", "zero"))


@dataclasses.dataclass(frozen=True)
class Config:
    """What a kernel is compiled for; rows are padded to a multiple of eight."""

    k: Side
    v: Side
    rows: int
    slots: int
    block: int
    stages: int
    programs: int
    masked: bool
    window: int
    softcap: float


def shared_memory(config: Config) -> int:
    """Bytes that a program takes, short of barriers and alignment."""
    k, v, rows, block = config.k, config.v, config.rows, config.block
    tiles = sum(2 * block * side.dim for side in (k, v) if not side.dense)
    stored = config.stages * (k.nbytes(block) + v.nbytes(block) + 4 * block * config.masked)
    return tiles + stored + 2 * rows * (k.dim + block) + 4 * rows * (v.dim + 2)


def unpack(raw: Array, bits: int) -> list[tuple[Array, float, float]]:
    """Codes -> for each plane numbers y in bfloat16, and what makes codes of them: `(y + offset) * factor`.

    Flipping the highest bit of an unsigned code leaves a signed one, smaller by half the range; hardware converts
    signed numbers in fewer instructions.
    """
    if bits == 8:
        return [((raw ^ jnp.int8(-128)).astype(jnp.bfloat16), 128.0, 1.0)]
    if bits == 4:
        return [((raw ^ jnp.int4(-8)).astype(jnp.bfloat16), 8.0, 1.0)]
    if bits == 2:
        low, high = raw & jnp.int4(3), (raw & jnp.int4(-4)) ^ jnp.int4(-8)
        return [(low.astype(jnp.bfloat16), 0.0, 1.0), (high.astype(jnp.bfloat16), 8.0, 0.25)]
    if raw.dtype == jnp.int8:
        return [(raw.astype(jnp.bfloat16), 0.0, 1.0)]
    return [(raw.astype(jnp.float16).astype(jnp.float32).astype(jnp.bfloat16), 0.0, 1.0)]


def strided(ref: Any, size: int, stride: int, start: int, axis: int, interpret: Any) -> Array:
    """Every `stride`-th element of a vector in shared memory [size], ready to be made wide along the other axis.

    Pallas cannot read strided vectors, which the dialect below it can and its interpreter needs not.
    """
    if interpret:
        return ref[...].reshape(size, stride)[:, start]
    layout = plgpu.Layout.WGMMA.reduce(1 - axis)
    result = plgpu.ShapeDtypeStruct((size,), ref.dtype, layout=layout)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=result)
    def load(_: Any, vector: Any) -> Any:
        dialect: Any = layout.to_mgpu()
        kind = ir.MemRefType(vector.type).element_type
        index = lambda value: arith.constant(ir.IndexType.get(), value)  # noqa: E731
        registers = []
        for (at,) in dialect.thread_idxs((size,)):
            first = arith.addi(arith.muli(at, index(stride)), index(start))
            places = [arith.addi(first, index(stride * i)) for i in range(dialect.vector_length)]
            elements = [memref.load(vector, [place]) for place in places]
            registers.append(mlir_vector.from_elements(ir.VectorType.get((len(elements),), kind), elements))
        shape = dialect.registers_shape((size,))
        return mosaic.FragmentedArray(_registers=np.array(registers).reshape(shape), _layout=dialect, _is_signed=None)

    return typing.cast(Callable[[Any], Array], load)(ref)


def wide(x: Array, shape: tuple[int, ...], axis: int) -> Array:
    """Repeats a vector that lies along `axis` of a matrix."""
    return lax.broadcast_in_dim(x, shape, [axis])


def decode_block(side: Side, refs: dict[str, Any], tile: Any, alive: Array | None, interpret: Any) -> None:
    """Writes a block of stored vectors to a tile in bfloat16, plane by plane.

    Args:
      refs: "codes" [block, channels], and what accompanies them.
      tile: [block, dim] bfloat16 in shared memory.
      alive: Which tokens count [block] bool: others become zero, even if what they hold is NaN. None: all.
    """
    block, width = tile.shape[0], side.width
    bf16, f32 = jnp.bfloat16, jnp.float32

    def per_group(name: str, start: int) -> Array:
        groups = side.dim // side.group
        return strided(refs[name].at[0], block, groups, start * side.planes // side.group, 0, interpret).astype(f32)

    def per_channel(name: str, row: int, start: int, plane: int) -> Array:
        ref = refs[name].at[row, pl.ds(start * side.planes, width * side.planes)]
        return (ref[...] if side.planes == 1 else strided(ref, width, side.planes, plane, 1, interpret)).astype(f32)

    def affine(start: int, plane: int, offset: float, factor: float) -> tuple[Array, Array]:
        """What numbers are multiplied by, and what is added then."""

        def both(scale: Array, zero: Array, axis: int) -> tuple[Array, Array]:
            scale, zero = scale * factor, zero + scale * (offset * factor)
            if axis == 0 and alive is not None:
                scale, zero = jnp.where(alive, scale, 0.0), jnp.where(alive, zero, 0.0)
            return wide(scale.astype(bf16), (block, width), axis), wide(zero.astype(bf16), (block, width), axis)

        if side.scaled == "group":
            return both(per_group("scale", start), per_group("zero", start), 0)
        rows = [
            both(per_channel("scale", row, start, plane), per_channel("zero", row, start, plane), 1)
            for row in range(side.scales(block)[0])
        ]
        scale, zero = rows[0]
        at = lax.broadcasted_iota(jnp.int32, (block, width), 0)
        for row, (other_scale, other_zero) in enumerate(rows[1:], 1):
            later = at >= row * side.group
            scale, zero = jnp.where(later, other_scale, scale), jnp.where(later, other_zero, zero)
        return scale, zero

    load: Callable[..., Array] = plgpu.load  # Its signature is not that of older versions.
    fits = width % 32 == 0 and side.scaled != "channel"
    layout = plgpu.Layout.WGMMA_UPCAST_4X if fits else None  # Eight neighbours to a thread, that move together.
    for start in range(0, side.dim // side.planes, width):
        raw = load(refs["codes"].at[:, pl.ds(start, width)], layout=layout, optimized=False)
        for plane, (y, offset, factor) in enumerate(unpack(raw, side.bits)):
            if side.scaled in ("group", "channel"):
                scale, zero = affine(start, plane, offset, factor)
                y = y * scale + zero
            if alive is not None and side.scaled != "group":
                y = jnp.where(wide(alive, y.shape, 0), y, jnp.bfloat16(0))
            tile[:, pl.ds(plane * (side.dim // side.planes) + start, width)] = y


def run(config: Config, plan: Schedule, arrays: dict[str, Array], interpret: Any) -> tuple[Array, Array]:
    """Parts of rows and heads.

    Args:
      arrays: Rows and heads in one axis R. "lengths" [R] int32, "q" [R, N, D] bfloat16, planes of channels in order;
        "k", "v" [R, S, D] codes; "k_scale", ... [R, S] ("slot"), [R, S * groups] ("group"), [R, S / group, D]
        ("channel"); with `masked` "pos" [R', S] and "q_pos" [R'', N] int32. Axes R', R'' divide R.
      interpret: None, or how.

    Returns:
      Unnormalised outputs [programs + R, Dv, N], and maximum (base 2) and sum of weights [programs + R, 2, N], float32.
      See `gpu_schedule.join`.
    """
    k, v, rows, block, stages = config.k, config.v, config.rows, config.block, config.stages
    bf16, f32 = jnp.bfloat16, jnp.float32
    total_rows = arrays["lengths"].shape[0]
    inputs = {field.name: getattr(plan, field.name) for field in dataclasses.fields(plan)} | arrays

    def body(inp: dict[str, Any], out: dict[str, Any], mem: dict[str, Any]) -> None:
        program = lax.axis_index("program")
        begin, end = inp["starts"][program], inp["starts"][program + 1]

        def of_row(name: str, row: Array) -> Any:
            """Part of an input; several rows may share one."""
            share = total_rows // inp[name].shape[0]
            return inp[name].at[row if share == 1 else lax.div(row, jnp.int32(share))]

        def fetch(side_name: str, side: Side, row: Array, index: Array, slot: Array | int) -> None:
            """Starts the copies of a block of keys or values."""
            first = jnp.minimum(index * block, config.slots - block)
            ready = mem[side_name + "_ready"].at[slot]
            copy = lambda source, target: plgpu.copy_gmem_to_smem(source, target, ready)  # noqa: E731
            copy(of_row(side_name, row).at[pl.ds(first, block)], mem[side_name].at[slot])
            for name in side.extras():
                name = f"{side_name}_{name}"
                target = mem[name].at[slot]
                if side.scaled == "channel":
                    groups = pl.ds(lax.div(first, jnp.int32(side.group)), side.scales(block)[0])
                    copy(of_row(name, row).at[groups], target)
                    continue
                _, size = side.scales(block)
                for start in range(0, size, COPY):
                    part = min(COPY, size - start)
                    source = pl.ds(first * (size // block) + start, part)
                    copy(of_row(name, row).at[source], target.at[0, pl.ds(start, part)])
            if side_name == "k" and config.masked:
                copy(of_row("pos", row).at[pl.ds(first, block)], mem["pos"].at[slot])

        def refs(side_name: str, side: Side, slot: Array) -> dict[str, Any]:
            found = {name: mem[f"{side_name}_{name}"].at[slot] for name in side.extras()}
            return found | {"codes": mem[side_name].at[slot]}

        def visible(first: Array, fresh: Array, length: Array, slot: Array) -> Array:
            """Which tokens each query row sees [block, N]."""
            at = lax.broadcasted_iota(jnp.int32, (block, rows), 0) + first
            seen = (at >= fresh) & (at < length)
            if not config.masked:
                return seen
            k_pos, q_pos = wide(mem["pos"][slot], seen.shape, 0), wide(mem["q_pos"][...], seen.shape, 1)
            seen = seen & (k_pos >= 0) & (k_pos <= q_pos)
            if config.window:
                seen = seen & (q_pos - k_pos < config.window)
            return seen

        def anybody(seen: Array, first: Array, length: Array) -> Array:
            """Which tokens some query row sees [block]."""
            if config.masked:
                return jnp.where(seen, 1.0, 0.0).max(axis=1) > 0
            return lax.broadcasted_iota(jnp.int32, (block,), 0) + first < length

        @pl.loop(inp["first"][program], inp["last"][program] + 1)
        def _(row: Array) -> None:
            offset = inp["offsets"][row]
            low = jnp.maximum(begin, offset) - offset
            steps = jnp.minimum(end, inp["offsets"][row + 1]) - offset - low
            length = inp["lengths"][row]
            plgpu.copy_gmem_to_smem(of_row("q", row), mem["q"], mem["q_ready"])
            if config.masked:
                plgpu.copy_gmem_to_smem(of_row("q_pos", row), mem["q_pos"], mem["q_ready"])
            for stage in range(stages):

                @pl.when(stage < steps)
                def _(stage: int = stage) -> None:
                    fetch("k", k, row, low + stage, stage)
                    fetch("v", v, row, low + stage, stage)

            plgpu.barrier_wait(mem["q_ready"])

            def step(i: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
                acc, top, total = state
                slot = lax.rem(i, jnp.int32(stages))
                fresh = (low + i) * block
                first = jnp.minimum(fresh, config.slots - block)
                refill = functools.partial(pl.when, i + stages < steps)

                plgpu.barrier_wait(mem["k_ready"].at[slot])
                seen = visible(first, fresh, length, slot)
                alive = functools.partial(anybody, seen, first, length)
                if not k.dense:
                    decode_block(k, refs("k", k, slot), mem["k_tile"], None, interpret)
                    plgpu.commit_smem()
                plgpu.barrier_wait(mem["v_ready"].at[slot])

                def logits(ref: Any) -> Array:
                    plgpu.wgmma(ref, mem["k"].at[slot] if k.dense else mem["k_tile"], mem["q"].T)
                    if not v.dense:  # While the tensor cores are busy.
                        decode_block(v, refs("v", v, slot), mem["v_tile"], alive() if v.fragile else None, interpret)
                    return ref[...]

                s = pl.run_scoped(logits, plgpu.WGMMAAccumulatorRef((block, rows), f32))
                if k.scaled == "slot":
                    s = s * wide(mem["k_scale"][slot, 0].astype(f32), s.shape, 0)
                if config.softcap:
                    s = config.softcap * jnp.tanh(s * (1 / config.softcap))
                s = jnp.where(seen, s * LOG2E, NEG)
                new = jnp.maximum(top, s.max(axis=0))
                fade = jnp.exp2(top - new)
                p = jnp.where(seen, jnp.exp2(s - wide(new, s.shape, 1)), 0.0)
                total = total * fade + p.sum(axis=0)
                if v.scaled == "slot":
                    p = jnp.where(seen, p * wide(mem["v_scale"][slot, 0].astype(f32), s.shape, 0), 0.0)
                mem["p"].T[...] = p.astype(bf16)
                if v.dense:
                    clean(mem["v"].at[slot], alive, first + block > length)
                plgpu.commit_smem()
                refill()(functools.partial(fetch, "k", k, row, low + i + stages, slot))
                if not v.dense:
                    refill()(functools.partial(fetch, "v", v, row, low + i + stages, slot))

                def mix(ref: Any) -> Array:
                    plgpu.wgmma(ref, (mem["v"].at[slot] if v.dense else mem["v_tile"]).T, mem["p"].T)
                    return ref[...]

                mixed = pl.run_scoped(mix, plgpu.WGMMAAccumulatorRef((v.dim, rows), f32))
                plgpu.commit_smem()
                if v.dense:
                    refill()(functools.partial(fetch, "v", v, row, low + i + stages, slot))
                return acc * wide(fade, acc.shape, 1) + mixed, new, total

            def clean(ref: Any, alive: Callable[[], Array], ragged: Array) -> None:
                """Zeroes what nobody sees, where there may be such: zero weights do not silence NaN."""

                def write() -> None:
                    x = ref[...]
                    ref[...] = jnp.where(wide(alive(), x.shape, 0), x, jnp.zeros_like(x))

                write() if config.masked else pl.when(ragged)(write)

            state = (jnp.zeros((v.dim, rows), f32), jnp.full((rows,), NEG, f32), jnp.zeros((rows,), f32))
            acc, top, total = lax.fori_loop(0, steps, step, state)
            mem["out"][...] = acc
            mem["sums"][0] = top
            mem["sums"][1] = total
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(mem["out"], out["out"].at[program + row])
            plgpu.copy_smem_to_gmem(mem["sums"], out["sums"].at[program + row])
            plgpu.wait_smem_to_gmem(0)

    scratch = {
        "q": plgpu.SMEM((rows, k.dim), bf16),
        "p": plgpu.SMEM((rows, block), bf16),
        "out": plgpu.SMEM((v.dim, rows), f32),
        "sums": plgpu.SMEM((2, rows), f32),
        "q_ready": plgpu.Barrier(num_arrivals=1 + config.masked),
    }
    if config.masked:
        scratch |= {"pos": plgpu.SMEM((stages, block), jnp.int32), "q_pos": plgpu.SMEM((rows,), jnp.int32)}
    for name, side in (("k", k), ("v", v)):
        scratch[name] = plgpu.SMEM((stages, block, arrays[name].shape[-1]), side.dtype)
        if not side.dense:
            scratch[name + "_tile"] = plgpu.SMEM((block, side.dim), bf16)
        for extra in side.extras():
            scratch[f"{name}_{extra}"] = plgpu.SMEM((stages, *side.scales(block)), side.scale_dtype)
        arrivals = side.arrivals(block) + (name == "k" and config.masked)
        scratch[name + "_ready"] = plgpu.Barrier(num_arrivals=arrivals, num_barriers=stages)

    def kernel(*refs: Any, **mem: Any) -> None:
        body(dict(zip(inputs, refs, strict=False)), {"out": refs[-2], "sums": refs[-1]}, mem)

    parts = config.programs + total_rows
    out, sums = plgpu.kernel(
        kernel,
        out_type=[jax.ShapeDtypeStruct((parts, v.dim, rows), f32), jax.ShapeDtypeStruct((parts, 2, rows), f32)],
        grid=(config.programs,),
        grid_names=("program",),
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=interpret,
    )(*inputs.values())
    return out, sums
