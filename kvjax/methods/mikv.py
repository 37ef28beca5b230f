"""MiKV: no token is left behind, the unimportant ones only take fewer bits. Yang et al., 2024,
https://arxiv.org/abs/2402.18096

Dropping tokens loses what nothing else can bring back; a few bits of them keep most of it. H2O decides which tokens are
important and stay as they are; the others are rounded per token, in groups of half a head. While decoding, the token
that H2O would evict is demoted, for good (section 3.1). Outliers in a few channels of keys would spoil their groups:
each key channel is multiplied, and the query's divided, by b = sqrt(max |q| / max |k|), taken over the prompt and fixed
(section 3.2).

There is no code of the authors; this follows the paper. Open there, and decided here: a KV head of grouped queries has
one balancer, for the largest query of the group, and the sum of its queries' attention; only demoted keys are balanced;
a channel that is all zero is left alone; 3 bits do not pack evenly into words and are not offered.
"""

import dataclasses
from typing import Any, Literal

import jax.numpy as jnp
from jax import Array

from kvjax.cache import EMPTY, Balance, Demoting, Packed, Plain, Slots, Through
from kvjax.policies import Budget, Built, Evict, Needs, Phase, Policy, Prompt, Store, register
from kvjax.policies.score import AccumulatedAttention


@dataclasses.dataclass(frozen=True)
class TwoPrecisions(Store):
    """Tokens that a stage keeps as they are (or in more bits), the rest in fewer.

    Attributes:
      bits: Of the rest: 2, 4 or 8.
      kept_bits: Of the others: 16 for full precision, or 8, 4, 2.
      group: Channels that share scale and zero; 0 for half a head.
      balance: Whether keys of the rest are balanced.
      scale_dtype: Of scales and zeros.
    """

    bits: int = 2
    kept_bits: int = 16
    group: int = 0
    balance: bool = True
    scale_dtype: str = "float16"
    slotwise = True
    holds_rest = True

    @property
    def needs(self) -> Needs:
        return Needs(extremes=self.balance)

    def codec(self, bits: int, head_dim: int) -> Packed | Plain:
        return Plain() if bits == 16 else Packed(bits, self.group or head_dim // 2, self.scale_dtype)

    def build(self, prompt: Prompt, about: Built) -> Demoting:
        nothing = jnp.zeros((1, 1, 0), jnp.int32)
        rest = prompt.take(nothing, nothing > 0) if about.rest is None else about.rest
        lens = Balance(factor=self.factor(prompt, rest, about.obs.extremes if self.balance else None))
        high, low = (self.codec(bits, prompt.k.shape[-1]) for bits in (self.kept_bits, self.bits))
        inner = Slots(k=low.encode(lens.keys(rest.k)), v=low.encode(rest.v), pos=rest.pos, codec=low)
        kept = Slots(k=high.encode(prompt.k), v=high.encode(prompt.v), pos=prompt.pos, codec=high)
        return Demoting(low=Through(inner=inner, lens=lens), high=kept)

    def factor(self, kept: Prompt, rest: Prompt, queries: Array | None) -> Array:
        """The balancer [B, H, D] float32.

        Args:
          kept, rest: All tokens.
          queries: Largest magnitude of every query channel [B, H * G, D], or None for ones.
        """
        batch, heads, _, dim = kept.k.shape
        if queries is None:
            return jnp.ones((batch, heads, dim), jnp.float32)
        sizes = [
            jnp.where((x.pos != EMPTY)[..., None], jnp.abs(x.k.astype(jnp.float32)), 0.0).max(2, initial=0.0)
            for x in (kept, rest)
        ]
        keys, queries = jnp.maximum(*sizes), queries.reshape(batch, heads, -1, dim).max(2)
        known = (keys > 0) & (queries > 0)
        return jnp.sqrt(jnp.where(known, queries, 1.0) / jnp.where(known, keys, 1.0))

    def check(self, config: Any) -> None:
        if config.mla is not None:
            raise ValueError("keys alone are balanced, and latent attention has keys and values in one. Use full.")
        for bits in (self.bits, self.kept_bits):
            self.codec(bits, config.key_dim).check(config.key_dim)


@register(
    "No Token Left Behind: Reliable KV Cache Compression via Importance-Aware Mixed Precision Quantization",
    "https://arxiv.org/abs/2402.18096",
    important=0.2,
    small={"group": 16},
)
def mikv(
    important: Budget | int | float | str = 0.2,
    *,
    bits: int = 2,
    important_bits: Literal[16, 8, 4, 2] = 16,
    recent: int | float = 0.5,
    group: int = 0,
    balance: bool = True,
    scale_dtype: str = "float16",
) -> Policy:
    """Keeps every token: the important ones as they are, the others in few bits; demotes at every step.

    Args:
      important: Tokens per layer and head that are not demoted: a number, a share of the prompt (paper: 0.2), or as
        many as fit the bytes of the whole cache.
      bits: Of demoted tokens: 2, 4 or 8.
      important_bits: Of the others: 16 is the model's precision.
      recent: Part of the important tokens that are the newest: a share (as in H2O: half), or a number.
      group: Channels that share a scale and a zero; 0 for half a head.
      balance: Whether outlier channels of keys are balanced.
      scale_dtype: Of scales and zeros.
    """
    if isinstance(recent, float) and not 0 <= recent < 1:
        raise ValueError(f"recent is a share below 1 or a number of tokens, got {recent}.")
    if bits not in (2, 4, 8) or important_bits not in (2, 4, 8, 16):
        raise ValueError(f"bits are 2, 4 or 8, and important_bits may be 16 too; got {bits} and {important_bits}.")
    if important_bits <= bits:
        raise ValueError(f"important_bits={important_bits} must be more than bits={bits}: demoted tokens take fewer.")
    evict = Evict(
        score=AccumulatedAttention(), budget=Budget.of(important), recent=recent, phase=Phase("step"), floor=2
    )
    return Policy(stages=(evict,), store=TwoPrecisions(bits, important_bits, group, balance, scale_dtype))
