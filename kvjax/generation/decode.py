"""Decoding: one compiled loop, the cache donated, nothing returns to the host until it ends."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from kvjax.cache import Cache
from kvjax.generation.extend import hidden_states
from kvjax.generation.sample import Sampler, sample
from kvjax.models.config import Config
from kvjax.models.transformer import Params, unembed
from kvjax.policies.policy import Policy


def _is_stop(token: Array, stop: tuple[int, ...]) -> Array:
    return jnp.isin(token, jnp.asarray(stop, jnp.int32)) if stop else jnp.zeros(token.shape, bool)


@functools.partial(
    jax.jit,
    static_argnames=("config", "policy", "sampler", "max_new_tokens", "stop"),
    donate_argnames=("cache", "logits"),
)
def decode(
    params: Params,
    config: Config,
    policy: Policy,
    cache: Cache,
    logits: Array,
    key: Array,
    done: Array,
    *,
    sampler: Sampler = Sampler(),  # noqa: B008
    max_new_tokens: int,
    stop: tuple[int, ...] = (),
) -> tuple[Array, Array, Array, Array, Cache]:
    """Draws tokens until every row has stopped or `max_new_tokens` are drawn.

    Args:
      cache: With room for the new tokens. Donated: do not use it afterwards.
      logits: Of the next token [B, vocab]; donated.
      key: A `jax.random` key.
      done: Rows that have stopped already [B] bool.
      stop: Token ids that end a row; the stop token itself is part of the result, and is not fed to the cache.

    Returns:
      tokens [B, max_new_tokens] int32 (0 where nothing was drawn), how many each row has [B], the next logits [B,
      vocab], done [B], and the cache.
    """
    batch = logits.shape[0]

    def unfinished(state: Any) -> Array:
        step, _, _, done, *_ = state
        return (step < max_new_tokens) & ~done.all()

    def draw(state: Any) -> Any:
        step, tokens, count, done, logits, cache = state
        token = sample(logits, jax.random.fold_in(key, step), sampler)
        live = ~done
        tokens = tokens.at[:, step].set(jnp.where(live, token, 0))
        count, done = count + live, done | _is_stop(token, stop)
        x, cache = hidden_states(params, config, policy, cache, token[:, None], ~done[:, None])
        # The last token needs no logits, but a loop body has one shape; the vocabulary projection is skipped when all
        # is done.
        logits = lax.cond(done.all(), lambda x, old: old, lambda x, old: unembed(params, config, x[:, 0]), x, logits)
        return step + 1, tokens, count, done, logits, cache

    tokens, count = jnp.zeros((batch, max_new_tokens), jnp.int32), jnp.zeros((batch,), jnp.int32)
    state = (jnp.int32(0), tokens, count, done, logits, cache)
    _, tokens, count, done, logits, cache = lax.while_loop(unfinished, draw, state)
    return tokens, count, logits, done, cache
