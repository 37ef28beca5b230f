"""Which cached tokens will matter? Every score is a small value that maps a layer's tokens to numbers, higher is
better.

`score(prompt, obs, spec)` -> [B, 1 or H, S] float32, one row where all heads share a ranking; entries of empty slots
mean nothing. `needs` says which statistics it reads. A score that can be kept up while decoding also has `update(marks,
weights, new, pos)`: the slots' marks [B, 1 or H, S], a step's attention weights [B, H, G, T, S + T], the new tokens and
the slots' positions [B, 1 or H, S] -> marks [B, 1 or H, S + T].
"""

import dataclasses
from collections.abc import Callable
from typing import Literal, Protocol

import jax
import jax.numpy as jnp
from jax import Array, lax

from kvjax.cache import EMPTY, LayerSpec, Tokens
from kvjax.kernels.parts import dot_keys, fold, masked_softmax, visible
from kvjax.models.rope import apply_rope, rope_tables
from kvjax.policies.observe import Needs, Observation, Prompt, Tokenwise

Update = Callable[[Array, Array, Tokens, Array], Array]


class Score(Protocol):
    @property
    def needs(self) -> Needs: ...

    @property
    def update(self) -> Update | None: ...

    def __call__(self, prompt: Prompt, obs: Observation, spec: LayerSpec) -> Array: ...


def window_attention(prompt: Prompt, obs: Observation, spec: LayerSpec, window: int) -> Array:
    """Attention of the last `window` queries over the tokens that are left: [B, H, G, window, S] float32."""
    q, q_pos = obs.q[:, :, obs.q.shape[2] - window :], obs.q_pos[:, obs.q_pos.shape[1] - window :]
    batch, heads, slots = prompt.k.shape[:3]
    logits = dot_keys(fold(q * spec.scale, heads), prompt.k).reshape(batch, heads, -1, window, slots)
    mask = visible(q_pos[:, None], prompt.pos, spec.window)  # [B, 1 or H, window, S]
    return masked_softmax(logits, mask[:, :, None], spec.softcap)


def before_window(prompt: Prompt, obs: Observation, window: int) -> Array:
    """Which tokens come before an observation window of `window` queries: [B, 1 or H, S] bool."""
    return (prompt.pos < obs.length[:, None, None] - window) & (prompt.pos != EMPTY)


def pool(x: Array, width: int, kind: Literal["avg", "max"]) -> Array:
    """Pooling over the last axis, stride 1, padded with zeros that count in the average (as PyTorch's pools do)."""
    if width == 1:
        return x
    window, strides = (1,) * (x.ndim - 1) + (width,), (1,) * x.ndim
    if kind == "max":
        return lax.reduce_window(x, -jnp.inf, lax.max, window, strides, "SAME")
    return lax.reduce_window(x, 0.0, lax.add, window, strides, "SAME") / width


@dataclasses.dataclass(frozen=True)
class WindowAttention:
    """Mean attention from an observation window at the end of the prompt, pooled over neighbours (SnapKV).

    Attributes:
      window: Queries that vote. They are judged by recency alone: votes for tokens inside the window do not count.
      width, kind: Pooling of votes over neighbouring tokens, so that a detail keeps its surroundings.
      joined: Whether the query heads of a group are averaged before pooling (Ada-KV) instead of after; it matters to
        maxima alone.
    """

    window: int = 32
    width: int = 5
    kind: Literal["avg", "max"] = "avg"
    joined: bool = False
    update = None

    def __post_init__(self):
        if self.window < 1 or self.width < 1 or self.width % 2 == 0 or self.kind not in ("avg", "max"):
            raise ValueError(
                f"The window must be positive, the pool's width odd and its kind avg or max; got window={self.window}, "
                f"width={self.width}, kind={self.kind!r}."
            )

    @property
    def needs(self) -> Needs:
        return Needs(window=self.window)

    def __call__(self, prompt: Prompt, obs: Observation, spec: LayerSpec) -> Array:
        votes = window_attention(prompt, obs, spec, self.window).mean(3)
        before = before_window(prompt, obs, self.window)[:, :, None]
        votes = jnp.where(before, votes, 0.0)
        if self.joined:
            return pool(votes.mean(2), self.width, self.kind)
        return pool(votes, self.width, self.kind).mean(2)


