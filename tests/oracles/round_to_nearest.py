"""Plain round-to-nearest stores: int8, int4 and fp8, statistics per token and KV head, keys and values alike.

* int8: symmetric, one scale per token and head, absmax / 127 (absmax quantization, arXiv 2208.07339, section 2).
* int4: asymmetric, groups of 64 channels, zero = min, scale = (max - min) / 15 (as in FlexGen, arXiv 2303.06865).
* fp8: e4m3 without infinities (arXiv 2209.05433, table 1), one scale per token and head, absmax / 448.

Rounding is half to even everywhere. A token (group) of zeros has scale 0 and reads back as zeros.
"""

import numpy as np


def _groups(x: np.ndarray, group: int | None) -> np.ndarray:
    """[..., D] -> [..., D / group, group] in float64; all D channels make one group by default."""
    x = np.asarray(x, np.float64)
    size = x.shape[-1] if group is None else group
    if x.shape[-1] % size:
        raise ValueError(f"{x.shape[-1]} channels cannot be cut into groups of {size}")
    return x.reshape(*x.shape[:-1], -1, size)


def _nonzero(scale: np.ndarray) -> np.ndarray:
    return np.where(scale > 0, scale, 1.0)[..., None]


def quantize_symmetric(x: np.ndarray, bits: int = 8, group: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Codes in -(2^(bits-1) - 1) .. 2^(bits-1) - 1 (the most negative code is not used).

    Args:
      x: [Hk, T, D].

    Returns:
      Codes [Hk, T, D] of int8; scale [Hk, T, D / group].
    """
    groups, top = _groups(x, group), 2 ** (bits - 1) - 1
    scale = np.abs(groups).max(axis=-1) / top
    codes = np.clip(np.rint(groups / _nonzero(scale)), -top, top)
    return codes.reshape(np.shape(x)).astype(np.int8), scale


def dequantize_symmetric(codes: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """code * scale, [Hk, T, D]."""
    return (_groups(codes, codes.shape[-1] // scale.shape[-1]) * scale[..., None]).reshape(codes.shape)


def quantize_asymmetric(
    x: np.ndarray, bits: int = 4, group: int | None = 64
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes in 0 .. 2^bits - 1.

    Args:
      x: [Hk, T, D].

    Returns:
      Codes [Hk, T, D] of uint8; scale and zero [Hk, T, D / group].
    """
    groups, top = _groups(x, group), 2**bits - 1
    zero = groups.min(axis=-1)
    scale = (groups.max(axis=-1) - zero) / top
    codes = np.clip(np.rint((groups - zero[..., None]) / _nonzero(scale)), 0, top)
    return codes.reshape(np.shape(x)).astype(np.uint8), scale, zero


def dequantize_asymmetric(codes: np.ndarray, scale: np.ndarray, zero: np.ndarray) -> np.ndarray:
    """code * scale + zero, [Hk, T, D]."""
    groups = _groups(codes, codes.shape[-1] // scale.shape[-1])
    return (groups * scale[..., None] + zero[..., None]).reshape(codes.shape)


def e4m3_values() -> np.ndarray:
    """The 127 finite values >= 0, by bit pattern 0..126: 4 exponent bits (bias 7), 3 mantissa bits; the last is 448."""
    values = []
    for pattern in range(127):
        exponent, mantissa = pattern >> 3, pattern & 7
        values.append(mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))
    return np.array(values)


def round_e4m3(x: np.ndarray) -> np.ndarray:
    """Nearest e4m3 value, ties to the even mantissa; beyond 448 it saturates."""
    values = e4m3_values()
    magnitude = np.abs(np.asarray(x, np.float64))
    rounded = np.zeros_like(magnitude)
    for index in np.ndindex(magnitude.shape):
        above = min(int(np.searchsorted(values, magnitude[index])), 126)  # values[above - 1] < x <= values[above]
        below = max(above - 1, 0)
        up, down = values[above] - magnitude[index], magnitude[index] - values[below]
        rounded[index] = values[above] if up < down or (up == down and above % 2 == 0) else values[below]
        if magnitude[index] > values[126]:
            rounded[index] = values[126]
    return np.copysign(rounded, x)


def quantize_fp8(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """x [Hk, T, D] -> e4m3 values (as float64) [Hk, T, D], scale [Hk, T, 1] = absmax / 448."""
    x = np.asarray(x, np.float64)
    scale = np.abs(x).max(axis=-1, keepdims=True) / 448.0
    return round_e4m3(x / np.where(scale > 0, scale, 1.0)), scale


def dequantize_fp8(values: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """value * scale, [Hk, T, D]."""
    return values * scale
