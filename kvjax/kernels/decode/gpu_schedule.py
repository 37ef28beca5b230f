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
    begun = (plan.offsets[1:] > plan.offsets[:-1])[:, None]
    busy = plan.starts[1:] > plan.starts[:-1]
    heir = jnp.where(busy & (plan.offsets[plan.first_row] < plan.starts[:-1]), plan.first_row, rows)  # `rows`: of none.
    continues = (heir < rows)[:, None]
    own_top, own_total = jnp.where(begun, top[:rows], NEG), jnp.where(begun, total[:rows], 0.0)
    top, total = jnp.where(continues, top[rows:], NEG), jnp.where(continues, total[rows:], 0.0)

    # Programs that continue the same row follow one another: they are a group. They are added by a product, because
    # additions in any order would not always yield the same.
    leads = (heir < rows) & (heir != jnp.roll(heir, 1).at[0].set(rows))
    group = jnp.cumsum(leads, dtype=jnp.int32) - 1
    mine = (group == jnp.arange(min(rows, programs), dtype=jnp.int32)[:, None]) & (heir < rows)
    high = jnp.where(mine[..., None], top, NEG).max(1)
    worth = jnp.exp2(top - high[group])
    sums = lambda x: jnp.tensordot(mine.astype(jnp.float32), x, 1, precision="highest")  # noqa: E731
    more_total, more_out = sums(total * worth), sums(jnp.where(continues[..., None], out[rows:] * worth[:, None], 0.0))

    own_group = jnp.full(rows, -1).at[jnp.where(leads, heir, rows)].set(group, mode="drop")  # The group of each row.
    split = (own_group >= 0)[:, None]
    highest = jnp.where(split, jnp.maximum(own_top, high[own_group]), own_top)
    own, others = jnp.exp2(own_top - highest), jnp.where(split, jnp.exp2(high[own_group] - highest), 0.0)
    whole = own_total * own + more_total[own_group] * others
    joined = jnp.where(begun[..., None], out[:rows], 0.0) * own[:, None] + more_out[own_group] * others[:, None]
    joined = jnp.swapaxes(joined, 1, 2) / jnp.maximum(whole, 1e-30)[..., None]
    return joined, jnp.where(whole > 0, highest / LOG2E + jnp.log(jnp.maximum(whole, 1e-30)), NEG)
