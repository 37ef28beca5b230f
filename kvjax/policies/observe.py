"""What is seen of a prompt while its attention is computed: one layer's keys and values, and the statistics that scores
need.

An observation holds queries and positions, never an attention matrix: scores are taken against the tokens that are
  there when
the score is asked for, so a policy stays right after another has already evicted.
"""

import dataclasses
import typing

import jax
import jax.numpy as jnp
from jax import Array

from kvjax.cache import EMPTY, LayerSpec, Tokens
from kvjax.cache.slots import take_slots
from kvjax.kernels.attention import BLOCK, causal_attention


@dataclasses.dataclass(frozen=True)
class Needs:
    """Statistics of the queries that a score asks for.

    Attributes:
      window: Number of last queries.
      column_sums: Attention that every key receives, summed over all queries.
      moments: For each n in it, mean and covariance of unrotated queries from position n on.
    """

    window: int = 0
    column_sums: bool = False
    moments: tuple[int, ...] = ()

    def __or__(self, other: "Needs") -> "Needs":
        return Needs(
            max(self.window, other.window),
            self.column_sums or other.column_sums,
            tuple(sorted({*self.moments, *other.moments})),
        )


@typing.no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompt:
    """One layer's keys and values before they are laid out in a cache; eviction makes it smaller.

    Attributes:
      k, v: Rotated keys and values [B, H, S, D].
      pos: Positions [B, 1 or H, S] int32, increasing, `EMPTY` at the end of shorter rows.
      sums: Column sums [B, H, S] float32 (over the query heads of a group), or None.
    """

    k: Array
    v: Array
    pos: Array
    sums: Array | None = None

    def take(self, index: Array, valid: Array) -> "Prompt":
        """Slots index [B, 1 or H, N] where valid, the rest `EMPTY`."""
        return Prompt(
            k=take_slots(self.k, index),
            v=take_slots(self.v, index),
            pos=jnp.where(valid, take_slots(self.pos, index), EMPTY),
            sums=None if self.sums is None else take_slots(self.sums, index),
        )


@typing.no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Observation:
    """Statistics of one layer's queries.

    Attributes:
      q: The last W queries, rotated [B, H * G, W, D].
      q_pos: Their positions [B, W] int32; `EMPTY` in front where a row is shorter than W.
      moments: n -> mean [B, H * G, D] and covariance [B, H * G, D, D] of unrotated queries from position n on, float32.
      length: Tokens of each prompt [B] int32.
      layer: Index of the layer, a scalar int32.
    """

    q: Array
    q_pos: Array
    moments: dict[int, tuple[Array, Array]]
    length: Array
    layer: Array


def query_moments(q: Array, pos: Array, start: int) -> tuple[Array, Array]:
    """Mean [B, heads, D] and covariance [B, heads, D, D] (over N) of q [B, heads, T, D] from position start on."""
    q = q.astype(jnp.float32)
    weight = (pos >= start).astype(jnp.float32)[:, None, :, None]
    number = jnp.maximum(weight.sum(2), 1.0)
    mean = (q * weight).sum(2) / number
    centred = (q - mean[:, :, None]) * weight
    return mean, jnp.einsum("bhtd,bhte->bhde", centred, centred) / number[..., None]


def observe(
    spec: LayerSpec, new: Tokens, needs: Needs, layer: Array, block: int = BLOCK
) -> tuple[Array, Prompt, Observation]:
    """Attention of a whole prompt over itself, and what the policies asked to see.

    Args:
      spec, new: The layer and its tokens; positions are 0, 1, ... and `EMPTY` for padding at the end.
      needs: The statistics; cost nothing unless asked for.
      layer: Its index.
      block: Queries that attend at once; bounds memory, changes no result.

    Returns:
      Output [B, H * G, T, D], keys and values, statistics.
    """
    out, sums = causal_attention(
        new.q,
        new.k,
        new.v,
        new.pos,
        scale=spec.scale,
        window=spec.window,
        softcap=spec.softcap,
        column_sums=needs.column_sums,
        block=block,
    )
    length = (new.pos != EMPTY).sum(-1, dtype=jnp.int32)
    index = length[:, None] - needs.window + jnp.arange(needs.window, dtype=jnp.int32)
    if sums is not None:
        sums = sums.reshape(*new.k.shape[:2], -1, new.k.shape[2]).sum(2)
    observation = Observation(
        q=take_slots(new.q, jnp.maximum(index, 0)[:, None]),
        q_pos=jnp.where(index >= 0, index, EMPTY),
        moments={start: query_moments(new.q_raw, new.pos, start) for start in needs.moments},
        length=length,
        layer=layer,
    )
    return out, Prompt(k=new.k, v=new.v, pos=new.pos[:, None], sums=sums), observation
