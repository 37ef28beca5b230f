"""From a prompt to a cache, layer by layer: what the host holds is one layer's uncompressed keys and values, never the
model's.

Every kind of layer is one small compiled function; the host loops over layers. `observe` keeps all layers' keys and
values, so that one prefill can feed many policies; `prefill` compresses each layer as soon as it is seen. Both give the
same cache.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer

from kvjax.cache import Cache, LayerSpec, Tokens, make_ring
from kvjax.kernels.attention import BLOCK, causal_attention
from kvjax.models.config import Config
from kvjax.models.params import layer_params
from kvjax.models.transformer import MLP_ROWS, Params, embed, layer_spec, positions, run_layer, unembed
from kvjax.policies.observe import Needs, observe as observe_attention
from kvjax.policies.plan import Observed, Plan, compress_layer, plan
from kvjax.policies.policy import Policy


@dataclasses.dataclass(frozen=True)
class Chunk:
    """How much of a prompt is worked on at once: bounds memory, changes no result.

    Attributes:
      queries: That attend at once. rows: Tokens that pass an MLP at once.
    """

    queries: int = BLOCK
    rows: int = MLP_ROWS

    @classmethod
    def of(cls, tokens: int | None) -> "Chunk":
        """Both the same number of tokens; None for the defaults.

        Raises:
          ValueError: It is not positive.
        """
        if tokens is not None and tokens < 1:
            raise ValueError(f"chunk must be positive, got {tokens}.")
        return cls() if tokens is None else cls(min(tokens, BLOCK), tokens)


@functools.partial(jax.jit, static_argnames=("config", "spec", "needs", "chunk"))
def _full_layer(
    weights: Params,
    x: Array,
    pos: Array,
    layer: Array,
    *,
    config: Config,
    spec: LayerSpec,
    needs: Needs,
    chunk: Chunk,
):
    def attend(spec: LayerSpec, state: None, new: Tokens):
        out, prompt, obs = observe_attention(spec, new, needs, layer, chunk.queries)
        return out, (prompt, obs)

    return run_layer(weights, config, spec, x, pos, None, attend, chunk.rows)


@functools.partial(jax.jit, static_argnames=("config", "spec", "length", "chunk"))
def _sliding_layer(
    weights: Params, x: Array, pos: Array, *, config: Config, spec: LayerSpec, length: int, chunk: Chunk
):
    def attend(spec: LayerSpec, state: None, new: Tokens):
        out, _ = causal_attention(
            new.q,
            new.k,
            new.v,
            new.pos,
            scale=spec.scale,
            window=spec.window,
            softcap=spec.softcap,
            block=chunk.queries,
        )
        return out, make_ring(new.k[:, :, :length], new.v[:, :, :length], new.pos[:, :length], spec.window)

    return run_layer(weights, config, spec, x, pos, None, attend, chunk.rows)


_embed = jax.jit(embed, static_argnames="config")
_unembed = jax.jit(unembed, static_argnames="config")
_compress_layer = jax.jit(compress_layer, static_argnames=("policy", "spec", "length", "places"))


def _run(
    params: Params,
    config: Config,
    tokens: Array,
    lengths: Array | None,
    needs: Needs,
    chunk: Chunk,
    keep: Callable[[int, LayerSpec, Any], Any],
) -> tuple[Array, tuple[Any, ...]]:
    """All layers, one after another.

    Args:
      keep: `keep(layer, spec, observed) -> state`: what is left of a full-attention layer's observation,
        before the next layer starts.

    Returns:
      Hidden states [B, T, hidden] and every layer's state (a ring where it is a sliding one).
    """
    pos = positions(tokens, lengths)
    longest = tokens.shape[1] if lengths is None or isinstance(lengths, Tracer) else int(np.max(lengths))
    x, states = _embed(params, config, tokens), []
    for i, weights in enumerate(layer_params(params, config)):
        spec = layer_spec(config, i)
        if config.layer_types[i] == "full":
            x, state = _full_layer(weights, x, pos, jnp.int32(i), config=config, spec=spec, needs=needs, chunk=chunk)
            state = keep(i, spec, state)
            if isinstance(x, Tracer):  # Eager calls run in order by themselves; a compiler has to be told.
                x, state = jax.lax.optimization_barrier((x, state))
        else:
            # A prompt longer than the window fills the ring whatever its length: one compilation serves all.
            length = tokens.shape[1] if longest >= config.sliding_window else longest
            x, state = _sliding_layer(weights, x, pos, config=config, spec=spec, length=length, chunk=chunk)
        states.append(state)
    return x, tuple(states)


def _last(x: Array, lengths: Array) -> Array:
    """Hidden state of each row's last token: [B, T, hidden] -> [B, hidden]."""
    return jnp.take_along_axis(x, (lengths - 1)[:, None, None], axis=1)[:, 0]


