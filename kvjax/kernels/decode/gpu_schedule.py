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

    A program writes the part of row and head r to slot `program + r`. Slots are unique, since both only ever grow.

    Args:
      out: [programs + R, Dv, N] float32 for R rows and heads, unnormalised; arbitrary where nobody wrote.
      top, total: Maximum (base 2) and sum of weights [programs + R, N] float32.

    Returns:
      out [R, N, Dv], lse [R, N].
    """
    row = jnp.arange(plan.offsets.shape[0] - 1, dtype=jnp.int32)
    begin, end = owner(plan.starts, plan.offsets[:-1]) + row, owner(plan.starts, plan.offsets[1:] - 1) + row
    slot = jnp.arange(out.shape[0], dtype=jnp.int32)
    mine = (
        (slot >= begin[:, None]) & (slot <= end[:, None]) & (plan.offsets[1:] > plan.offsets[:-1])[:, None]
    )  # [R, P + R]
    written = mine.any(0)[:, None]
    top, total = jnp.where(written, top, NEG), jnp.where(written, total, 0.0)
    highest = jnp.where(mine[..., None], top, NEG).max(1)
    # What a slot is worth to the whole; a product, because additions in any order would not always yield the same.
    worth = jnp.exp2(top - jnp.where(mine[..., None], highest[:, None], NEG).max(0))
    sums = lambda x: jnp.tensordot(mine.astype(jnp.float32), x, 1, precision="highest")  # noqa: E731
    whole = sums(total * worth)
    parts = jnp.where(written[..., None], out, 0.0) * worth[:, None]
    joined = jnp.swapaxes(sums(parts), 1, 2) / jnp.maximum(whole, 1e-30)[..., None]
    return joined, jnp.where(whole > 0, highest / LOG2E + jnp.log(jnp.maximum(whole, 1e-30)), NEG)
