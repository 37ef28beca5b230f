"""ThinK: key channels that queries barely use are not stored. Xu et al., 2024, https://arxiv.org/abs/2407.21018

A product of query and key is a sum over channels, and few channels carry it. The last `window` queries and the keys
that are kept score every channel by ||q_c|| ||k_c||; the lowest `ratio` of them are dropped from all keys but the
`whole` newest (section 3.2). Keys that come while decoding keep all their channels. It shrinks what another policy has
kept: `snapkv(0.5) | think(0.4)`.

Differs from the authors' code: a KV head's queries are averaged over their group (as in kvpress), so that a head stores
one set of channels (the code repeats keys to all query heads and stores each one's own). Channel numbers are stored,
not a mask of booleans, and no zeros are filled in: queries lose the same channels. The value variant is the paper's
appendix D, which the code does not have.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from kvjax.cache import EMPTY, Channels, Slots, Through, Tiers
from kvjax.policies import Built, Needs, Policy, Prompt, Store, register
from kvjax.policies.score import window_attention


@dataclasses.dataclass(frozen=True)
class FewerChannels(Store):
    """Old tokens without some of their channels, in each head others; the newest whole.

    Attributes:
      ratio: Share of key channels that are dropped.
      value_ratio: Share of value channels that are dropped.
      whole: Newest tokens of the prompt that keep all channels.
      window: Queries at the end of the prompt that score.
    """

    ratio: float = 0.4
    value_ratio: float = 0.0
    whole: int = 32
    window: int = 32

    @property
    def needs(self) -> Needs:
        return Needs(window=self.window)

    def build(self, prompt: Prompt, about: Built) -> Tiers:
        slots, dim = prompt.k.shape[2:]
        count = (prompt.pos != EMPTY).sum(-1, keepdims=True, dtype=jnp.int32)  # [B, 1 or H, 1]
        before = jnp.maximum(count - self.whole, 0)
        index = jnp.arange(max(slots - self.whole, 0), dtype=jnp.int32)[None, None]
        old = prompt.take(index, index < before)
        index = before + jnp.arange(min(self.whole, slots), dtype=jnp.int32)
        new = prompt.take(jnp.minimum(index, slots - 1), index < count)
        keys = Channels(index=best_channels(self.key_scores(prompt, about), self.ratio), dim=dim)
        values = None
        if int(dim * self.value_ratio):
            values = Channels(index=best_channels(self.value_scores(prompt, about), self.value_ratio), dim=dim)
        v = old.v if values is None else values.keys(old.v)
        thin = Through(inner=Slots(k=keys.keys(old.k), v=v, pos=old.pos), lens=keys, value_lens=values)
        return Tiers(tiers=(thin, Slots(k=new.k, v=new.v, pos=new.pos)))

    def check(self, config: Any) -> None:
        if config.mla is not None:
            raise ValueError(
                "latent attention keeps keys and values in one vector: values need the channels that keys could spare. "
                "Use a policy that keeps all of them."
            )

    def seen(self, about: Built) -> Array:
        """Which of the scoring queries are there [B, window]: a short prompt has fewer."""
        pos = about.obs.q_pos
        return pos[:, pos.shape[1] - self.window :] != EMPTY

    def key_scores(self, prompt: Prompt, about: Built) -> Array:
        """Mean square of every channel of the last queries, times that of the keys [B, H, D] float32."""
        batch, heads, _, dim = prompt.k.shape
        q = about.obs.q[:, :, about.obs.q.shape[2] - self.window :]
        queries = mean_square(q, self.seen(about)[:, None]).reshape(batch, heads, -1, dim).mean(2)
        return queries * mean_square(prompt.k, prompt.pos != EMPTY)

    def value_scores(self, prompt: Prompt, about: Built) -> Array:
        """Mean square of every channel of the last queries' outputs [B, H, D] float32."""
        weights = window_attention(prompt, about.obs, about.spec, self.window)
        out = jnp.einsum("bhgws,bhsd->bhgwd", weights, prompt.v.astype(jnp.float32))
        return mean_square(out, self.seen(about)[:, None, None]).mean(2)


def mean_square(x: Array, valid: Array) -> Array:
    """Of x [..., N, D] over the N that are valid [..., N]: [..., D] float32."""
    squares = jnp.where(valid[..., None], jnp.square(x.astype(jnp.float32)), 0.0)
    return squares.sum(-2) / jnp.maximum(valid.sum(-1), 1)[..., None]


def best_channels(scores: Array, ratio: float) -> Array:
    """Increasing numbers of all but the int(ratio * D) lowest of scores [B, H, D]; of equal ones the first stay."""
    dim = scores.shape[-1]
    return jnp.sort(lax.top_k(scores, dim - int(dim * ratio))[1], -1).astype(jnp.int32)


@register(
    "ThinK: Thinner Key Cache by Query-Driven Pruning",
    "https://arxiv.org/abs/2407.21018",
    small={"window": 4, "whole": 6},
)
def think(ratio: float = 0.4, *, values: float = 0.0, whole: int = 32, window: int = 32) -> Policy:
    """Drops the key channels that the last queries barely use; goes with a policy that evicts at the end of the prompt.

    Args:
      ratio: Share of key channels that are dropped, below 1 (paper: 0.4).
      values: Share of value channels that are dropped (paper's appendix D).
      whole: Newest tokens of the prompt that keep all channels (authors: 32).
      window: Queries at the end of the prompt that score channels.
    """
    if not (0 <= ratio < 1 and 0 <= values < 1):
        raise ValueError(f"Shares of channels are at least 0 and below 1, got ratio={ratio} and values={values}.")
    if whole < 0 or window < 1:
        raise ValueError(f"whole is not negative and window positive, got whole={whole} and window={window}.")
    return Policy(store=FewerChannels(ratio, values, whole, window))
