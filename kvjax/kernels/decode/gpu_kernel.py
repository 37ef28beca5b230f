"""The kernel of decode and paged attention on Hopper GPUs: one warpgroup per program, tokens on the tensor cores' M,
query rows on their N.

    logits^T [block, N] = K [block, D] q^T [D, N]        out^T [Dv, N] += V^T [Dv, block] weights^T [block, N]

So eight query rows cost eight columns and not a padded tile of 64. Blocks come through a few stages of shared memory in
their storage type and become bfloat16 in registers. From there the tensor cores take keys, channels in the order that
decoding leaves them in, which queries share (`gpu_stored.weave`). Values go back to shared memory to be read
transposed, so that tokens stay on the same axis everywhere; so do keys that share scales among tokens or do not fit
registers.

A block is one piece of neighbouring slots, or several from anywhere, as a table says. A tail in full precision comes
before what is stored, while the first stored blocks are on their way.
"""

import dataclasses
import functools
import typing
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kvjax.kernels.decode.gpu_schedule import LOG2E, Schedule, bounds
from kvjax.kernels.decode.gpu_stored import (
    COPY,
    WIDTH,
    Places,
    Side,
    aligned,
    as_operand,
    decode_block,
    pick,
    weave,
    wide,
)
from kvjax.kernels.parts import NEG


@dataclasses.dataclass(frozen=True)
class Config:
    """What a kernel is compiled for; rows are padded to a multiple of eight.

    Attributes:
      slots: In which the tokens of a row lie.
      block: Slots per step.
      piece: Of them, those that are neighbours: all where a row's tokens are a prefix of its slots; fewer, or as many,
        where a table says where each piece is.
      table: See there.
      stages: Blocks that are on their way from memory at a time.
      programs: Over how many the work is divided.
      tail: Blocks of the tail.
      masked: Whether slots have positions.
      bias: Rows to whose logits something is added: all that are no padding, or none.
      window, softcap: As in a request.
    """

    k: Side
    v: Side
    rows: int
    slots: int
    block: int
    piece: int
    table: bool
    stages: int
    programs: int
    tail: int
    masked: bool
    bias: int
    window: int
    softcap: float

    def tiled(self, name: str) -> bool:
        """Whether keys ("k") or values ("v") are decoded to shared memory, or a tail has to lie there."""
        side = {"k": self.k, "v": self.v}[name]
        return not side.dense and (name == "v" or self.tail > 0 or not side.in_registers(self.block))


ROWS = 8  # That shared memory is tiled by: the compiler has to know that slots are multiples of them.


class Span(typing.NamedTuple):
    """A piece of a block: its first slot, and which tokens in it count, from `low` to before `high`."""

    first: Array
    low: Array
    high: Array


# Sums of weighted values [Dv, N], maximum (base 2) [N], and weights [block, N], which are added up at the end.
State = tuple[Array, Array, Array]


def shared_memory(config: Config) -> int:
    """Bytes that a program takes, short of barriers and alignment."""
    k, v, rows, block = config.k, config.v, config.rows, config.block
    tiles = sum(2 * block * side.dim for name, side in (("k", k), ("v", v)) if config.tiled(name))
    stored = config.stages * (k.nbytes(block) + v.nbytes(block) + 4 * block * (config.masked + config.bias))
    return tiles + stored + 2 * rows * (k.dim + block) + 4 * rows * (v.dim + 2)