def _lengths(tokens: Array, lengths: Array | None) -> Array:
    return (
        jnp.full((tokens.shape[0],), tokens.shape[1], jnp.int32) if lengths is None else jnp.asarray(lengths, jnp.int32)
    )


def observe(
    params: Params,
    config: Config,
    tokens: Array,
    lengths: Array | None = None,
    needs: Needs = Needs(),  # noqa: B008
    chunk: int | None = None,
) -> Observed:
    """Runs a batch of prompts and keeps everything, for `policies.compress`.

    Args:
      tokens: Ids [B, T] int32, right-padded. lengths: Tokens of each row [B]; default: all.
      needs: Statistics that the policies will ask for (`policy.needs`, joined by `|`).
      chunk: As in `prefill`.
    """
    x, layers = _run(params, config, tokens, lengths, needs, Chunk.of(chunk), lambda layer, spec, observed: observed)
    rows = _lengths(tokens, lengths)
    return Observed(layers=layers, lengths=rows, last=_last(x, rows), config=config, needs=needs)


def next_logits(params: Params, observed: Observed) -> Array:
    """Logits of the token after each prompt, [B, vocab] float32."""
    return _unembed(params, observed.config, observed.last)


def prefill_logits(
    params: Params,
    config: Config,
    policy: Policy,
    tokens: Array,
    lengths: Array | None = None,
    chunk: int | None = None,
) -> tuple[Array, Cache]:
    """`prefill`, and the logits of the token after each prompt [B, vocab] float32."""
    rows = _lengths(tokens, lengths)
    known = tokens.shape[1] if isinstance(rows, Tracer) else np.asarray(rows)
    planned: Plan = plan(policy, config, known, params["embed"].dtype)
    slots, number = planned.slots(rows), {layer: i for i, layer in enumerate(config.full_layers)}

    def keep(layer: int, spec: LayerSpec, observed: Any) -> Any:
        i = number[layer]
        return _compress_layer(planned.policy, spec, planned.length, planned.capacities[i], observed, slots[i])

    x, layers = _run(params, config, tokens, lengths, policy.needs, Chunk.of(chunk), keep)
    cache = Cache(layers=layers, seen=rows, config=config, policy=planned.policy)
    return _unembed(params, config, _last(x, rows)), cache


def prefill(
    params: Params,
    config: Config,
    policy: Policy,
    tokens: Array,
    lengths: Array | None = None,
    chunk: int | None = None,
) -> Cache:
    """The compressed cache of a batch of prompts.

    Args:
      params, config: The model.
      policy: What becomes of keys and values of full-attention layers; sliding layers keep their window.
      tokens: Ids [B, T] int32, right-padded.
      lengths: Tokens of each row [B] int32; default: all. Under `jit` the longest row counts as T for what is
        allocated.
      chunk: Tokens of the prompt that are worked on at once inside a layer (default: 256 queries, 4,096 rows of an
        MLP). Smaller needs less memory; the result is the same.

    Returns:
      A cache without room to spare; `Cache.reserve` adds it (`extend` and `generate` do by themselves).

    Raises:
      PolicyError: The model or the prompt cannot be served; known before anything is computed.
    """
    return prefill_logits(params, config, policy, tokens, lengths, chunk)[1]
