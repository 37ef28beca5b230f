"""KIVI (arXiv 2402.02750, algorithm 1): keys per channel, values per token, a full-precision residual.

Round to nearest, asymmetric (equation 1): zero = min, scale = (max - min) / (2^bits - 1), code = round((x - zero) /
scale), half to even. Keys: a group is `group` consecutive tokens of one channel. Values: `group` consecutive channels
of one token.

After n tokens, whatever of them was prompt, the authors' cache holds floor(n / R) * R quantized keys and max(0, n - R)
quantized values, the newer ones in full. Quantization follows a step's attention: the query of token t reads the cache
after t tokens, and its own key and value in full. The prompt itself is attended to in full precision.
"""

from typing import NamedTuple

import numpy as np

from tests.oracles.attention import attention


class Quantized(NamedTuple):
    """Codes [..., T, D] of uint8; `scale` and `zero` with one entry per group in place of the grouped axis."""

    codes: np.ndarray
    scale: np.ndarray
    zero: np.ndarray


def quantize(x: np.ndarray, bits: int, group: int, axis: int, stats_dtype: np.dtype | type = np.float64) -> Quantized:
    """Quantizes x [..., T, D] in groups along `axis` (-2: tokens, for keys; -1: channels, for values).

    Args:
      stats_dtype: Scale and zero are rounded to it, then codes are computed. A constant group has scale 0, codes 0.
    """
    x = np.moveaxis(np.asarray(x, np.float64), axis, -1)
    if x.shape[-1] % group:
        raise ValueError(f"{x.shape[-1]} values cannot be cut into groups of {group}")
    groups = x.reshape(*x.shape[:-1], x.shape[-1] // group, group)  # Not -1: there may be none.
    zero = groups.min(axis=-1).astype(stats_dtype).astype(np.float64)
    scale = ((groups.max(axis=-1) - groups.min(axis=-1)) / (2**bits - 1)).astype(stats_dtype).astype(np.float64)
    divisor = np.where(scale > 0, scale, 1.0)[..., None]
    codes = np.clip(np.rint((groups - zero[..., None]) / divisor), 0, 2**bits - 1).astype(np.uint8).reshape(x.shape)
    return Quantized(np.moveaxis(codes, -1, axis), np.moveaxis(scale, -1, axis), np.moveaxis(zero, -1, axis))


def dequantize(x: Quantized, group: int, axis: int) -> np.ndarray:
    """code * scale + zero, [..., T, D]."""
    return x.codes * np.repeat(x.scale, group, axis=axis) + np.repeat(x.zero, group, axis=axis)


def quantize_keys(k: np.ndarray, bits: int = 2, group: int = 32, **options) -> Quantized:
    """k [Hk, T, D], T a multiple of `group`; scale, zero [Hk, T / group, D]."""
    return quantize(k, bits, group, -2, **options)


def quantize_values(v: np.ndarray, bits: int = 2, group: int = 32, **options) -> Quantized:
    """v [Hk, T, D], D a multiple of `group`; scale, zero [Hk, T, D / group]."""
    return quantize(v, bits, group, -1, **options)


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Packs codes [..., T, D] along tokens into int32 [..., T * bits / 32, D]; token j of a word is at bit j * bits."""
    per_word = 32 // bits
    words = np.zeros((*codes.shape[:-2], codes.shape[-2] // per_word, codes.shape[-1]), np.uint32)
    for j in range(per_word):
        words |= codes[..., j::per_word, :].astype(np.uint32) << np.uint32(j * bits)
    return words.view(np.int32)


def quantized_lengths(n: int, residual: int) -> tuple[int, int]:
    """How many keys and how many values of n cached tokens are quantized."""
    return n // residual * residual, max(0, n - residual)


def kivi_cache(
    k: np.ndarray, v: np.ndarray, *, bits: int = 2, group: int = 32, residual: int = 32, **options
) -> tuple[np.ndarray, np.ndarray]:
    """Keys and values [Hk, n, D] read back from a cache that holds all n tokens of k, v; `group` divides `residual`."""
    num_keys, num_values = quantized_lengths(k.shape[1], residual)
    keys, values = np.array(k, np.float64), np.array(v, np.float64)
    keys[:, :num_keys] = dequantize(quantize_keys(keys[:, :num_keys], bits, group, **options), group, -2)
    values[:, :num_values] = dequantize(quantize_values(values[:, :num_values], bits, group, **options), group, -1)
    return keys, values


def kivi_decode(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    *,
    prompt: int,
    bits: int = 2,
    group: int = 32,
    residual: int = 32,
    scale: float | None = None,
) -> np.ndarray:
    """Attention outputs [H, T - prompt, D] of tokens prompt..T-1, decoded one by one.

    Args:
      q: [H, T, D], k, v: [Hk, T, D], rotated.
    """
    outputs = []
    for t in range(prompt, q.shape[1]):
        keys, values = kivi_cache(k[:, :t], v[:, :t], bits=bits, group=group, residual=residual)
        keys = np.concatenate([keys, k[:, t : t + 1]], axis=1)
        values = np.concatenate([values, v[:, t : t + 1]], axis=1)
        outputs.append(attention(q[:, t : t + 1], keys, values, scale=scale)[:, 0])
    return np.stack(outputs, axis=1)
