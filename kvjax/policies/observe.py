"""What is seen of a prompt while its attention is computed: one layer's keys and values, and the statistics that scores
need.

An observation holds queries and positions, never an attention matrix: scores are taken against the tokens that are
there when the score is asked for, so a policy stays right after another has already evicted.
"""

import dataclasses
import typing
from typing import Protocol

import jax
import jax.numpy as jnp
from jax import Array

from kvjax.cache import EMPTY, LayerSpec, Tokens
from kvjax.cache.slots import take_slots
from kvjax.kernels import mesh
from kvjax.kernels.prefill import BLOCK, ColumnSums, Statistics, prefill_attention


class Tokenwise(Protocol):
    """A number for every token by itself, taken as it is projected; a hashable value."""

    @property
    def name(self) -> str: ...

    def __call__(self, new: Tokens) -> Array:
        """[B, 1 or H, T] float32."""
        ...


@dataclasses.dataclass(frozen=True)
class Needs:
    """What a policy asks to see of a prompt.

    Attributes:
      window: Number of last queries.
      column_sums: Attention that every key receives, summed over all queries.
      column_spread: How unevenly: variance over keys.
      moments: For each n in it, mean and covariance of unrotated queries from position n on.
      raw_keys: Keys before rotation.
      extremes: Largest magnitude of every query channel.
      tokenwise: Numbers that every token gets by itself.
    """

    window: int = 0
    column_sums: bool = False
    column_spread: bool = False
    moments: tuple[int, ...] = ()
    raw_keys: bool = False
    extremes: bool = False
    tokenwise: tuple[Tokenwise, ...] = ()

    def __or__(self, other: "Needs") -> "Needs":
        return Needs(
            max(self.window, other.window),
            self.column_sums or other.column_sums,
            self.column_spread or other.column_spread,
            tuple(sorted({*self.moments, *other.moments})),
            self.raw_keys or other.raw_keys,
            self.extremes or other.extremes,
            tuple(dict.fromkeys(self.tokenwise + other.tokenwise)),
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
      k_raw: Keys before rotation [B, H, S, D], or None.
      tokenwise: Name -> number of every token [B, 1 or H, S] float32.
      scores: Of a stage that decides its budget in several steps: taken once, of all tokens [B, 1 or H, S] float32.
    """

    k: Array
    v: Array
    pos: Array
    sums: Array | None = None
    k_raw: Array | None = None
    tokenwise: dict[str, Array] = dataclasses.field(default_factory=dict)
    scores: Array | None = None

    def take(self, index: Array, valid: Array) -> "Prompt":
        """Slots index [B, 1 or H, N] where valid, the rest `EMPTY`."""
        taken = jax.tree.map(lambda leaf: take_slots(leaf, index), self)
        return dataclasses.replace(taken, pos=jnp.where(valid, taken.pos, EMPTY))

    def first(self, length: int) -> "Prompt":
        """The first `length` slots, for prompts that are padded beyond; as many more as divide over a mesh."""
        length = mesh.even(length, 1)
        return jax.tree.map(lambda leaf: leaf[:, :, :length], self)


@typing.no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Observation:
    """Statistics of one layer's queries.

    Attributes:
      q: The last W queries, rotated [B, H * G, W, D].
      q_pos: Their positions [B, W] int32; `EMPTY` in front where a row is shorter than W.
      moments: n -> mean [B, H * G, D] and covariance [B, H * G, D, D] of unrotated queries from position n on, float32.
      extremes: Largest magnitude of every query channel [B, H * G, D] float32, or None.
      length: Tokens of each prompt [B] int32.
      layer: Index of the layer, a scalar int32.
      column_spread: Variance (unbiased) over keys of the attention that each receives from all queries [B, H * G]
        float32, or None.
    """

    q: Array
    q_pos: Array
    moments: dict[int, tuple[Array, Array]]
    length: Array
    layer: Array
    extremes: Array | None = None
    column_spread: Array | None = None


def query_moments(q: Array, pos: Array, start: int) -> tuple[Array, Array]:
    """Mean [B, heads, D] and covariance [B, heads, D, D] (over N) of q [B, heads, T, D] from position start on."""
    q = q.astype(jnp.float32)
    weight = (pos >= start).astype(jnp.float32)[:, None, :, None]
    number = jnp.maximum(weight.sum(2), 1.0)
    mean = (q * weight).sum(2) / number
    centred = (q - mean[:, :, None]) * weight
    return mean, jnp.einsum("bhtd,bhte->bhde", centred, centred) / number[..., None]


def column_spread(sums: Array, pos: Array) -> Array:
    """Variance (unbiased) of sums [B, heads, T] over the positions that are there: [B, heads] float32."""
    held = (pos != EMPTY)[:, None]
    number = held.sum(-1)
    mean = jnp.where(held, sums, 0.0).sum(-1) / jnp.maximum(number, 1)
    return jnp.where(held, (sums - mean[..., None]) ** 2, 0.0).sum(-1) / jnp.maximum(number - 1, 1)


def query_extremes(q: Array, pos: Array) -> Array:
    """Largest magnitude [B, heads, D] float32 of every channel of q [B, heads, T, D] at positions that are there."""
    return jnp.where((pos != EMPTY)[:, None, :, None], jnp.abs(q.astype(jnp.float32)), 0.0).max(2)


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
    summed = needs.column_sums or needs.column_spread
    seen = prefill_attention(
        new.q,
        new.k,
        new.v,
        new.pos,
        scale=spec.scale,
        window=spec.window,
        softcap=spec.softcap,
        statistics=Statistics(column_sums=(ColumnSums(),) if summed else ()),
        block=block,
    )
    return seen.out, *statistics(new, needs, layer, seen.column_sums[0] if summed else None)


def statistics(new: Tokens, needs: Needs, layer: Array, sums: Array | None) -> tuple[Prompt, Observation]:
    """What policies asked to see, once the attention is known.

    Args:
      new, needs, layer: As of `observe`.
      sums: Attention that every key receives [B, H * G, T] float32, if it is needed.
    """
    length = (new.pos != EMPTY).sum(-1, dtype=jnp.int32)
    index = length[:, None] - needs.window + jnp.arange(needs.window, dtype=jnp.int32)
    spread = column_spread(sums, new.pos) if needs.column_spread and sums is not None else None
    if sums is not None:
        sums = sums.reshape(*new.k.shape[:2], -1, new.k.shape[2]).sum(2)
    observation = Observation(
        q=take_slots(new.q, jnp.maximum(index, 0)[:, None]),
        q_pos=jnp.where(index >= 0, index, EMPTY),
        moments={start: query_moments(new.q_raw, new.pos, start) for start in needs.moments},
        length=length,
        layer=layer,
        extremes=query_extremes(new.q, new.pos) if needs.extremes else None,
        column_spread=spread,
    )
    prompt = Prompt(
        k=new.k,
        v=new.v,
        pos=new.pos[:, None],
        sums=sums if needs.column_sums else None,
        k_raw=new.k_raw if needs.raw_keys else None,
        tokenwise={number.name: number(new) for number in needs.tokenwise},
    )
    return prompt, observation
