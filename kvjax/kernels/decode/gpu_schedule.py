"""Equal shares of a ragged batch, and how what they yield is joined.

As in LeanAttention (arXiv 2405.10480) the occupied blocks of all rows and heads form one list, of which every program
gets a contiguous share of the same size. So one long sequence fills the chip and a ragged batch is balanced.
"""

import dataclasses
import math

import jax.numpy as jnp
from jax import Array

from kvjax.kernels.parts import NEG

LOG2E = math.log2(math.e)


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Who reads what: a list of blocks, all rows and heads in a row, cut into equal shares.

    Attributes:
      starts: Where each program's share starts in the list, and where the last one ends [programs + 1] int32.
      first_row, last_row: Of each share, rows and heads in one axis [programs] int32; first > last where there is no
        work.
      offsets: Where the blocks of each row and head start in the list [B * H + 1] int32.
    """

    starts: Array
    first_row: Array
    last_row: Array
    offsets: Array


def schedule(blocks: Array, programs: int) -> Schedule:
    """How many blocks each row and head has [B * H] int32 -> who reads which."""
    offsets = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(blocks, dtype=jnp.int32)])
    share = jnp.maximum((offsets[-1] + programs - 1) // programs, 1)
    starts = jnp.minimum(jnp.arange(programs + 1, dtype=jnp.int32) * share, offsets[-1])
    idle = starts[:-1] == starts[1:]
    return Schedule(
        starts=starts,
        first_row=jnp.where(idle, 1, owner(offsets, starts[:-1])),
        last_row=jnp.where(idle, 0, owner(offsets, starts[1:] - 1)),
        offsets=offsets,
    )


def owner(starts: Array, blocks: Array) -> Array:
    """Whose blocks these are: the last that starts at or before each of them."""
    return jnp.searchsorted(starts, blocks, side="right", method="compare_all").astype(jnp.int32) - 1


def join(out: Array, top: Array, total: Array, plan: Schedule) -> tuple[Array, Array]:
    """Parts of rows and heads, by the program that made them, -> their normalised whole.

    Part r is of row and head r, by the program that began it. Part R + p is by program p, of the row that its share
    begins with, where another program began that.

    Args:
      out: [R + programs, Dv, N] float32 for R rows and heads, unnormalised; arbitrary where nobody wrote.
      top, total: Maximum (base 2) and sum of weights [R + programs, N] float32.

    Returns:
      out [R, N, Dv], lse [R, N].
    """
    rows, programs = plan.offsets.shape[0] - 1, plan.starts.shape[0] - 1
    begun = plan.offsets[1:] > plan.offsets[:-1]
    continues = (plan.starts[1:] > plan.starts[:-1]) & (plan.offsets[plan.first_row] < plan.starts[:-1])
    written = jnp.concatenate([begun, continues])[:, None]
    top, total = jnp.where(written, top, NEG), jnp.where(written, total, 0.0)
    out = jnp.where(written[..., None], out, 0.0)
    # First what continues the same row. By a product: additions in any order would not always yield the same.
    same = continues & continues[:, None] & (plan.first_row == plan.first_row[:, None])
    high = jnp.where(same[..., None], top[rows:], NEG).max(1)
    worth = jnp.exp2(top[rows:] - high)
    sums = lambda x: jnp.tensordot(same.astype(jnp.float32), x, 1, precision="highest")  # noqa: E731
    more = (sums(out[rows:] * worth[:, None]), high, sums(total[rows:] * worth))
    program = jnp.arange(programs, dtype=jnp.int32)
    leads = continues & ~(same & (program < program[:, None])).any(1)
    leader = jnp.full(rows, -1).at[jnp.where(leads, plan.first_row, rows)].set(program, mode="drop")
    split = (leader >= 0)[:, None]
    more_out, more_top, more_total = (x[leader] for x in more)
    highest = jnp.where(split, jnp.maximum(top[:rows], more_top), top[:rows])
    own, others = jnp.exp2(top[:rows] - highest), jnp.where(split, jnp.exp2(more_top - highest), 0.0)
    whole = total[:rows] * own + more_total * others
    joined = out[:rows] * own[:, None] + more_out * others[:, None]
    joined = jnp.swapaxes(joined, 1, 2) / jnp.maximum(whole, 1e-30)[..., None]
    return joined, jnp.where(whole > 0, highest / LOG2E + jnp.log(jnp.maximum(whole, 1e-30)), NEG)
