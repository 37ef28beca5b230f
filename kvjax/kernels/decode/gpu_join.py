"""What several programs found of one row and head, joined by one program for each row and 64 channels of its values."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kvjax.kernels.decode.gpu_schedule import LOG2E, Schedule, share_of
from kvjax.kernels.decode.gpu_stored import aligned, wide
from kvjax.kernels.parts import NEG

CHANNELS = 64  # The fewest that a tile of the tensor cores' layout has.
STAGES = 4  # Parts that are on their way from memory at a time.


def join(out: Array, sums: Array, plan: Schedule, interpret: Any = None) -> tuple[Array, Array]:
    """Parts of rows and heads, by the program that made them, -> their normalised whole.

    Part r is of row and head r, by the program that began it. Part R + p is by program p, of the row that its share
    begins with, where another program began that. Programs that continue a row follow one another.

    Args:
      out: [R + programs, Dv, N] float32 for R rows and heads, unnormalised; arbitrary where nobody wrote.
      sums: Maximum (base 2) and sum of weights [R + programs, 2, N] float32.
      interpret: None, or how.

    Returns:
      out [R, Dv, N], lse [R, N].
    """
    f32, programs = jnp.float32, plan.first_row.shape[0]
    total_rows, (_, dim, rows) = plan.offsets.shape[0] - 1, out.shape

    def kernel(offsets: Any, parts: Any, tops: Any, whole: Any, lse: Any, **mem: Any) -> None:
        row, channels = lax.axis_index("row"), lax.axis_index("channels")
        share = share_of(offsets[total_rows], programs)
        begin, end = offsets[row], offsets[row + 1]
        first = lax.div(begin, share)  # The program that began.
        number = jnp.where(end > begin, lax.div(end - 1, share) - first + 1, 0)

        def fetch(i: Any, slot: Any) -> None:
            part = jnp.where(jnp.int32(i) == 0, row, total_rows + first + i)
            ready = mem["ready"].at[slot]
            plgpu.copy_gmem_to_smem(parts.at[part, pl.ds(channels * CHANNELS, CHANNELS)], mem["out"].at[slot], ready)
            plgpu.copy_gmem_to_smem(tops.at[part], mem["sums"].at[slot, pl.ds(0, 2)], ready)

        for stage in range(STAGES):
            pl.when(stage < number)(lambda stage=stage: fetch(stage, stage))

        def step(i: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            acc, top, total = state
            slot = lax.rem(i, jnp.int32(STAGES))
            plgpu.barrier_wait(mem["ready"].at[slot])
            part, part_top, part_total = mem["out"][slot], mem["sums"][slot, 0], mem["sums"][slot, 1]
            new = jnp.maximum(top, part_top)
            fade, worth = jnp.exp2(top - new), jnp.exp2(part_top - new)
            acc = acc * wide(fade, acc.shape, 1) + part * wide(worth, acc.shape, 1)
            plgpu.commit_smem()  # All have read what the next copy overwrites.
            pl.when(i + STAGES < number)(lambda: fetch(i + STAGES, slot))
            return acc, new, total * fade + part_total * worth

        nothing = plgpu.layout_cast(jnp.zeros((CHANNELS, rows), f32), plgpu.Layout.WGMMA)
        state = (nothing, jnp.full((rows,), NEG, f32), jnp.zeros((rows,), f32))
        acc, top, total = lax.fori_loop(0, number, step, state)
        some = jnp.maximum(total, 1e-30)
        mem["joined"][...] = acc * wide(1 / some, acc.shape, 1)
        mem["log"][...] = jnp.where(total > 0, top * (1 / LOG2E) + jnp.log(some), NEG)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(mem["joined"], whole.at[row, pl.ds(channels * CHANNELS, CHANNELS)])
        pl.when(channels == 0)(lambda: plgpu.copy_smem_to_gmem(mem["log"], lse.at[row]))
        plgpu.wait_smem_to_gmem(0)

    whole, lse = plgpu.kernel(
        kernel,
        out_type=[jax.ShapeDtypeStruct((total_rows, dim, rows), f32), jax.ShapeDtypeStruct((total_rows, rows), f32)],
        grid=(dim // CHANNELS, total_rows),
        grid_names=("channels", "row"),
        scratch_types={
            "out": plgpu.SMEM((STAGES, CHANNELS, rows), f32),
            "sums": plgpu.SMEM((STAGES, aligned(2 * rows, f32) // rows, rows), f32),
            "joined": plgpu.SMEM((CHANNELS, rows), f32),
            "log": plgpu.SMEM((rows,), f32),
            "ready": plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
        },
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=interpret,
    )(plan.offsets, out, sums)
    return whole, lse
