"""Equal shares of a ragged batch.

As in LeanAttention (arXiv 2405.10480) the occupied blocks of all rows and heads form one list, of which every program
gets a contiguous share of the same size. So one long sequence fills the chip and a ragged batch is balanced.

What is here runs before every call, in as few operations as there can be: on a GPU each costs microseconds.
"""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

LOG2E = math.log2(math.e)


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Who reads what: a list of blocks, all rows and heads in a row, cut into equal shares.

    Attributes:
      offsets: Where the blocks of each row and head start in the list, and where the last ones end [B * H + 1] int32.
      first_row, last_row: Of each share, rows and heads in one axis [programs] int32; first > last where there is no
        work.
    """

    offsets: Array
    first_row: Array
    last_row: Array


def schedule(blocks: Array, programs: int) -> Schedule:
    """How many blocks each row and head has [B * H] int32 -> who reads which."""
    rows = blocks.shape[0]
    before = jnp.arange(rows) < jnp.arange(rows + 1)[:, None]
    offsets = jnp.where(before, blocks, 0).sum(1, dtype=jnp.int32)
    begin, end = bounds(offsets[-1], jnp.arange(programs, dtype=jnp.int32), programs)
    return Schedule(offsets=offsets, first_row=owner(offsets, begin), last_row=owner(offsets, end - 1))


def bounds(total: Any, program: Any, programs: int) -> tuple[Any, Any]:
    """Where the share of a program starts in a list of `total` blocks, and where it ends, int32."""
    begin = jnp.minimum(program * share_of(total, programs), total)
    return begin, jnp.minimum(begin + share_of(total, programs), total)


def share_of(total: Any, programs: int) -> Any:
    """Blocks of a program."""
    return jnp.maximum(lax.div(total + (programs - 1), jnp.int32(programs)), 1)


def owner(offsets: Array, blocks: Array) -> Array:
    """Whose blocks these are: the last that starts at or before each of them."""
    # Not `sum(initial=-1)`, which JAX before 0.12 takes for a sum from zero.
    return (offsets <= blocks[:, None]).sum(1, dtype=jnp.int32) - 1
