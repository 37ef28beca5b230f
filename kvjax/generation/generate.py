"""Whole generations: prefill or extend, then decode."""

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax import Array

from kvjax.cache import Cache
from kvjax.generation.decode import decode
from kvjax.generation.extend import extend, with_room
from kvjax.generation.prefill import prefill_logits
from kvjax.generation.sample import Sampler
from kvjax.models.config import Config
from kvjax.models.transformer import Params
from kvjax.policies.policy import Policy

STREAM_STEPS = 4  # Tokens decoded between two looks of the host, where somebody reads along.


def start(
    params: Params,
    config: Config,
    policy: Policy,
    tokens: Array,
    lengths: Array | None,
    cache: Cache | None,
    max_new_tokens: int,
) -> tuple[Array, Cache]:
    """Logits of the next token and a cache with room for `max_new_tokens`, from a prompt or a question on a cache."""
    if cache is None:
        logits, cache = prefill_logits(params, config, policy, tokens, lengths)
    else:
        cache = with_room(cache, tokens.shape[1] + max_new_tokens)
        logits, cache = extend(params, config, policy, cache, tokens, lengths, last_only=True)
    # Policies that go on alike share a compilation of the decode loop.
    return logits, dataclasses.replace(with_room(cache, max_new_tokens), policy=policy.after_prompt)


def _key(sampler: Sampler, key: Array | None) -> Array:
    if key is None and sampler.temperature > 0:
        raise ValueError("Sampling at a temperature above 0 needs a key: pass key=jax.random.key(seed).")
    return jax.random.key(0) if key is None else key


def generate(
    params: Params,
    config: Config,
    policy: Policy,
    tokens: Array,
    lengths: Array | None = None,
    *,
    cache: Cache | None = None,
    max_new_tokens: int = 64,
    sampler: Sampler = Sampler(),  # noqa: B008
    key: Array | None = None,
    stop: tuple[int, ...] = (),
) -> tuple[Array, Array]:
    """Continues a batch of prompts, or of questions asked on a cache.

    Args:
      params, config: The model.
      policy: For the prompt; with a cache, the one that made it.
      tokens: Ids [B, T] int32, right-padded. lengths: Tokens of each row [B]; default: all.
      cache: What came before; it stays usable.
      max_new_tokens: At most so many per row.
      sampler: How tokens are drawn. key: A `jax.random` key; needed unless the sampler is greedy.
      stop: Ids that end a row; the default never stops.

    Returns:
      New tokens [B, max_new_tokens] int32, zeros after a row has ended, and how many each row has [B] (its stop token
      counts).

    Raises:
      ValueError: A sampler draws at random and there is no key.
    """
    key = _key(sampler, key)
    logits, cache = start(params, config, policy, tokens, lengths, cache, max_new_tokens)
    done = jnp.zeros(tokens.shape[0], bool)
    rest = cache.policy
    out, count, *_ = decode(
        params, config, rest, cache, logits, key, done, sampler=sampler, max_new_tokens=max_new_tokens, stop=stop
    )
    return out, count


def stream(
    params: Params,
    config: Config,
    policy: Policy,
    tokens: Array,
    lengths: Array | None = None,
    *,
    cache: Cache | None = None,
    max_new_tokens: int = 64,
    sampler: Sampler = Sampler(),  # noqa: B008
    key: Array | None = None,
    stop: tuple[int, ...] = (),
) -> Iterator[int]:
    """`generate` for one row, token by token as they come. Same tokens for a greedy sampler."""
    key = _key(sampler, key)
    logits, cache = start(params, config, policy, tokens, lengths, cache, max_new_tokens)
    yield from stream_on(
        params, config, cache.policy, cache, logits, max_new_tokens=max_new_tokens, sampler=sampler, key=key, stop=stop
    )


def stream_on(
    params: Params,
    config: Config,
    policy: Policy,
    cache: Cache,
    logits: Array,
    *,
    max_new_tokens: int = 64,
    sampler: Sampler = Sampler(),  # noqa: B008
    key: Array | None = None,
    stop: tuple[int, ...] = (),
) -> Iterator[int]:
    """`stream` from the next token's logits [1, vocab] on; logits and cache are donated."""
    key = _key(sampler, key)
    steps = -(-max_new_tokens // STREAM_STEPS)
    cache = with_room(cache, steps * STREAM_STEPS)
    done, given = jnp.zeros(1, bool), 0
    for step in range(steps):
        out, count, logits, done, cache = decode(
            params,
            config,
            policy,
            cache,
            logits,
            jax.random.fold_in(key, step),
            done,
            sampler=sampler,
            max_new_tokens=STREAM_STEPS,
            stop=stop,
        )
        new = out[0, : int(count[0])].tolist()[: max_new_tokens - given]
        given += len(new)
        yield from new
        if bool(done[0]):
            return
