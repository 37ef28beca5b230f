"""How keys and values may be stored for the kernels to read: one definition for all devices.

A cache that is saved on one device loads on another, because nothing in it depends on who reads it: codes are
interleaved in 32-bit words along channels, and every array has its tokens on the third axis. The physical order of
axes is XLA's choice: on TPUs it puts the tokens on lanes where there are fewer than 128 channels or words, which is
what the kernels there expect.
"""

import dataclasses
import typing
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from kvjax.kernels.packing import expand, unpack


def static(**kwargs: Any) -> Any:
    """A dataclass field that is part of the program, not of the data: it is hashed, never traced."""
    return dataclasses.field(metadata={"static": True}, **kwargs)


@typing.no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Vectors:
    """S vectors of D channels for every KV head, as they are stored: `x ~ code * scale + zero`.

    Attributes:
      codes: Floats, int8 or float8 [B, H, S, D]; with `bits`, int32 words of unsigned codes [B, H, S, D * bits / 32],
        word r holding channels `r * 32 / bits ...`, low bits first.
      scale, zero: [B, H or 1, S / tokens, D / channels] float, one for so many tokens and channels; None: 1 and 0.
      bits: 2, 4 or 8 where codes are packed; 0 where they are numbers of their own.
    """

    codes: Array
    scale: Array | None = None
    zero: Array | None = None
    bits: int = static(default=0)

    @property
    def slots(self) -> int:
        return self.codes.shape[2]

    @property
    def dim(self) -> int:
        return self.codes.shape[3] * (32 // self.bits if self.bits else 1)

    @property
    def group(self) -> tuple[int, int]:
        """Tokens and channels that share a scale; (1, 1) where there is none."""
        if self.scale is None or not self.slots:
            return 1, 1
        return self.slots // self.scale.shape[2], self.dim // self.scale.shape[3]

    @property
    def nbytes_per_slot(self) -> float:
        """Bytes that one slot of one head takes, its share of scales included."""
        leaves = jax.tree.leaves(self)
        return sum(x.size * x.dtype.itemsize / (x.shape[0] * x.shape[1]) for x in leaves) / self.slots

    def decode(self) -> Array:
        """[B, H, S, D] float32."""
        x = (unpack(self.codes, self.bits) if self.bits else self.codes).astype(jnp.float32)
        tokens, channels = self.group
        wide = lambda a: expand(expand(a.astype(jnp.float32), channels, -1), tokens, -2)  # noqa: E731
        x = x if self.scale is None else x * wide(self.scale)
        return x if self.zero is None else x + wide(self.zero)

    def at(self, batch: Array, head: Array, slot: Array, channel: Array) -> Array:
        """Single numbers at coordinates that broadcast against one another, float32; those out of range are clipped."""
        per = 32 // self.bits if self.bits else 1
        codes = self.codes.at[batch, head, slot, channel // per].get(mode="clip")
        codes = (codes >> self.bits * (channel % per)) & (2**self.bits - 1) if self.bits else codes
        tokens, channels = self.group

        def shared(x: Array) -> Array:
            place = (batch, head % x.shape[1], slot // tokens, channel // channels)
            return x.at[place].get(mode="clip").astype(jnp.float32)

        x = codes.astype(jnp.float32)
        x = x if self.scale is None else x * shared(self.scale)
        return x if self.zero is None else x + shared(self.zero)

    def block(self, start: Array | int, size: int) -> "Vectors":
        """Slots `start ... start + size`, both multiples of the tokens of a group."""

        def cut(leaf: Array) -> Array:
            tokens = self.slots // leaf.shape[2]
            return lax.dynamic_slice_in_dim(leaf, start // tokens, size // tokens, 2)

        return jax.tree.map(cut, self)

    def take(self, index: Array) -> "Vectors":
        """Slots index [B, H, N] in that order; groups must not span tokens."""
        if self.group[0] != 1:
            raise ValueError(f"{self.group[0]} tokens share a scale: single slots cannot be taken.")

        def pick(leaf: Array) -> Array:
            wide = jnp.broadcast_to(leaf, (*index.shape[:2], *leaf.shape[2:]))
            return jnp.take_along_axis(wide, index[..., None], axis=2)

        return jax.tree.map(pick, self)


def as_vectors(x: Array | Vectors) -> Vectors:
    """Plain arrays are vectors without a code."""
    return x if isinstance(x, Vectors) else Vectors(codes=x)
