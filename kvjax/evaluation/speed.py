"""How fast it really is: the compiled decode loop and the prefill, warm, on this machine."""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import kvjax.generation as generation
from kvjax.cache import Cache
from kvjax.evaluation.results import Row
from kvjax.model import Model
from kvjax.policies import Policy, plan


def greedy(model: Model, cache: Cache, logits: Array, tokens: int) -> tuple[Array, float]:
    """Decodes from a cache with room, which stays usable; no token ends a row.

    Returns:
      The next tokens [B, tokens] int32, and how many seconds the compiled loop took.
    """
    cache, logits = jax.block_until_ready(jax.tree.map(jnp.copy, (cache, logits)))  # Decoding takes them away.
    done, key = jnp.zeros(logits.shape[0], bool), jax.random.key(0)
    start = time.perf_counter()
    out, *_ = generation.decode(
        model.params, model.config, cache.policy, cache, logits, key, done, max_new_tokens=tokens
    )
    jax.block_until_ready(out)
    return out, time.perf_counter() - start


def bench(
    model: Model,
    policies: Sequence[Policy],
    contexts: Sequence[int],
    *,
    batch: int = 1,
    tokens: int = 32,
    repeats: int = 3,
) -> Iterator[Row]:
    """Prefill time, decode speed and bytes of every policy at every context length, on random tokens.

    Args:
      policies: The first is what the others are compared with.
      contexts: Tokens of the prompts.
      batch: Sequences at once.
      tokens: Decoded per measurement.
      repeats: The fastest of so many counts.

    Yields:
      One row per context and policy; "_ratio" is relative to the first policy at the same length (speeds: above 1 is
      faster).

    Raises:
      ValueError: A context and its new tokens exceed the model's. PolicyError: A policy cannot be served there. Both
        before anything is measured.
    """
    for context in contexts:
        if context < 1 or context + tokens > model.config.max_length:
            raise ValueError(
                f"{context} tokens and {tokens} new ones: the model's context is {model.config.max_length}."
            )
        for policy in policies:
            plan(policy, model.config, context, model.params["embed"].dtype)
    return _bench(model, policies, contexts, batch, tokens, repeats)


def _bench(
    model: Model, policies: Sequence[Policy], contexts: Sequence[int], batch: int, tokens: int, repeats: int
) -> Iterator[Row]:
    for context in contexts:
        ids = np.random.default_rng(0).integers(0, model.config.vocab_size, (batch, context), np.int32)
        first: Row = {}
        for policy in policies:
            row = _bench_one(model, policy, jnp.asarray(ids), tokens, repeats)
            first = first or row
            yield row | {
                "prefill_ratio": first["prefill_s"] / row["prefill_s"],
                "decode_ratio": row["decode_tokens_per_s"] / first["decode_tokens_per_s"],
                "nbytes_ratio": first["nbytes"] / row["nbytes"],
            }


def _bench_one(model: Model, policy: Policy, ids: Array, tokens: int, repeats: int) -> Row:
    def prefill() -> tuple[Array, Cache]:
        return generation.prefill_logits(model.params, model.config, policy, ids)

    logits, cache = prefill()
    roomy = generation.with_room(cache, tokens)
    greedy(model, roomy, logits, tokens)  # Compiles, as the first prefill did.
    prefill_s = min(_seconds(prefill) for _ in range(repeats))
    decode_s = min(greedy(model, roomy, logits, tokens)[1] for _ in range(repeats))
    batch, context = ids.shape
    return {
        "policy": str(policy),
        "context": context,
        "batch": batch,
        "prefill_s": prefill_s,
        "decode_tokens_per_s": batch * tokens / decode_s,
        "nbytes": cache.nbytes,
        "compression": cache.compression,
    }


def _seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - start
