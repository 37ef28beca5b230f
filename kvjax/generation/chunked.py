"""A prompt fed chunk by chunk through the whole model: a policy acts at the end of each chunk, and later chunks see
only what it has left. What is alive is one chunk and the budget, however long the prompt.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from kvjax.cache import EMPTY, Cache, LayerSpec, Tokens, make_ring
from kvjax.models.config import Config
from kvjax.models.transformer import Params, embed, layer_spec, run_layers
from kvjax.policies.observe import Observation, Prompt
from kvjax.policies.plan import Plan, assemble
from kvjax.policies.policy import attend_with
from kvjax.policies.store import Built


def _open(config: Config, plan: Plan, slots: Array, size: int, dtype: Any) -> tuple[Any, ...]:
    """Every layer without tokens, with room for its budget and one chunk.

    Args:
      slots: Tokens that full-attention layers keep in each row [layers, B]. size: Tokens of a chunk.
    """
    policy, batch = plan.policy, slots.shape[-1]
    number = {layer: i for i, layer in enumerate(config.full_layers)}

    def nothing(length: int) -> tuple[Array, Array]:
        k = jnp.zeros((batch, config.cache_heads, length, config.key_dim), dtype)
        return k, k[..., -config.value_dim :]

    def layer(index: int) -> Any:
        spec = layer_spec(config, index)
        if config.layer_types[index] == "sliding":
            pos = jnp.full((batch, config.sliding_window), EMPTY, jnp.int32)
            return make_ring(*nothing(config.sliding_window), pos, config.sliding_window, latent=spec.latent)
        place = plan.places[number[index]]
        rows = jnp.zeros((batch,), jnp.int32)
        queries = jnp.zeros((batch, config.num_heads, 0, config.key_dim), dtype)
        obs = Observation(
            q=queries, q_pos=queries[:, 0, :, 0].astype(jnp.int32), moments={}, length=rows, layer=rows[0]
        )
        about = Built(obs=obs, spec=spec, capacity=0, role=place.role)
        k, v = nothing(0)
        empty = policy.layout.build(Prompt(k=k, v=v, pos=jnp.zeros(k.shape[:3], jnp.int32)), about)
        opened = policy.stages[-1].open(empty, slots[number[index]])
        return opened.reserve(_capacity(plan, number[index]) + size)

    return tuple(layer(i) for i in range(config.num_layers))


def _capacity(plan: Plan, layer: int) -> int:
    """Slots of a layer before the prompt's last tokens come."""
    return max(plan.places[layer].capacities[-1] - plan.policy.stages[-1].phase.tail, 0)


@functools.partial(jax.jit, static_argnames=("config", "plan"))
def prefill_in_chunks(params: Params, config: Config, plan: Plan, tokens: Array, lengths: Array) -> tuple[Array, Cache]:
    """The cache of a policy that acts chunk by chunk (`Phase("chunk")`).

    Args:
      tokens: Ids [B, T] int32, right-padded. lengths: Tokens of each row [B].

    Returns:
      Hidden state [B, hidden] of each row's last token, and the cache.
    """
    policy, phase = plan.policy, plan.policy.stages[-1].phase
    stage: Any = policy.stages[-1]
    size, width = min(phase.every, tokens.shape[1]), tokens.shape[1]
    number = {layer: i for i, layer in enumerate(config.full_layers)}
    slots = plan.slots(lengths)[:, -1]
    body = jnp.maximum(lengths - phase.tail, 0)
    layers = _open(config, plan, slots, size, params["embed"].dtype)
    cache = assemble(policy, config, layers, jnp.zeros_like(lengths))

    def attend(spec: LayerSpec, layer: Any, new: Tokens, shared: Any) -> tuple[Array, Any, Any]:
        return layer.attend(new, spec, shared, stage.score.update)

    def feed(cache: Cache, last: Array, ids: Array, pos: Array, attend: Any) -> tuple[Cache, Array]:
        x, layers, shared = run_layers(
            params, config, embed(params, config, ids), pos, cache.layers, cache.shared, attend
        )
        newest = pos == lengths[:, None] - 1
        last = jnp.where(newest.any(1)[:, None], (x * newest[..., None]).sum(1), last).astype(x.dtype)
        seen = cache.seen + (pos != EMPTY).sum(1, dtype=jnp.int32)
        return dataclasses.replace(cache, layers=layers, shared=shared, seen=seen), last

    def chunk(carry: tuple[Cache, Array], xs: tuple[Array, Array]) -> tuple[tuple[Cache, Array], None]:
        (cache, last), (start, ids) = carry, xs
        pos = start + jnp.arange(size, dtype=jnp.int32)
        cache, last = feed(cache, last, ids, jnp.where(pos < body[:, None], pos, EMPTY), attend)
        ended = body <= start + size
        layers = tuple(stage.end_chunk(x, ended) if i in number else x for i, x in enumerate(cache.layers))
        return (dataclasses.replace(cache, layers=layers), last), None

    chunks = -(-width // size)
    ids = jnp.pad(tokens, ((0, 0), (0, chunks * size - width)))
    ids = jnp.swapaxes(ids.reshape(-1, chunks, size), 0, 1)
    last = jnp.zeros((tokens.shape[0], config.hidden_size), params["embed"].dtype)
    (cache, last), _ = lax.scan(chunk, (cache, last), (size * jnp.arange(chunks, dtype=jnp.int32), ids))

    def close(index: int, layer: Any) -> Any:
        return stage.close(layer, _capacity(plan, number[index])).reserve(phase.tail) if index in number else layer

    cache = dataclasses.replace(cache, layers=tuple(close(i, layer) for i, layer in enumerate(cache.layers)))
    if phase.tail:
        index = body[:, None] + jnp.arange(min(phase.tail, width), dtype=jnp.int32)
        ids = jnp.take_along_axis(tokens, jnp.minimum(index, width - 1), 1)
        pos = jnp.where(index < lengths[:, None], index, EMPTY)
        cache, last = feed(cache, last, ids, pos, attend_with(policy.after_prompt))
    return last, cache
