"""MiniCache: neighbouring layers share their directions. Liu et al., 2024, https://arxiv.org/abs/2405.14366

From the middle of the model on, keys and values of a token point to nearly the same direction in adjacent layers. Each
pair of layers keeps one direction per token, on the great circle between the two, and every layer its own magnitudes
(section 4.1, equations 2 and 3); tokens whose directions are most distinct are retained unmerged by both (section 4.2).
A decoded token attends with its own key and value and is merged then. Prefill attention is exact. `minicache | int4`
rounds the directions as the paper does for its 5x.

The authors have published no code. As in xKV's (`slerp_merge_rows_batch`): keys and values are merged and retained
apart, head by head; the range of angles is taken over all heads. Differs from xKV's: `gamma` is counted from the
largest angle down. (xKV takes the paper's `d < d_min + gamma (d_max - d_min)` for the angle: at 0.05 it retains the 2
most alike of 96 recorded tokens and merges the 94 others. Read the other way round, 94 would be retained.) The range is
that of one sequence, not of the batch; parallel vectors stay of unit length. Beyond both: at most `most` of a prompt's
tokens are retained in a head, the most distinct first, so that sizes are known before; decoded tokens are always
merged; only layers with full attention are paired, neighbours among themselves. Where sliding layers lie between these
(Gemma 3 has five) they are no neighbours in the model, directions hardly agree, and so the answers suffer.
"""

import dataclasses
import functools
from typing import Any

import jax

from kvjax.cache import Cache
from kvjax.cache.paired import make_pair, merge_new
from kvjax.policies import Policy, ReadAll, Slotwise, Transform, register

_make_pair = jax.jit(make_pair, static_argnames=("t", "gamma", "most", "codec"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class MergeLayers(Transform):
    """Pairs of full-attention layers share one direction per token.

    Attributes:
      start: The first layer that is merged: its number, or a share of all layers.
      t: Where merged directions lie between the lower layer's (0) and the upper one's (1).
      gamma: Tokens are distinct whose angles are less than this share of their range below the largest.
      most: Share of a prompt's tokens that are retained at most, in each head.
    """

    start: int | float = 0.5
    t: float = 0.6
    gamma: float = 0.05
    most: float = 0.05

    def pairs(self, layers: int) -> list[tuple[int, int]]:
        """(lower, upper) of all compressed layers; a last one without a partner stays alone."""
        first = self.start if isinstance(self.start, int) else int(self.start * layers)
        return [(i, i + 1) for i in range(first, layers - 1, 2)]

    def whole(self, layer: int, layers: int) -> bool:
        return any(layer in pair for pair in self.pairs(layers))

    def _pairs(self, cache: Cache) -> list[tuple[int, int]]:
        """The pairs of a cache, as indices of its layers."""
        full = cache.config.full_layers
        return [(full[a], full[b]) for a, b in self.pairs(len(full))]

    def apply(self, cache: Cache, store: Any) -> Cache:
        layers = list(cache.layers)
        for a, b in self._pairs(cache):
            pair = functools.partial(_make_pair, t=self.t, gamma=self.gamma, most=self.most, codec=store.codec)
            layers[a], layers[b] = pair(layers[a], layers[b])
        return dataclasses.replace(cache, layers=tuple(layers))

    def step(self, cache: Cache) -> Cache:
        layers = list(cache.layers)
        for a, b in self._pairs(cache):
            layers[a], layers[b] = merge_new(layers[a], layers[b], self.t)
        return dataclasses.replace(cache, layers=tuple(layers))

    def apart(self, cache: Cache) -> tuple[Any, ...]:
        layers = list(cache.layers)
        for a, b in self._pairs(cache):
            layers[b] = layers[b].with_store(layers[a].store)
        return tuple(layers)

    def fits(self, policy: Any) -> None:
        if policy.stages:
            raise ValueError(
                "layers that share a store must hold the same tokens, and a policy that evicts keeps others in every "
                "layer. Use one of the two."
            )
        if policy.read != ReadAll():
            raise ValueError("a store that layers share is read as a whole. Use one of the two.")
        if not isinstance(policy.layout, Slotwise):
            raise ValueError("tokens are merged one by one: store them with full, int8, int4, int2 or fp8.")

    def check(self, config: Any) -> None:
        layers = len(config.full_layers)
        if config.mla:
            raise ValueError(
                "latent attention keeps keys and values in one vector, which has no layer's own magnitude."
            )
        if not self.pairs(layers):
            raise ValueError(
                f"no two layers are left to merge: this model has {layers} full-attention layers, and start is "
                f"{self.start}. Start earlier."
            )


@register(
    "MiniCache: KV Cache Compression in Depth Dimension for Large Language Models",
    "https://arxiv.org/abs/2405.14366",
    small={"start": 0},
)
def minicache(*, start: int | float = 0.5, t: float = 0.6, gamma: float = 0.05, most: float = 0.05) -> Policy:
    """Merges the directions of keys and values of neighbouring layers, from the middle of the model on.

    Args:
      start: The first full-attention layer that is merged, as a number or as a share of all of them (paper: 0.5).
      t: Where merged directions lie between the lower layer's (0) and the upper one's (1); paper: 0.6.
      gamma: Retained are the tokens whose angle is within this share of the range of angles from the largest; paper:
        0.05. 0: none. (A threshold counted from the smallest angle up is `1 - gamma`.)
      most: Share of a prompt's tokens for which there is room among the retained, in each head.
    """
    if isinstance(start, bool) or start < 0 or (isinstance(start, float) and start >= 1):
        raise ValueError(f"start is the number of a layer, or a share of all layers below 1; got {start!r}.")
    for name, value in (("t", t), ("gamma", gamma), ("most", most)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name} is between 0 and 1, got {value}.")
    return Policy(transform=MergeLayers(start=start, t=t, gamma=gamma, most=most))