def run(config: Config, plan: Schedule, arrays: dict[str, Array], interpret: Any) -> tuple[Array, Array]:
    """Parts of rows and heads.

    Args:
      arrays: Rows and heads in one axis R. "q" [R, N, D] bfloat16, planes of channels in order; "k", "v" [R, S, D]
        codes; "k_scale", ... [R, S] ("slot"), [R, S * groups] ("group"), [R, S / group, D] ("channel"); with `masked`
        "pos" [R, S]; with `bias` "bias" [R, bias, S] float32; with a tail "tail_k", "tail_v" [R, T, D] bfloat16 and
        "tail_pos" [R, T], T whole blocks; with `masked` or a tail "q_pos" [R, N]. Either "lengths" [R], or with
        `table` "first", "low", "high" [R, pieces]: see `Span`, but first slots are counted in `ROWS`. All int32 where
        not said otherwise. Several rows may share one of an array that has fewer.
      interpret: None, or how.

    Returns:
      Unnormalised outputs [R + programs, Dv, N], and maximum (base 2) and sum of weights [R + programs, 2, N], float32.
      See `gpu_join.join`.
    """
    k, v, rows, block, piece, stages = config.k, config.v, config.rows, config.block, config.piece, config.stages
    bf16, f32 = jnp.bfloat16, jnp.float32
    total_rows, pieces = arrays["q"].shape[0], block // piece
    pos_pitch = aligned(piece, jnp.int32)
    sides = {"k": k, "v": v}
    inputs = {field.name: getattr(plan, field.name) for field in dataclasses.fields(plan)} | arrays

    def body(inp: dict[str, Any], out: dict[str, Any], mem: dict[str, Any]) -> None:
        program = lax.axis_index("program")
        begin, end = bounds(inp["offsets"][total_rows], program, config.programs)

        def of_row(name: str, row: Array) -> Any:
            """Part of an input; several rows may share one."""
            share = total_rows // inp[name].shape[0]
            return inp[name].at[row if share == 1 else lax.div(row, jnp.int32(share))]

        def find(row: Array, length: Array | None, index: Array) -> list[Span]:
            """Where a block is."""
            if length is None:
                first, low, high = (inp[name].at[row] for name in ("first", "low", "high"))
                at = [index * pieces + j for j in range(pieces)]
                return [Span(first[i] * ROWS, low[i], high[i]) for i in at]
            fresh = index * block
            first = jnp.minimum(fresh, config.slots - block)  # The last block overlaps the one before.
            return [Span(first, fresh - first, jnp.minimum(length - first, block))]

        def fetch(name: str, row: Array, spans: list[Span], slot: Array | int) -> None:
            """Starts the copies of a block of keys or values."""
            side, ready = sides[name], mem[name + "_ready"].at[slot]
            copy = lambda source, target: plgpu.copy_gmem_to_smem(source, target, ready)  # noqa: E731
            scale_rows, size = side.scales(piece)
            for j, span in enumerate(spans):
                copy(of_row(name, row).at[pl.ds(span.first, piece)], mem[name].at[slot, pl.ds(j * piece, piece)])
                for extra in (f"{name}_{extra}" for extra in side.extras()):
                    if side.scaled == "channel":
                        groups = pl.ds(lax.div(span.first, jnp.int32(side.group)), scale_rows)
                        target = mem[extra].at[slot, pl.ds(j * scale_rows, scale_rows)]
                        copy(of_row(extra, row).at[groups], target)
                        continue
                    for start in range(0, size, COPY):
                        part = min(COPY, size - start)
                        source = pl.ds(span.first * (size // piece) + start, part)
                        target = pl.ds(j * side.pitch(piece) + start, part)
                        copy(of_row(extra, row).at[source], mem[extra].at[slot, 0, target])
                if name == "k" and config.masked:
                    source = of_row("pos", row).at[pl.ds(span.first, piece)]
                    copy(source, mem["pos"].at[slot, pl.ds(j * pos_pitch, piece)])
                if name == "k" and config.bias:
                    copy(of_row("bias", row).at[:, pl.ds(span.first, piece)], mem["bias"].at[slot])

        def fetch_tail(row: Array, index: Array) -> None:
            targets = {"tail_k": tiles["k"], "tail_v": tiles["v"], "tail_pos": mem["tail_pos"]}
            for name, target in targets.items():
                source = of_row(name, row).at[pl.ds(index * block, block)]
                plgpu.copy_gmem_to_smem(source, target, mem["tail_ready"])

        # What the tensor cores read: codes are decoded to here, and a tail lies here before anything is.
        tiles = {name: mem[name].at[0] if side.dense else mem.get(name + "_tile") for name, side in sides.items()}

        def refs(name: str, slot: Array) -> dict[str, Any]:
            found = {extra: mem[f"{name}_{extra}"].at[slot] for extra in sides[name].extras()}
            return found | {"codes": mem[name].at[slot]}

        def decode_keys(slot: Array) -> Any:
            """A block of keys [block, D] bfloat16, or a reference to it."""
            decoded = decode_block(k, refs("k", slot), None, piece, interpret)
            registers = k.in_registers(block)
            if registers and not interpret:
                return as_operand([x for _, x in decoded])
            for start, x in decoded:  # Pallas' interpreter cannot multiply what is in registers.
                mem["k_tile"][:, pl.ds(start, x.shape[1])] = weave(x) if registers else x
            plgpu.commit_smem()
            return mem["k_tile"]

        def scale_of(name: str, slot: Array) -> Array:
            """Of each token of a block [block] float32, where tokens have one."""
            places = Places(block, piece, sides[name].pitch(piece))
            return pick(mem[name + "_scale"].at[slot, 0], places, 0, interpret).astype(f32)

        def occupied(spans: list[Span], shape: tuple[int, ...]) -> Array:
            """Which tokens of a block count: bool of a shape that begins with them."""
            at = lax.broadcasted_iota(jnp.int32, shape, 0)
            each = [(at >= j * piece + span.low) & (at < j * piece + span.high) for j, span in enumerate(spans)]
            return functools.reduce(jnp.logical_or, each)

        def visible(pos: Array) -> Array:
            """Which tokens each query row sees, by their positions [block]: [block, N]."""
            k_pos, q_pos = wide(pos, (block, rows), 0), wide(mem["q_pos"][...], (block, rows), 1)
            seen = (k_pos >= 0) & (k_pos <= q_pos)
            return seen & (q_pos - k_pos < config.window) if config.window else seen

        def anybody(seen: Array) -> Array:
            """Which tokens some query row sees [block]."""
            return jnp.where(seen, 1.0, 0.0).max(axis=1) > 0

        def clean(ref: Any, alive: Array) -> None:
            """Zeroes what nobody sees: zero weights do not silence NaN."""
            for start in range(0, ref.shape[1], WIDTH):
                x = ref[:, pl.ds(start, WIDTH)]
                ref[:, pl.ds(start, WIDTH)] = jnp.where(wide(alive, x.shape, 0), x, jnp.zeros_like(x))

        def attend(
            state: State,
            seen: Array,
            keys: Any,
            values: Any,
            *,
            meanwhile: Callable[[], None] = lambda: None,
            logits: Callable[[Array], Array] = lambda s: s,
            weights: Callable[[Array], Array] = lambda p: p,
            settle: Callable[[], None] = lambda: None,
            after_keys: Callable[[], None] = lambda: None,
        ) -> State:
            """Joins a block to what came before.

            Args:
              seen: Which tokens each query row sees [block, N].
              keys: [block, D] bfloat16, or a reference to it.
              values: A reference to [block, Dv] bfloat16.
              meanwhile: Done while the tensor cores multiply keys.
              logits, weights: Applied to logits before anything else, and to weights before they meet values.
              settle: The last writes to values.
              after_keys: Done when the keys are no longer needed.
            """
            acc, top, total = state

            def multiply(ref: Any) -> Array:
                plgpu.wgmma(ref, keys, mem["q"].T)
                meanwhile()
                return ref[...]

            s = logits(pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef((block, rows), f32)))
            if config.softcap:
                s = config.softcap * jnp.tanh(s * (1 / config.softcap))
            s = jnp.where(seen, s * LOG2E, NEG)
            new = jnp.maximum(top, s.max(axis=0))
            fade = jnp.exp2(top - new)
            p = jnp.where(seen, jnp.exp2(s - wide(new, s.shape, 1)), 0.0)
            total = total * wide(fade, p.shape, 1) + p
            mem["p"].T[...] = weights(p).astype(bf16)
            settle()
            plgpu.commit_smem()
            after_keys()

            def mix(ref: Any) -> Array:
                plgpu.wgmma(ref, values.T, mem["p"].T)
                return ref[...]

            mixed = pl.run_scoped(mix, plgpu.WGMMAAccumulatorRef((v.dim, rows), f32))
            plgpu.commit_smem()
            return acc * wide(fade, acc.shape, 1) + mixed, new, total

        @pl.loop(inp["first_row"][program], inp["last_row"][program] + 1)
        def _(row: Array) -> None:
            offset = inp["offsets"][row]
            length = None if config.table else inp["lengths"][row]
            low = jnp.maximum(begin, offset) - offset
            steps = jnp.minimum(end, inp["offsets"][row + 1]) - offset - low
            plgpu.copy_gmem_to_smem(of_row("q", row), mem["q"], mem["q_ready"])
            if config.masked or config.tail:
                plgpu.copy_gmem_to_smem(of_row("q_pos", row), mem["q_pos"], mem["q_ready"])
            tail_low, tail_steps = low, jnp.clip(config.tail - low, 0, steps)
            low, steps = jnp.maximum(low - config.tail, 0), steps - tail_steps

            def ahead(stage: int, names: list[str]) -> None:
                """Fetches the first blocks."""
                if not names:
                    return

                @pl.when(stage < steps)
                def _() -> None:
                    spans = find(row, length, low + stage)
                    for name in names:
                        fetch(name, row, spans, stage)

            # A tail takes the first stage of what the tensor cores read from there.
            behind = [name for name, side in sides.items() if side.dense and config.tail]
            for stage in range(stages):
                ahead(stage, [name for name in sides if stage or name not in behind])
            plgpu.barrier_wait(mem["q_ready"])

            def tail_step(i: Array, state: State) -> State:
                fetch_tail(row, i)
                plgpu.barrier_wait(mem["tail_ready"])
                seen = visible(mem["tail_pos"][...])
                return attend(state, seen, tiles["k"], tiles["v"], settle=lambda: clean(tiles["v"], anybody(seen)))

            def step(i: Array, state: State) -> State:
                slot = lax.rem(i, jnp.int32(stages))
                spans = find(row, length, low + i)
                later = find(row, length, low + jnp.minimum(i + stages, steps - 1))  # Early, because memory is far.
                plgpu.barrier_wait(mem["k_ready"].at[slot])
                seen = occupied(spans, (block, rows))
                if config.masked:
                    seen = seen & visible(pick(mem["pos"].at[slot], Places(block, piece, pos_pitch), 0, interpret))
                alive = lambda: anybody(seen) if config.masked else occupied(spans, (block,))  # noqa: E731
                keys = mem["k"].at[slot] if k.dense else decode_keys(slot)
                plgpu.barrier_wait(mem["v_ready"].at[slot])

                def refill(*names: str) -> None:
                    @pl.when(i + stages < steps)
                    def _() -> None:
                        for name in names:
                            fetch(name, row, later, slot)

                def meanwhile() -> None:
                    if not v.dense:
                        some = alive() if v.fragile else None
                        for start, x in decode_block(v, refs("v", slot), some, piece, interpret):
                            mem["v_tile"][:, pl.ds(start, x.shape[1])] = x

                def logits(s: Array) -> Array:
                    if k.scaled == "slot":
                        s = s * wide(scale_of("k", slot), s.shape, 0)
                    column = lax.broadcasted_iota(jnp.int32, s.shape, 1)
                    for n in range(config.bias):
                        s = s + jnp.where(column == n, wide(mem["bias"][slot, n], s.shape, 0), 0.0)
                    return s

                def weights(p: Array) -> Array:
                    if v.scaled != "slot":
                        return p
                    return jnp.where(seen, p * wide(scale_of("v", slot), p.shape, 0), 0.0)

                def settle() -> None:
                    if v.dense and config.masked:
                        clean(mem["v"].at[slot], alive())
                    elif v.dense:
                        ragged = functools.reduce(jnp.logical_or, [span.high < piece for span in spans])
                        pl.when(ragged)(lambda: clean(mem["v"].at[slot], alive()))

                state = attend(
                    state,
                    seen,
                    keys,
                    mem["v"].at[slot] if v.dense else mem["v_tile"],
                    meanwhile=meanwhile,
                    logits=logits,
                    weights=weights,
                    settle=settle,
                    after_keys=lambda: refill("k") if v.dense else refill("k", "v"),
                )
                if v.dense:
                    refill("v")
                return state

            state = (jnp.zeros((v.dim, rows), f32), jnp.full((rows,), NEG, f32), jnp.zeros((block, rows), f32))
            if config.tail:
                state = lax.fori_loop(tail_low, tail_low + tail_steps, tail_step, state)
            ahead(0, behind)
            acc, top, total = lax.fori_loop(0, steps, step, state)
            mem["out"][...] = acc
            mem["sums"][0] = top
            mem["sums"][1] = total.sum(axis=0)
            plgpu.commit_smem()
            part = jnp.where(begin <= offset, row, total_rows + program)
            plgpu.copy_smem_to_gmem(mem["out"], out["out"].at[part])
            plgpu.copy_smem_to_gmem(mem["sums"], out["sums"].at[part])
            plgpu.wait_smem_to_gmem(0)

    scratch = {
        "q": plgpu.SMEM((rows, k.dim), bf16),
        "p": plgpu.SMEM((rows, block), bf16),
        "out": plgpu.SMEM((v.dim, rows), f32),
        "sums": plgpu.SMEM((2, rows), f32),
        "q_ready": plgpu.Barrier(num_arrivals=2 if config.masked or config.tail else 1),
    }
    if config.masked or config.tail:
        scratch["q_pos"] = plgpu.SMEM((rows,), jnp.int32)
    if config.masked:
        scratch["pos"] = plgpu.SMEM((stages, pieces * pos_pitch), jnp.int32)
    if config.bias:
        scratch["bias"] = plgpu.SMEM((stages, config.bias, block), f32)
    if config.tail:
        scratch |= {"tail_pos": plgpu.SMEM((block,), jnp.int32), "tail_ready": plgpu.Barrier(num_arrivals=3)}
    for name, side in sides.items():
        scratch[name] = plgpu.SMEM((stages, block, arrays[name].shape[-1]), side.dtype)
        if config.tiled(name) or (interpret and not side.dense):
            scratch[name + "_tile"] = plgpu.SMEM((block, side.dim), bf16)
        for extra in side.extras():
            shape = side.scales(block) if side.scaled == "channel" else (1, pieces * side.pitch(piece))
            scratch[f"{name}_{extra}"] = plgpu.SMEM((stages, *shape), side.scale_dtype)
        arrivals = side.arrivals(block, piece) + pieces * (name == "k") * (config.masked + (config.bias > 0))
        scratch[name + "_ready"] = plgpu.Barrier(num_arrivals=arrivals, num_barriers=stages)

    def kernel(*refs: Any, **mem: Any) -> None:
        body(dict(zip(inputs, refs, strict=False)), {"out": refs[-2], "sums": refs[-1]}, mem)

    parts = total_rows + config.programs
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