@dataclasses.dataclass(frozen=True)
class SteadyAttention:
    """Mean attention from an observation window plus `gamma` times its variance over the window's queries, pooled over
    neighbours (CAKE, section 4.3): a token that matters now and then is worth keeping too.

    While decoding: attention of the newest query alone, pooled over neighbours.

    Attributes:
      window: Queries that vote, at least 2; their tokens are judged by recency alone.
      gamma: Weight of the variance (unbiased).
      width: Of the average over neighbours, odd.
      neighbours: Which tokens are neighbours while decoding: those next in "rank" by the step before, with which the
        authors' cache lies in order, or those next in the "text".
    """

    window: int = 32
    gamma: float = 200.0
    width: int = 5
    neighbours: Literal["rank", "text"] = "rank"

    def __post_init__(self):
        if self.window < 2 or self.width < 1 or self.width % 2 == 0:
            raise ValueError(
                "A variance needs a window of two queries at least, and the pool's width is odd; got "
                f"window={self.window}, width={self.width}."
            )
        if self.neighbours not in ("rank", "text"):
            raise ValueError(f'neighbours is "rank" or "text", got {self.neighbours!r}.')

    @property
    def needs(self) -> Needs:
        return Needs(window=self.window)

    def __call__(self, prompt: Prompt, obs: Observation, spec: LayerSpec) -> Array:
        votes = window_attention(prompt, obs, spec, self.window)
        votes = votes.mean(3) + self.gamma * votes.var(3, ddof=1)
        before = before_window(prompt, obs, self.window)[:, :, None]
        return pool(jnp.where(before, votes, 0.0), self.width, "avg").mean(2)

    def update(self, marks: Array, weights: Array, new: Tokens, pos: Array) -> Array:
        marks = jnp.pad(marks, ((0, 0), (0, 0), (0, new.pos.shape[1])))
        ahead = jnp.broadcast_to(new.pos[:, None], (*pos.shape[:2], new.pos.shape[1]))
        pos = jnp.concatenate([pos, ahead], -1)
        newest = pos.max((1, 2), keepdims=True)
        before = (pos != EMPTY) & (pos <= newest - self.window)
        # The token that leaves the window with this step has no rank yet: it comes last.
        ranks = jnp.where(pos == newest - self.window, jnp.inf, -marks) if self.neighbours == "rank" else pos
        order = jnp.lexsort((ranks, ~before))
        seen = jnp.where(before, weights[..., -1, :].mean(2), 0.0)
        pooled = pool(jnp.take_along_axis(seen, order, -1), self.width, "avg")
        pooled = jnp.take_along_axis(pooled, jnp.argsort(order, axis=-1), -1)
        return jnp.where(new.pos[:, -1:, None] == EMPTY, marks, pooled)  # Padding is no step.


@dataclasses.dataclass(frozen=True)
class LastAttention:
    """Attention of the last query, averaged over all heads: every head keeps the same tokens (TOVA).

    Where an eviction before has left the heads different tokens, a slot is not one token any more: each ranks its own.
    """

    @property
    def needs(self) -> Needs:
        return Needs(window=1)

    def __call__(self, prompt: Prompt, obs: Observation, spec: LayerSpec) -> Array:
        attention = window_attention(prompt, obs, spec, 1).mean((2, 3))
        return attention if prompt.pos.shape[1] > 1 else attention.mean(1, keepdims=True)

    def update(self, marks: Array, weights: Array, new: Tokens, pos: Array) -> Array:
        del new, pos
        attention = weights[..., -1, :].mean(2)
        return attention if marks.shape[1] > 1 else attention.mean(1, keepdims=True)


@dataclasses.dataclass(frozen=True)
class AccumulatedAttention:
    """Attention received from every query so far, summed: the heavy hitters (H2O).

    Attributes:
      normalized: Divide by the number of queries that could see the token (kvpress' ObservedAttention); at the end of
        the prompt only.
    """

    normalized: bool = False
    needs = Needs(column_sums=True)

    def __call__(self, prompt: Prompt, obs: Observation, spec: LayerSpec) -> Array:
        del spec
        assert prompt.sums is not None
        return prompt.sums / jnp.maximum(obs.length[:, None, None] - prompt.pos, 1) if self.normalized else prompt.sums

    def update(self, marks: Array, weights: Array, new: Tokens, pos: Array) -> Array:
        del new, pos
        received = weights.sum((2, 3))
        # Padded, not scattered: on a mesh a scatter would collect the marks of all slots on every device.
        return received + jnp.pad(marks, ((0, 0), (0, 0), (0, received.shape[-1] - marks.shape[-1])))


@dataclasses.dataclass(frozen=True)
class KeyNorm:
    """Small keys matter: minus the L2 norm of each key (Knorm)."""

    needs = Needs()

    def __call__(self, prompt: Prompt, obs: Observation, spec: LayerSpec) -> Array:
        del obs, spec
        return -jnp.linalg.norm(prompt.k.astype(jnp.float32), axis=-1)

    def update(self, marks: Array, weights: Array, new: Tokens, pos: Array) -> Array:
        del weights, pos
        return jnp.concatenate([marks, -jnp.linalg.norm(new.k.astype(jnp.float32), axis=-1)], -1)


