"""Small integers in 32-bit words: 16 two-bit or 8 four-bit codes in one int32.

Codes are interleaved: word r holds codes `r * per ... r * per + per - 1`, low bits first (KIVI's order, and
the one that a bitcast to int2 / int4 unpacks on TPU).
"""

import jax.numpy as jnp
from jax import Array

WORD = 32


def codes_per_word(bits: int) -> int:
    """Codes in one word.

    Raises:
      ValueError: bits is not 2, 4 or 8.
    """
    if bits not in (2, 4, 8):
        raise ValueError(f"bits must be 2, 4 or 8, got {bits}.")
    return WORD // bits


def pack(codes: Array, bits: int, axis: int = -1) -> Array:
    """Unsigned codes below `2 ** bits` -> int32 words; `axis` shrinks by `32 // bits`, which must divide it."""
    per = codes_per_word(bits)
    axis %= codes.ndim
    if codes.shape[axis] % per:
        raise ValueError(f"Axis {axis} has {codes.shape[axis]} codes, not a multiple of {per} ({bits}-bit words).")
    shape = codes.shape[:axis] + (codes.shape[axis] // per, per) + codes.shape[axis + 1 :]
    shifts = (bits * jnp.arange(per, dtype=jnp.uint32)).reshape((per,) + (1,) * (codes.ndim - axis - 1))
    words = (codes.astype(jnp.uint32).reshape(shape) << shifts).sum(axis + 1, dtype=jnp.uint32)
    return words.astype(jnp.int32)


def unpack(words: Array, bits: int, axis: int = -1) -> Array:
    """int32 words -> int32 codes; the inverse of `pack`."""
    per = codes_per_word(bits)
    axis %= words.ndim
    shifts = (bits * jnp.arange(per, dtype=jnp.int32)).reshape((per,) + (1,) * (words.ndim - axis - 1))
    codes = (jnp.expand_dims(words, axis + 1) >> shifts) & (2**bits - 1)
    return codes.reshape(words.shape[:axis] + (words.shape[axis] * per,) + words.shape[axis + 1 :])


def round_to_nearest(x: Array, bits: int, group: int, axis: int, dtype=jnp.float16) -> tuple[Array, Array, Array]:
    """Asymmetric round-to-nearest in groups: `x ~ code * scale + zero`, with `zero` the group's minimum.

    Args:
      x: Float array.
      bits: Width of a code.
      group: Consecutive entries of `axis` that share a scale; must divide it.
      axis: The axis along which entries are grouped.
      dtype: Of scale and zero. Codes are found for the rounded values, so what is stored is consistent.

    Returns:
      codes uint8, shaped as x; scale and zero with `axis` shrunk by `group`. A constant group has scale 0.
    """
    axis %= x.ndim
    if x.shape[axis] % group:
        raise ValueError(f"Axis {axis} has {x.shape[axis]} entries, not a multiple of the group of {group}.")
    shape = x.shape[:axis] + (x.shape[axis] // group, group) + x.shape[axis + 1 :]
    grouped = x.astype(jnp.float32).reshape(shape)
    low = grouped.min(axis + 1, keepdims=True).astype(dtype)
    scale = ((grouped.max(axis + 1, keepdims=True) - low.astype(jnp.float32)) / (2**bits - 1)).astype(dtype)
    step = scale.astype(jnp.float32)
    codes = jnp.round((grouped - low.astype(jnp.float32)) / jnp.where(step > 0, step, 1.0))
    codes = jnp.clip(codes, 0, 2**bits - 1).astype(jnp.uint8).reshape(x.shape)
    return codes, scale.squeeze(axis + 1), low.squeeze(axis + 1)


def expand(grouped: Array, group: int, axis: int) -> Array:
    """Repeats every group's number for its `group` members along `axis`."""
    axis %= grouped.ndim
    shape = grouped.shape[: axis + 1] + (group,) + grouped.shape[axis + 1 :]
    wide = jnp.broadcast_to(jnp.expand_dims(grouped, axis + 1), shape)
    return wide.reshape(grouped.shape[:axis] + (grouped.shape[axis] * group,) + grouped.shape[axis + 1 :])
