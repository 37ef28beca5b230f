"""Equal shares of a ragged batch, and how what they yield is joined.

As in LeanAttention (arXiv 2405.10480) the occupied blocks of all rows and heads form one list, of which every program
gets a contiguous share of the same size. So one long sequence fills the chip and a ragged batch is balanced.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import Array

from kvjax.kernels.parts import NEG

LOG2E = math.log2(math.e)


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Who reads what: a list of blocks, all rows and heads in a row, cut into equal shares.

    Attributes:
      starts: Where each program's share starts in the list, and where the last one ends [programs + 1] int32.
      first, last: First and last row and head of each share [programs] int32; first > last where there is no work.
      offsets: Where the blocks of each row and head start in the list [B * H + 1] int32.
    """

    starts: Array
    first: Array
    last: Array
    offsets: Array


def schedule(lengths: Array, block: int, programs: int) -> Schedule:
    """lengths [B * H] int32 -> who reads which blocks."""
    offsets = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum((lengths + block - 1) // block, dtype=jnp.int32)])
    share = jnp.maximum((offsets[-1] + programs - 1) // programs, 1)
    starts = jnp.minimum(jnp.arange(programs + 1, dtype=jnp.int32) * share, offsets[-1])
    owner = lambda blocks: jnp.searchsorted(offsets, blocks, side="right").astype(jnp.int32) - 1  # noqa: E731
    idle = starts[:-1] == starts[1:]
    return Schedule(
        starts=starts,
        first=jnp.where(idle, 1, owner(starts[:-1])),
        last=jnp.where(idle, 0, owner(starts[1:] - 1)),
        offsets=offsets,
    )


def join(out: Array, top: Array, total: Array, plan: Schedule) -> tuple[Array, Array]:
    """Parts of rows and heads, by the program that made them, -> their normalised whole.

    A program writes the part of row and head r to slot `program + r`. Slots are unique, since both only ever grow.

    Args:
      out: [programs + B * H, Dv, N] float32, unnormalised; arbitrary where nobody wrote.
      top, total: Maximum (base 2) and sum of weights [programs + B * H, N] float32.

    Returns:
      out [B * H, Dv, N], lse [B * H, N].
    """
    rows, programs = plan.offsets.shape[0] - 1, plan.starts.shape[0] - 1
    owner = lambda blocks: jnp.searchsorted(plan.starts, blocks, side="right").astype(jnp.int32) - 1  # noqa: E731
    row = jnp.arange(rows, dtype=jnp.int32)
    begin = jnp.minimum(owner(plan.offsets[:-1]), programs - 1) + row
    end = jnp.minimum(owner(plan.offsets[1:] - 1), programs - 1) + row
    slot = jnp.arange(rows + programs, dtype=jnp.int32)
    of = jnp.clip(jnp.searchsorted(begin, slot, side="right").astype(jnp.int32) - 1, 0, rows - 1)
    written = (slot >= begin[of]) & (slot <= end[of]) & (plan.offsets[of + 1] > plan.offsets[of])
    total = jnp.where(written[:, None], total, 0.0)
    top = jnp.where(total > 0, top, NEG)
    highest = jax.ops.segment_max(top, of, rows, indices_are_sorted=True)
    highest = jnp.maximum(highest, NEG)
    share = jnp.where(total > 0, jnp.exp2(top - highest[of]), 0.0)
    whole = jax.ops.segment_sum(total * share, of, rows, indices_are_sorted=True)
    parts = jnp.where(written[:, None, None], out, 0.0) * share[:, None]
    out = jax.ops.segment_sum(parts, of, rows, indices_are_sorted=True) / jnp.maximum(whole, 1e-30)[:, None]
    lse = jnp.where(whole > 0, highest / LOG2E + jnp.log(jnp.maximum(whole, 1e-30)), NEG)
    return out, lse
