"""How a key or a value is written in a slot. A codec treats every token alone, so slots can be moved and overwritten.

A codec is a small hashable value that encodes x [B, H, T, D] into `Vectors`, or into a plain array, with tokens on the
third axis of every leaf. How these are read is the kernels' business.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import Array

from kvjax.kernels.decode import xla
from kvjax.kernels.packing import codes_per_word, pack, round_to_nearest
from kvjax.kernels.vectors import Vectors, as_vectors


def pack_vectors(x: Array, bits: int, group: int, axis: int, scale_dtype: str) -> Vectors:
    """Rounds x [B, H, S, D] to codes, in groups along axis (-2 tokens, -1 channels), and packs them."""
    codes, scale, zero = round_to_nearest(x, bits, group, axis, jnp.dtype(scale_dtype))
    return Vectors(codes=pack(codes, bits), scale=scale, zero=zero, bits=bits)


class Codec:
    """Base of the codecs: what is encoded says by itself how it is read."""

    def encode(self, x: Array) -> Any:
        """x [B, H, T, D] -> `Vectors` or an array, [B, H, T, ...]."""
        raise NotImplementedError

    def decode(self, codes: Any) -> Array:
        """The stored vectors [B, H, S, D], float."""
        return as_vectors(codes).decode()

    def dot(self, q: Array, codes: Any) -> Array:
        """q [B, H, N, D] with every stored vector: [B, H, N, S] float32."""
        return xla.dot(q, as_vectors(codes))

    def mix(self, p: Array, codes: Any) -> Array:
        """Stored vectors weighted by p [B, H, N, S]: [B, H, N, D] float32."""
        return xla.mix(p, as_vectors(codes))

    def check(self, head_dim: int) -> None:
        """Raises ValueError where the codec cannot hold vectors of `head_dim` channels."""


@dataclasses.dataclass(frozen=True)
class Plain(Codec):
    """Floating point as it comes, or cast to `dtype` (a name such as "bfloat16")."""

    dtype: str | None = None

    def encode(self, x: Array) -> Array:
        return x if self.dtype is None else x.astype(self.dtype)

    def decode(self, codes: Array) -> Array:
        return codes


@dataclasses.dataclass(frozen=True)
class Scaled(Codec):
    """Eight-bit numbers with one float32 scale per token and head: `x ~ codes * scale`, scale = absmax / largest.

    `dtype` is "int8" (largest 127, rounded to nearest) or "float8_e4m3fn" (largest 448).
    """

    dtype: str = "int8"

    def encode(self, x: Array) -> Vectors:
        x = x.astype(jnp.float32)
        largest = 127.0 if self.dtype == "int8" else float(jnp.finfo(self.dtype).max)
        scale = jnp.abs(x).max(-1, keepdims=True) / largest
        codes = x / jnp.where(scale > 0, scale, 1.0)
        codes = jnp.round(codes) if self.dtype == "int8" else codes
        return Vectors(codes=codes.astype(self.dtype), scale=scale)


@dataclasses.dataclass(frozen=True)
class Packed(Codec):
    """2-, 4- or 8-bit asymmetric round-to-nearest, packed along channels: `x ~ code * scale + zero`.

    Every token has a scale and a zero for each `group` of channels, which isolates outlier channels; 0 is one group for
    the whole head.
    """

    bits: int = 4
    group: int = 64
    scale_dtype: str = "float16"

    def _group(self, head_dim: int) -> int:
        return min(self.group, head_dim) or head_dim

    def encode(self, x: Array) -> Vectors:
        return pack_vectors(x, self.bits, self._group(x.shape[-1]), -1, self.scale_dtype)

    def check(self, head_dim: int) -> None:
        per, group = codes_per_word(self.bits), self._group(head_dim)
        if head_dim % per or head_dim % group:
            raise ValueError(
                f"{self.bits}-bit codes in groups of {group} need a head_dim that is a multiple of {per} and of the "
                f"group; this model has {head_dim}."
            )
