"""New tokens on a cache: a question after a compressed context, a chunk of a long prompt, one decoded token."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.core import Tracer

from kvjax.cache import EMPTY, Cache
from kvjax.cache.spread import settled
from kvjax.kernels.known import known
from kvjax.models.config import Config
from kvjax.models.transformer import Params, embed, run_layers, unembed
from kvjax.policies.policy import Policy, attend_with

CHUNK = 256  # Tokens that attend to a cache at once: bounds the logits of a long extension.
ROOM = 64  # Room is reserved in multiples of this, so that caches of many sizes share a compilation.


def hidden_states(
    params: Params, config: Config, policy: Policy, cache: Cache, tokens: Array, valid: Array
) -> tuple[Array, Cache]:
    """One pass over T new tokens: ids [B, T], of which valid [B, T] count -> hidden [B, T, hidden], the new cache.

    Valid tokens stand at the front of a row. The cache must have room; what does not fit is dropped.
    """
    order = jnp.cumsum(valid, axis=1, dtype=jnp.int32) - 1
    pos = jnp.where(valid, cache.seen[:, None] + order, EMPTY)
    x, attend = embed(params, config, tokens), attend_with(policy)
    x, layers, shared = run_layers(params, config, x, pos, cache.layers, cache.shared, attend)
    cache = dataclasses.replace(cache, layers=layers, shared=shared, seen=cache.seen + valid.sum(1, dtype=jnp.int32))
    cache = cache if policy.transform is None else policy.transform.step(cache)
    return x, dataclasses.replace(cache, layers=tuple(map(settled, cache.layers)))


@functools.partial(jax.jit, static_argnames=("config", "policy", "chunk"))
def extend_hidden(
    params: Params, config: Config, policy: Policy, cache: Cache, tokens: Array, valid: Array, chunk: int = CHUNK
) -> tuple[Array, Cache]:
    """`hidden_states` in chunks, or token by token where the policy evicts at every step."""
    chunk = 1 if policy.acts_every_step else min(chunk, tokens.shape[1])
    if tokens.shape[1] == chunk:
        return hidden_states(params, config, policy, cache, tokens, valid)
    extra = -tokens.shape[1] % chunk

    def pieces(x: Array) -> Array:
        return jnp.pad(x, ((0, 0), (0, extra))).reshape(x.shape[0], -1, chunk).swapaxes(0, 1)

    def step(cache: Cache, piece: tuple[Array, Array]):
        x, cache = hidden_states(params, config, policy, cache, *piece)
        return cache, x

    cache, x = lax.scan(step, cache, (pieces(tokens), pieces(valid)))
    x = x.swapaxes(0, 1)
    return x.reshape(x.shape[0], -1, x.shape[-1])[:, : tokens.shape[1]], cache


def with_room(cache: Cache, slots: int) -> Cache:
    """The same cache with room for `slots` more tokens, in multiples of `ROOM`. Under `jit` it is returned as it is."""
    if isinstance(cache.seen, Tracer):
        return cache
    rooms: list[Any] = known([layer.room for layer in cache.layers])
    lacking = [0 if room is None else max(slots - int(room.min()), 0) for room in rooms]
    if not any(lacking):
        return cache

    def grow(layer: Any, lack: int) -> Any:
        return layer.reserve(-(-lack // ROOM) * ROOM) if lack else layer

    layers = tuple(grow(layer, lack) for layer, lack in zip(cache.layers, lacking, strict=True))
    return dataclasses.replace(cache, layers=layers)


_unembed = jax.jit(unembed, static_argnames="config")


def extend(
    params: Params,
    config: Config,
    policy: Policy,
    cache: Cache,
    tokens: Array,
    lengths: Array | None = None,
    *,
    last_only: bool = False,
) -> tuple[Array, Cache]:
    """Feeds T more tokens to a cache.

    Args:
      params, config: The model.
      policy: The one that made the cache.
      cache: Stays as it is. Outside `jit` room is added as needed; inside, reserve it before.
      tokens: Ids [B, T] int32, right-padded.
      lengths: Tokens of each row [B] int32; default: all.
      last_only: Only the logits after the last token of each row.

    Returns:
      Logits [B, T, vocab] float32 ([B, vocab] if `last_only`) and the new cache.
    """
    tokens = jnp.asarray(tokens, jnp.int32)
    rows = (
        jnp.full(tokens.shape[:1], tokens.shape[1], jnp.int32) if lengths is None else jnp.asarray(lengths, jnp.int32)
    )
    valid = jnp.arange(tokens.shape[1]) < rows[:, None]
    made_by, rest = cache.policy, policy.after_prompt  # Policies that go on alike share a compilation.
    cache = dataclasses.replace(with_room(cache, tokens.shape[1]), policy=rest)
    x, cache = extend_hidden(params, config, rest, cache, tokens, valid)
    cache = dataclasses.replace(cache, policy=made_by)
    if last_only:
        x = jnp.take_along_axis(x, jnp.maximum(rows - 1, 0)[:, None, None], axis=1)[:, 0]
    return _unembed(params, config, x), cache
