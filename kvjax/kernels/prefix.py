"""Attention over prefixes that rows of a batch share (Hydragen, arXiv 2402.05099).

The queries of all rows that share a prefix become rows of one matrix product, so its keys and values are read once,
not once per row. Prefixes of prefixes form a tree, given level by level; a row's own tokens are a part like the others:

    part = prefix_attention(q, [system_prompts, documents], scale=scale)
    part = merge([part, decode_attention(q, k, v, lengths, scale=scale)])
"""

import dataclasses
import typing
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from kvjax.kernels.choose import Implementation, KernelError
from kvjax.kernels.decode import decode_attention
from kvjax.kernels.parts import NEG, Part, merge
from kvjax.kernels.vectors import Vectors


@typing.no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Prefixes:
    """P prefixes of one level of a tree; all their tokens come before the queries.

    Attributes:
      k, v: What is stored [P, H, S, D].
      lengths: Occupied slots of each prefix and head [P, H] int32.
      rows: Rows of the batch that share each prefix [P, R] int32, negative for padding. A row is in one prefix of a
        level at most.
    """

    k: Vectors
    v: Vectors
    lengths: Array
    rows: Array


def prefix_attention(
    q: Array,
    levels: Sequence[Prefixes],
    *,
    scale: float = 1.0,
    softcap: float = 0.0,
    q_pos: Array | None = None,
    implementation: Implementation = "auto",
    **options: Any,
) -> Part:
    """Attends to the prefixes of every row, each read once for all rows that share it.

    Args:
      q: Queries of T new tokens, rotated [B, H * G, T, D].
      levels: Of the tree, root first; one level if nothing but the first tokens is shared.
      scale: Multiplies the logits. softcap: `cap * tanh(logits / cap)`; 0 for none.
      q_pos: [B, T] int32, negative for padding, which attends to nothing. Default: no padding.
      implementation, **options: Of `decode_attention`.

    Returns:
      Output [B, H, G * T, D] float32 and log-sum-exp [B, H, G * T] over all levels, to be merged with the row's own
      tokens; a row without a prefix sees nothing.

    Raises:
      KernelError: No level is given, shapes do not go together, or the implementation cannot serve this.
    """
    if not levels:
        raise KernelError("There is no level of prefixes to attend to.")
    q_pos = jnp.zeros((q.shape[0], q.shape[2]), jnp.int32) if q_pos is None else q_pos
    return merge(
        [
            _level(q, q_pos, level, scale=scale, softcap=softcap, implementation=implementation, **options)
            for level in levels
        ]
    )


def _level(q: Array, q_pos: Array, level: Prefixes, **keywords: Any) -> Part:
    batch, heads, length, dim = q.shape
    number, width = level.rows.shape
    kv_heads = level.k.codes.shape[1]
    shared, index = level.rows >= 0, jnp.maximum(level.rows, 0)
    # [P, H * G, R * T, D]: queries of different rows are to a prefix what tokens of one row are.
    together = jnp.moveaxis(q[index], 1, 2).reshape(number, heads, width * length, dim)
    together_pos = jnp.where(shared[..., None], q_pos[index], -1).reshape(number, width * length)
    part = decode_attention(together, level.k, level.v, level.lengths, q_pos=together_pos, **keywords)

    # Where a row's answer is among the P * R; nowhere for a row without a prefix.
    target = jnp.where(shared, level.rows, batch).reshape(-1)
    source = jnp.full((batch,), -1, jnp.int32).at[target].set(jnp.arange(number * width), mode="drop")

    def back(x: Array, nothing: float) -> Array:
        """[P, H, G * R * T, ...] -> [B, H, G * T, ...]."""
        x = x.reshape(number, kv_heads, -1, width, length, *x.shape[3:])
        x = jnp.moveaxis(x, 3, 1).reshape(number * width, kv_heads, heads // kv_heads * length, *x.shape[5:])
        found = (source >= 0).reshape(batch, *[1] * (x.ndim - 1))
        return jnp.where(found, x[jnp.maximum(source, 0)], nothing)

    return Part(out=back(part.out, 0.0), lse=back(part.lse, NEG))
