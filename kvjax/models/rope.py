"""Rotary position embedding: channel pairs of q and k turn by an angle proportional to the token's position.

A pair (channel c, channel c + rotary_dim / 2: the half-rotation layout of Llama and Hugging Face) turns by
`position * inverse_frequencies(rope)[c]`. Context extensions change the frequencies (`linear`, `llama3`, `yarn`,
`longrope`) and, for the last two, scale cos and sin by a constant. Formulas and float32 rounding follow transformers'
`modeling_rope_utils`, so that logits can be compared to the last digits.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.models.config import Rope


def inverse_frequencies(rope: Rope, *, long: bool = False) -> np.ndarray:
    """Radians per position of each channel pair that rotates, float32: [rotary_dim // 2] unless `stride` or `repeat`
    say otherwise.

    Args:
      rope: The embedding.
      long: For `longrope`, use the factors for sequences beyond `original_length`. Ignored by the other scalings.

    Raises:
      ValueError: The scaling is unknown.
    """
    return np.tile(_every_frequency(rope, long)[:: rope.stride], rope.repeat)


def _every_frequency(rope: Rope, long: bool) -> np.ndarray:
    match rope.scaling:
        case "none":
            return _unscaled(rope)
        case "linear":
            return _unscaled(rope) / np.float32(rope.factor)
        case "llama3":
            return _llama3(rope)
        case "yarn":
            return _yarn(rope)
        case "longrope":
            factors = np.asarray(rope.long_factor if long else rope.short_factor, np.float32)
            return np.float32(1) / (factors * _periods(rope))
        case _:
            raise ValueError(f"Unknown rope scaling {rope.scaling!r}; known: none, linear, llama3, yarn, longrope.")


def rope_tables(rope: Rope, positions: jax.Array, reach: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines for `apply_rope`.

    Longrope has two sets of frequencies. Which one is used is decided for every row of the batch by that row's length
    alone (transformers decides for the whole batch by its longest row), so that no answer depends on batch neighbours.

    Args:
      rope: The embedding.
      positions: Token positions, int32 [batch, length].
      reach: Only matters for `longrope`: the length, int32 [batch], that decides each row's frequencies; long factors
        if it exceeds `original_length`. Default: the row's largest position + 1. Pass it where `positions` does not
        show the whole row: for chunks of one prompt, or when decoding on keys that were rotated earlier.

    Returns:
      cos and sin, both float32 [batch, length, pairs], already multiplied by `rope.attention_factor`.
    """
    frequencies = jnp.asarray(inverse_frequencies(rope))
    if rope.scaling == "longrope":
        length = positions.max(axis=-1) + 1 if reach is None else reach
        long = jnp.asarray(inverse_frequencies(rope, long=True))
        frequencies = jnp.where((length > rope.original_length)[:, None, None], long, frequencies)  # [batch, 1, pairs]
    angles = positions.astype(jnp.float32)[..., None] * frequencies
    return jnp.cos(angles) * rope.attention_factor, jnp.sin(angles) * rope.attention_factor


def apply_rope(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates the leading `2 * cos.shape[-1]` channels of every head and passes the others through.

    Args:
      x: Queries or keys, [batch, heads, length, head_dim], any float dtype.
      cos, sin: From `rope_tables`, float32 [batch, length, pairs].

    Returns:
      The same shape and dtype as `x`; the arithmetic is float32.
    """
    pairs = cos.shape[-1]
    cos, sin = cos[:, None], sin[:, None]  # One angle for all heads.
    first, second, rest = jnp.split(x, (pairs, 2 * pairs), axis=-1)
    first32, second32 = first.astype(jnp.float32), second.astype(jnp.float32)
    rotated = (first32 * cos - second32 * sin, second32 * cos + first32 * sin)
    return jnp.concatenate([*(part.astype(x.dtype) for part in rotated), rest], axis=-1)


def _periods(rope: Rope) -> np.ndarray:
    """Positions per radian of each pair, before any scaling: float32 [rotary_dim // 2]."""
    exponents = np.arange(0, rope.rotary_dim, 2, dtype=np.float32) / np.float32(rope.rotary_dim)
    # NumPy's float32 power is often an ulp off; PyTorch's is nearly always correctly rounded, as this is.
    return np.power(rope.theta, exponents, dtype=np.float64).astype(np.float32)


def _unscaled(rope: Rope) -> np.ndarray:
    return np.float32(1) / _periods(rope)


def _llama3(rope: Rope) -> np.ndarray:
    """Long waves are stretched by `factor`, short ones kept, those between interpolated (Llama 3.1)."""
    frequencies = _unscaled(rope)
    # `number / tensor` is `number * (1 / tensor)` in PyTorch; the difference below cancels digits, so it shows.
    wavelengths = np.float32(2 * math.pi) * (np.float32(1) / frequencies)
    low, high = np.float32(rope.low_freq_factor), np.float32(rope.high_freq_factor)
    factor, length = np.float32(rope.factor), np.float32(rope.original_length)
    keep = (length * (np.float32(1) / wavelengths) - low) / (high - low)
    between = (1 - keep) * frequencies / factor + keep * frequencies
    stretched = np.where(wavelengths > length / low, frequencies / factor, between)
    return np.where(wavelengths < length / high, frequencies, stretched)


def _yarn(rope: Rope) -> np.ndarray:
    """Pairs that turn often within the original context are kept, those that turn rarely are stretched by `factor`."""

    def pair_turning(rotations: float) -> float:
        """The (fractional) pair that makes so many rotations within `original_length`."""
        period = rope.original_length / (rotations * 2 * math.pi)
        return rope.rotary_dim * math.log(period) / (2 * math.log(rope.theta))

    low, high = pair_turning(rope.beta_fast), pair_turning(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.rotary_dim - 1)
    if low == high:
        high += 0.001  # As transformers does; keeps the ramp finite.
    pairs = np.arange(rope.rotary_dim // 2, dtype=np.float32)
    keep = 1 - np.clip((pairs - np.float32(low)) / np.float32(high - low), 0, 1)
    periods = _periods(rope)
    return 1 / (np.float32(rope.factor) * periods) * (1 - keep) + 1 / periods * keep
