"""What one call of decode attention asks for, checked and brought into one form that every implementation reads."""

import dataclasses
import typing

import jax
from jax import Array

from kvjax.kernels.vectors import Vectors, static


@typing.no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Tail:
    """R tokens in full precision that are attended in the same pass: a residual, and the new tokens themselves.

    Attributes:
      k, v: [B, H, R, D].
      pos: Positions [B, 1 or H, R] int32, negative where there is no token.
    """

    k: Array
    v: Array
    pos: Array


@typing.no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """Attention of T new tokens over S stored slots (and a tail).

    Rows are folded: row `g * T + t` of a KV head is query head g of its group, token t. A slot is visible where it is
    below the row's length and, if positions are given, where `0 <= pos <= q_pos` and `q_pos - pos < window`. The
    content of other slots is arbitrary, NaN included.

    Attributes:
      q: [B, H, N, D], N = G * T, already multiplied by the scale, in the type that products are taken in.
      k, v: S stored keys and values; v None: values are the last `latent` channels of the keys.
      lengths: Occupied slots of each row and head, a prefix [B, H] int32.
      q_pos: Positions of the new tokens [B, T] int32, negative for padding, which sees nothing.
      pos: Positions of the slots [B, 1 or H, S] int32, or None where all occupied slots are visible.
      bias: Added to the logits before the soft-cap [B, H, N, S] float32, or None.
      tail: More tokens, always masked by position, or None.
      window: Only keys with `q_pos - pos < window` are visible; 0 for all; needs `pos`.
      softcap: `cap * tanh(logits / cap)`; 0 for none.
      latent: See v.
      logits: Whether the result has the logits [B, H, N, S + R], `NEG` where masked.
    """

    q: Array
    k: Vectors
    v: Vectors | None
    lengths: Array
    q_pos: Array
    pos: Array | None = None
    bias: Array | None = None
    tail: Tail | None = None
    window: int = static(default=0)
    softcap: float = static(default=0.0)
    latent: int = static(default=0)
    logits: bool = static(default=False)

    @property
    def tokens(self) -> int:
        """T."""
        return self.q_pos.shape[1]

    @property
    def value_dim(self) -> int:
        return self.latent if self.v is None else self.v.dim
