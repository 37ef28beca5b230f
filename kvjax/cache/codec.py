"""How a key or a value is written in a slot. A codec treats every token alone, so slots can be moved and overwritten.

A codec is a small hashable value with four functions: `encode` x [B, H, T, D] into a pytree of arrays [B, H, T, ...],
`decode` it back, and the two products that attention needs, `dot` and `mix`, with scales folded in where that saves
work.
"""

import dataclasses
from typing import Any, Protocol

import jax.numpy as jnp
from jax import Array

from kvjax.kernels.packing import codes_per_word, expand, pack, round_to_nearest, unpack
from kvjax.kernels.parts import dot_keys, dot_values


class Codec(Protocol):
    def encode(self, x: Array) -> Any:
        """x [B, H, T, D] -> pytree of arrays [B, H, T, ...]."""
        ...

    def decode(self, codes: Any) -> Array:
        """The stored vectors [B, H, S, D], float."""
        ...

    def dot(self, q: Array, codes: Any) -> Array:
        """q [B, H, N, D] with every stored vector: [B, H, N, S] float32."""
        ...

    def mix(self, p: Array, codes: Any) -> Array:
        """Stored vectors weighted by p [B, H, N, S]: [B, H, N, D] float32."""
        ...

    def check(self, head_dim: int) -> None:
        """Raises ValueError where the codec cannot hold vectors of `head_dim` channels."""
        ...


@dataclasses.dataclass(frozen=True)
class Plain:
    """Floating point as it comes, or cast to `dtype` (a name such as "bfloat16")."""

    dtype: str | None = None

    def encode(self, x: Array) -> Array:
        return x if self.dtype is None else x.astype(self.dtype)

    def decode(self, codes: Array) -> Array:
        return codes

    def dot(self, q: Array, codes: Array) -> Array:
        return dot_keys(q, codes.astype(q.dtype))

    def mix(self, p: Array, codes: Array) -> Array:
        return dot_values(p, codes.astype(jnp.promote_types(codes.dtype, jnp.bfloat16)))

    def check(self, head_dim: int) -> None:
        del head_dim


@dataclasses.dataclass(frozen=True)
class Scaled:
    """Eight-bit numbers with one float32 scale per token and head: `x ~ codes * scale`, scale = absmax / largest.

    `dtype` is "int8" (largest 127, rounded to nearest) or "float8_e4m3fn" (largest 448).
    """

    dtype: str = "int8"

    def encode(self, x: Array) -> dict[str, Array]:
        x = x.astype(jnp.float32)
        largest = 127.0 if self.dtype == "int8" else float(jnp.finfo(self.dtype).max)
        scale = jnp.abs(x).max(-1, keepdims=True) / largest
        codes = x / jnp.where(scale > 0, scale, 1.0)
        codes = jnp.round(codes) if self.dtype == "int8" else codes
        return {"codes": codes.astype(self.dtype), "scale": scale}

    def decode(self, codes: dict[str, Array]) -> Array:
        return codes["codes"].astype(jnp.float32) * codes["scale"]

    def dot(self, q: Array, codes: dict[str, Array]) -> Array:
        return dot_keys(q, codes["codes"].astype(q.dtype)) * jnp.swapaxes(codes["scale"], -1, -2)

    def mix(self, p: Array, codes: dict[str, Array]) -> Array:
        return dot_values(p * jnp.swapaxes(codes["scale"], -1, -2), codes["codes"].astype(p.dtype))

    def check(self, head_dim: int) -> None:
        del head_dim


@dataclasses.dataclass(frozen=True)
class Packed:
    """2-, 4- or 8-bit asymmetric round-to-nearest, packed along channels: `x ~ code * scale + zero`.

    Every token has a scale and a zero for each `group` of channels, which isolates outlier channels; 0 is one group for
    the whole head.
    """

    bits: int = 4
    group: int = 64
    scale_dtype: str = "float16"

    def _group(self, head_dim: int) -> int:
        return min(self.group, head_dim) or head_dim

    def encode(self, x: Array) -> dict[str, Array]:
        codes, scale, zero = round_to_nearest(x, self.bits, self._group(x.shape[-1]), -1, jnp.dtype(self.scale_dtype))
        return {"words": pack(codes, self.bits), "scale": scale, "zero": zero}

    def decode(self, codes: dict[str, Array]) -> Array:
        numbers = unpack(codes["words"], self.bits).astype(jnp.float32)
        group = numbers.shape[-1] // codes["scale"].shape[-1]
        scale, zero = (expand(codes[name].astype(jnp.float32), group, -1) for name in ("scale", "zero"))
        return numbers * scale + zero

    def dot(self, q: Array, codes: dict[str, Array]) -> Array:
        return dot_keys(q, self.decode(codes).astype(q.dtype))

    def mix(self, p: Array, codes: dict[str, Array]) -> Array:
        return dot_values(p, self.decode(codes))

    def check(self, head_dim: int) -> None:
        per, group = codes_per_word(self.bits), self._group(head_dim)
        if head_dim % per or head_dim % group:
            raise ValueError(
                f"{self.bits}-bit codes in groups of {group} need a head_dim that is a multiple of {per} and of the "
                f"group; this model has {head_dim}."
            )
