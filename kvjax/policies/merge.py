"""What becomes of tokens that do not fit: they may live on in those that stay."""

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array, lax

from kvjax.cache import EMPTY, Slots
from kvjax.cache.slots import take_slots
from kvjax.kernels import write
from kvjax.policies.observe import Prompt
from kvjax.policies.select import ordered
from kvjax.policies.stage import Rest
from kvjax.policies.store import Built

UNSET = -2.0  # A threshold that is not known yet: below every cosine.
BLOCK = 256  # Evicted tokens that are compared at once: bounds memory, changes no result.


@dataclasses.dataclass(frozen=True)
class Recall(Rest):
    """Merge a token into the most similar one that stays if it is similar enough, else forget it (D2O, section 3.3).

    Similarity is the cosine of keys. Each head merges into its own nearest token, but all heads together decide: the
    best similarity, averaged over them, must reach a threshold. That is the mean of the best similarities at the first
    eviction and their running mean from then on, one number per row and layer. Heads evict different tokens; they are
    put side by side in order of position.

    Attributes:
      alpha, beta: New threshold = alpha * old threshold + beta * mean of the best similarities.
      weights: "cosine": a token becomes the mean of itself and what is merged into it, each times its cosine.
        "softmax": weights exp(cosine), e for the token itself, divided by their sum. Values are weighted as the keys.
    """

    alpha: float = 0.5
    beta: float = 0.5
    weights: Literal["cosine", "softmax"] = "cosine"

    def __post_init__(self):
        if self.weights not in ("cosine", "softmax"):
            raise ValueError(f'weights is "cosine" or "softmax", got {self.weights!r}.')
        if self.alpha < 0 or self.beta < 0:
            raise ValueError(f"alpha and beta weigh two similarities: not negative; got {self.alpha}, {self.beta}.")

    def join(self, prompt: Prompt, kept: Prompt, about: Built) -> tuple[Prompt, Array]:
        del about
        batch, heads, length = prompt.pos.shape[0], kept.pos.shape[1], prompt.pos.shape[-1]
        pos = jnp.broadcast_to(prompt.pos, (batch, heads, length))
        gone, counts = ordered(jnp.arange(length), (pos != EMPTY) & ~among(pos, kept.pos), length)
        k_gone, v_gone = (take_slots(x, gone) for x in (prompt.k, prompt.v))
        similar, nearest = best(kept.k, kept.pos != EMPTY, k_gone)
        threshold = jnp.full((batch,), UNSET, jnp.float32)
        recalled, threshold = self._verdict(similar, jnp.broadcast_to(counts, similar.shape), threshold)
        k = self._mix(kept.k, k_gone, similar, nearest, recalled)
        v = self._mix(kept.v, v_gone, similar, nearest, recalled)
        return dataclasses.replace(kept, k=k, v=v), threshold

    def step(self, layer: Slots, slot: Array, where: Array) -> Slots:
        codec, stored = layer.codec, [layer.k] if layer.v is None else [layer.k, layer.v]
        gone = [codec.decode(x) for x in write.take(stored, slot[..., None])]
        stays = (layer.pos != EMPTY) & (jnp.arange(layer.capacity) != slot[..., None])
        similar, nearest = best(codec.decode(layer.k), stays, gone[0])
        recalled, threshold = self._verdict(similar, jnp.broadcast_to(where[..., None], similar.shape), layer.memo)

        def merged(x: Any, gone: Array) -> Any:
            return codec.encode(self._mix(codec.decode(x), gone, similar, jnp.zeros_like(nearest), recalled))

        mixed = [merged(x, other) for x, other in zip(write.take(stored, nearest), gone, strict=True)]
        k, *v = write.put(stored, jnp.where(recalled, nearest, layer.capacity), mixed)
        return dataclasses.replace(layer, k=k, v=v[0] if v else None, memo=threshold)

    def _verdict(self, similar: Array, counts: Array, threshold: Array) -> tuple[Array, Array]:
        """Which evicted tokens are merged [B, H, E], and the new threshold [B].

        Args:
          similar: Best cosine [B, H, E]. counts: Whether there is such a token [B, H, E]. threshold: Before, [B].
        """
        level = jnp.where(counts, similar, 0.0).sum(1) / jnp.maximum(counts.sum(1), 1)  # [B, E]
        number = counts.any(1).sum(-1)
        mean = level.sum(-1) / jnp.maximum(number, 1)
        moved = jnp.where(threshold == UNSET, mean, self.alpha * threshold + self.beta * mean)
        moved = jnp.where(number > 0, moved, threshold)
        return counts & (level >= moved[:, None])[:, None], moved

    def _mix(self, x: Array, gone: Array, similar: Array, nearest: Array, recalled: Array) -> Array:
        """x [B, H, S, D] with gone [B, H, E, D] merged into slots `nearest` [B, H, E] where `recalled` [B, H, E]."""
        own, weight, part = 1.0, similar, jnp.ones_like(similar)
        if self.weights == "softmax":
            own, weight = math.e, jnp.exp(similar)
            part = weight
        batch, heads, slots = x.shape[:3]
        slot = jnp.where(recalled, nearest, slots)  # Beyond the last: not added.
        index = jnp.arange(batch)[:, None, None], jnp.arange(heads)[None, :, None], slot
        total = (own * x.astype(jnp.float32)).at[index].add(weight[..., None] * gone, mode="drop")
        parts = jnp.full((batch, heads, slots), own, jnp.float32).at[index].add(part, mode="drop")
        return (total / parts[..., None]).astype(x.dtype)


def among(pos: Array, chosen: Array) -> Array:
    """Which positions [B, H, S] are among the chosen ones [B, H, N], which increase, `EMPTY` at the end."""
    chosen = jnp.where(chosen == EMPTY, jnp.iinfo(jnp.int32).max, chosen)
    place = jax.vmap(jax.vmap(jnp.searchsorted))(chosen, pos)
    return jnp.take_along_axis(chosen, jnp.minimum(place, chosen.shape[-1] - 1), -1) == pos


def best(k: Array, stays: Array, gone: Array) -> tuple[Array, Array]:
    """The most similar key of those that stay: its cosine [B, H, E] float32 and its slot [B, H, E] int32.

    Args:
      k: [B, H, S, D]. stays: Which of them count [B, 1 or H, S]. gone: Keys to compare with them [B, H, E, D].
    """
    k, gone = unit(k), unit(gone)

    def compare(some: Array) -> tuple[Array, Array]:
        cosine = jnp.einsum("bhed,bhsd->bhes", some, k)
        cosine = jnp.where(stays[:, :, None], cosine, -jnp.inf)
        return cosine.max(-1), cosine.argmax(-1).astype(jnp.int32)

    batch, heads, number, dim = gone.shape
    if number <= BLOCK:
        return compare(gone)
    blocks = jnp.pad(gone, ((0, 0), (0, 0), (0, -number % BLOCK), (0, 0))).reshape(batch, heads, -1, BLOCK, dim)
    cosine, slot = (jnp.moveaxis(x, 0, 2) for x in lax.map(compare, jnp.moveaxis(blocks, 2, 0)))
    return cosine.reshape(batch, heads, -1)[..., :number], slot.reshape(batch, heads, -1)[..., :number]


def unit(x: Array) -> Array:
    """x [..., D] divided by its norm, float32; zeros stay zeros."""
    x = x.astype(jnp.float32)
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
