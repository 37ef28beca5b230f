"""What one call of paged attention asks for."""

import dataclasses
import typing

import jax
from jax import Array

from kvjax.kernels.vectors import Vectors, static


@typing.no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class PagedRequest:
    """Attention of query heads that read the pages which a table names, each its own.

    Pages of P slots lie in one of two ways. As slices of a KV head's S slots: page n of keys [B, Hk, S, D] is slots
    `n * P ... n * P + P`, and query head h reads KV head `h * Hk // Hq`. Or in a pool [B, pages, P, D], whose pages
    any head may read.

    Rows of a head are folded: row `g * T + t` is query g of those that share a table, token t.

    Attributes:
      q: [B, Hq, N, D], N = G * T, already multiplied by the scale, in the type that products are taken in.
      k, v: Stored keys and values [B, Hk, S, D], or [B, pages, P, D] with `pool`.
      table: Page numbers [B, Hq, M] int32; none comes twice, and those that do not exist are skipped.
      count: How many of them are used, a prefix [B, Hq] int32.
      lengths: Occupied slots, a prefix: of each KV head [B, Hk] int32, or of each page [B, pages] with `pool`.
      q_pos: Positions of the new tokens [B, T] int32, negative for padding, which sees nothing.
      pos: Positions of the slots [B, Hk, S], or [B, pages, P], int32; None where all occupied slots are visible.
      page: P.
      pool: See above.
      window: Only keys with `q_pos - pos < window` are visible; 0 for all; needs `pos`.
      softcap: `cap * tanh(logits / cap)`; 0 for none.
    """

    q: Array
    k: Vectors
    v: Vectors
    table: Array
    count: Array
    lengths: Array
    q_pos: Array
    pos: Array | None = None
    page: int = static()
    pool: bool = static(default=False)
    window: int = static(default=0)
    softcap: float = static(default=0.0)

    @property
    def tokens(self) -> int:
        """T."""
        return self.q_pos.shape[1]

    @property
    def pages(self) -> int:
        """Pages that a head can read."""
        return self.k.codes.shape[1] if self.pool else -(-self.k.slots // self.page)

    @property
    def share(self) -> int:
        """Query heads of a KV head."""
        return 1 if self.pool else self.q.shape[1] // self.k.codes.shape[1]