@dataclasses.dataclass(frozen=True)
class KeyDifference:
    """Keys unlike the others matter: minus the cosine between a key and the mean of all unit keys (KeyDiff)."""

    needs = Needs()
    update = None

    def __call__(self, prompt: Prompt, obs: Observation, spec: LayerSpec) -> Array:
        del obs, spec
        k = prompt.k.astype(jnp.float32)
        unit = k / jnp.maximum(jnp.linalg.norm(k, axis=-1, keepdims=True), 1e-12)
        held = (prompt.pos != EMPTY)[..., None]
        anchor = (unit * held).sum(2) / jnp.maximum(held.sum(2), 1)
        anchor = anchor / jnp.maximum(jnp.linalg.norm(anchor, axis=-1, keepdims=True), 1e-12)
        return -jnp.einsum("bhsd,bhd->bhs", unit, anchor)


@dataclasses.dataclass(frozen=True)
class ExpectedAttention:
    """Attention that future queries are expected to pay, times the size of the value.

    Unrotated queries are taken as Gaussian; rotated to the average future position, `E exp(q k)` has a closed form.

    Attributes:
      future: Positions ahead over which the rotation is averaged, in tokens.
      sinks: First queries left out of the statistics, and first tokens left out of the normalization.
      covariance: Whether the second-order term counts.
      value_norm: Whether scores are multiplied by the norm of the value.
      epsilon: Added to the attention before that.
    """

    future: int = 512
    sinks: int = 4
    covariance: bool = True
    value_norm: bool = True
    epsilon: float = 0.0
    update = None

    @property
    def needs(self) -> Needs:
        return Needs(moments=(self.sinks,))

    def __call__(self, prompt: Prompt, obs: Observation, spec: LayerSpec) -> Array:
        mean, covariance = obs.moments[self.sinks]
        ahead = obs.length[:, None] + jnp.arange(self.future, dtype=jnp.int32)
        cos, sin = (table.mean(1, keepdims=True) for table in rope_tables(spec.rope, ahead))
        batch, heads, slots, dim = prompt.k.shape
        k = prompt.k.astype(jnp.float32)
        mu = apply_rope(mean[:, :, None], cos, sin) * spec.scale
        logits = jnp.einsum("bhgd,bhsd->bhgs", mu.reshape(batch, heads, -1, dim), k)
        if self.covariance:
            half = jnp.swapaxes(apply_rope(covariance, cos, sin), -1, -2)  # (R C)^T, C symmetric
            spread = apply_rope(half, cos, sin).reshape(batch, heads, -1, dim, dim) * spec.scale**2
            turned = jnp.einsum("bhsd,bhgde->bhgse", k, spread)
            logits += jnp.einsum("bhgse,bhse->bhgs", turned, k) / 2
        expected = masked_softmax(logits, (prompt.pos >= self.sinks)[:, :, None]).mean(2)
        if not self.value_norm:
            return expected
        return (expected + self.epsilon) * jnp.linalg.norm(prompt.v.astype(jnp.float32), axis=-1)


@dataclasses.dataclass(frozen=True)
class OfItself:
    """What is said of a token by itself, as it is projected: known at once and never again different (trained heads).

    Attributes:
      number: Says it.
    """

    number: Tokenwise

    @property
    def needs(self) -> Needs:
        return Needs(tokenwise=(self.number,))

    def __call__(self, prompt: Prompt, obs: Observation, spec: LayerSpec) -> Array:
        del obs, spec
        return prompt.tokenwise[self.number.name]

    def update(self, marks: Array, weights: Array, new: Tokens, pos: Array) -> Array:
        del weights, pos
        return jnp.concatenate([marks, self.number(new)], -1)


@dataclasses.dataclass(frozen=True)
class Chance:
    """Uniform noise: the floor of every table. The same for every row of a batch, new for every layer and head."""

    seed: int = 0
    needs = Needs()
    update = None

    def __call__(self, prompt: Prompt, obs: Observation, spec: LayerSpec) -> Array:
        del spec
        key = jax.random.fold_in(jax.random.key(self.seed), obs.layer)
        # By position, so that neither padding nor an earlier eviction changes a token's luck.
        heads = jax.random.split(key, prompt.k.shape[1])
        pos = jnp.broadcast_to(prompt.pos, prompt.k.shape[:3])
        draw = lambda key, pos: jax.random.uniform(jax.random.fold_in(key, pos))  # noqa: E731
        over_slots = jax.vmap(draw, (None, 0))
        return jax.vmap(jax.vmap(over_slots, (0, 0)), (None, 0))(heads, pos)
