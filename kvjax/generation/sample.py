"""From logits to a token: greedy, temperature, top-k, top-p (arXiv 1904.09751) and min-p (arXiv 2407.01082)."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampler:
    """How the next token is drawn; a static argument.

    Attributes:
      temperature: Divides the logits; 0 takes the likeliest token (greedy), and the rest does not matter.
      top_k: Only the k likeliest; 0: all.
      top_p: Only the smallest set of likeliest tokens whose probability reaches p.
      min_p: Only tokens at least `min_p` times as likely as the likeliest.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self):
        if self.temperature < 0:
            raise ValueError(f"temperature must be 0 (greedy) or positive, got {self.temperature}.")
        if self.top_k < 0:
            raise ValueError(f"top_k must be 0 (all) or positive, got {self.top_k}.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}.")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p must be between 0 and 1, got {self.min_p}.")


def filter_logits(logits: Array, sampler: Sampler) -> Array:
    """Logits [..., vocab] at the sampler's temperature, -inf for what it rules out. The likeliest always stays."""
    logits = logits / sampler.temperature
    if sampler.top_k and sampler.top_k < logits.shape[-1]:
        least = jax.lax.top_k(logits, sampler.top_k)[0][..., -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if sampler.min_p > 0:
        likeliest = logits.max(-1, keepdims=True)
        logits = jnp.where(logits < likeliest + jnp.log(sampler.min_p), -jnp.inf, logits)
    if sampler.top_p < 1:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        mass = jnp.cumsum(jax.nn.softmax(ordered, axis=-1), axis=-1)
        # A token stays while those before it do not reach p together.
        inside = jnp.concatenate([jnp.ones_like(mass[..., :1], bool), mass[..., :-1] < sampler.top_p], -1)
        least = jnp.where(inside, ordered, jnp.inf).min(-1, keepdims=True)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return logits


def sample(logits: Array, key: Array, sampler: Sampler) -> Array:
    """Token ids [...] int32 from logits [..., vocab]; greedy ignores the key."""
    if sampler.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return jax.random.categorical(key, filter_logits(logits, sampler)).astype(jnp.int32)
