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
from jax import Array
from jax.core import Tracer

from kvjax.cache import Cache, LayerSpec, Tokens, make_ring
from kvjax.cache.spread import settled
from kvjax.generation.chunked import prefill_in_chunks
from kvjax.kernels import mesh
from kvjax.kernels.known import known
from kvjax.kernels.prefill import BLOCK, causal_attention
from kvjax.models.config import Config
from kvjax.models.params import layer_params
from kvjax.models.transformer import MLP_ROWS, Params, embed, layer_spec, positions, run_layer, unembed
from kvjax.policies.divide import Division, begin_layer, cut_layer
from kvjax.policies.observe import Needs, observe as observe_attention
from kvjax.policies.plan import Observed, Plan, assemble, compress_layer, finish, plan, start_division
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
    def attend(spec: LayerSpec, state: None, new: Tokens, shared: None):
        out, prompt, obs = observe_attention(spec, new, needs, layer, chunk.queries)
        return out, (prompt, obs), shared

    return run_layer(weights, config, spec, x, pos, None, None, attend, chunk.rows)[:2]


@functools.partial(jax.jit, static_argnames=("config", "spec", "length", "chunk"))
def _sliding_layer(
    weights: Params, x: Array, pos: Array, *, config: Config, spec: LayerSpec, length: int, chunk: Chunk
):
    def attend(spec: LayerSpec, state: None, new: Tokens, shared: None):
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
        k, v, pos = new.k[:, :, :length], new.v[:, :, :length], new.pos[:, :length]
        return out, settled(make_ring(k, v, pos, spec.window, latent=spec.latent).even()), shared

    return run_layer(weights, config, spec, x, pos, None, None, attend, chunk.rows)[:2]


_embed = jax.jit(embed, static_argnames="config")
_unembed = jax.jit(unembed, static_argnames="config")
_compress_layer = jax.jit(compress_layer, static_argnames=("policy", "spec", "length", "place"))


def _run(
    params: Params,
    config: Config,
    tokens: Array,
    lengths: Array | None,
    needs: Needs,
    chunk: Chunk,
    keep: Callable[[int, LayerSpec, Any, Any], Any],
    kept: Any = (),
) -> tuple[Array, tuple[Any, ...], Any]:
    """All layers, one after another.

    Args:
      keep: `keep(i, spec, observed, kept) -> kept`: what is left of the observations of full-attention layers, once the
        i-th of them is seen and before the next layer starts.
      kept: What is there before the first.

    Returns:
      Hidden states [B, T, hidden], the rings of sliding layers (None for others), and what was kept.
    """
    pos = positions(tokens, lengths)
    longest = tokens.shape[1] if lengths is None or isinstance(lengths, Tracer) else int(known(lengths).max())
    number = {layer: i for i, layer in enumerate(config.full_layers)}
    x, rings = _embed(params, config, tokens), []
    for i, weights in enumerate(layer_params(params, config)):
        spec, ring = layer_spec(config, i), None
        if config.layer_types[i] == "full":
            x, seen = _full_layer(weights, x, pos, jnp.int32(i), config=config, spec=spec, needs=needs, chunk=chunk)
            kept = keep(number[i], spec, seen, kept)
            if isinstance(x, Tracer):  # Eager calls run in order by themselves; a compiler has to be told.
                x, kept = jax.lax.optimization_barrier((x, kept))
        else:
            # A prompt longer than the window fills the ring whatever its length: one compilation serves all.
            length = tokens.shape[1] if longest >= config.sliding_window else longest
            x, ring = _sliding_layer(weights, x, pos, config=config, spec=spec, length=length, chunk=chunk)
        rings.append(ring)
    return x, tuple(rings), kept


def _with_rings(config: Config, rings: tuple[Any, ...], full: Any) -> tuple[Any, ...]:
    """Every layer's state: those of full-attention layers between the rings."""
    of_layer = dict(zip(config.full_layers, full, strict=True))
    return tuple(of_layer.get(i, ring) for i, ring in enumerate(rings))


def _last(x: Array, lengths: Array) -> Array:
    """Hidden state of each row's last token: [B, T, hidden] -> [B, hidden]."""
    return jnp.take_along_axis(x, (lengths - 1)[:, None, None], axis=1)[:, 0]


def _lengths(tokens: Array, lengths: Array | None) -> Array:
    return (
        jnp.full((tokens.shape[0],), tokens.shape[1], jnp.int32) if lengths is None else jnp.asarray(lengths, jnp.int32)
    )


def _divided_evenly(tokens: Array, lengths: Array | None) -> tuple[Array, Array | None]:
    """Ids and lengths of prompts that are padded so that every device of the mesh in use gets two equal pieces."""
    extra = mesh.even(tokens.shape[1], 1, 2 if mesh.axes_in_use() else 1) - tokens.shape[1]
    return (jnp.pad(tokens, ((0, 0), (0, extra))), _lengths(tokens, lengths)) if extra else (tokens, lengths)


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

    def keep(i: int, spec: LayerSpec, observed: Any, kept: Any) -> Any:
        return (*kept, observed)

    tokens, lengths = _divided_evenly(tokens, lengths)
    x, rings, kept = _run(params, config, tokens, lengths, needs, Chunk.of(chunk), keep)
    rows, layers = _lengths(tokens, lengths), _with_rings(config, rings, kept)
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
    planned_for = tokens.shape[1] if isinstance(rows, Tracer) else known(rows)
    planned = plan(policy, config, planned_for, params["embed"].dtype)
    if policy.in_chunks:
        last, cache = prefill_in_chunks(params, config, planned, tokens, rows)
        return _unembed(params, config, last), cache
    build = _fixed if planned.decided else _divided
    tokens, lengths = _divided_evenly(tokens, lengths)
    x, cache = build(params, config, planned, tokens, lengths, rows, Chunk.of(chunk))
    return _unembed(params, config, _last(x, rows)), cache


def _fixed(
    params: Params, config: Config, plan: Plan, tokens: Array, lengths: Array | None, rows: Array, chunk: Chunk
) -> tuple[Array, Cache]:
    """Hidden states and cache where capacities are known: each layer is compressed as soon as it is seen."""
    slots = plan.slots(rows)

    def keep(i: int, spec: LayerSpec, observed: Any, kept: Any) -> Any:
        return (*kept, _compress_layer(plan.policy, spec, plan.length, plan.places[i], observed, slots[i]))

    x, rings, layers = _run(params, config, tokens, lengths, plan.policy.needs, chunk, keep)
    return x, assemble(plan.policy, config, _with_rings(config, rings, layers), rows)


def _divided(
    params: Params, config: Config, plan: Plan, tokens: Array, lengths: Array | None, rows: Array, chunk: Chunk
) -> tuple[Array, Cache]:
    """Hidden states and cache where the data decide: layers wait until their share is known.

    Where budgets cascade they are cut to what is their share by then, so that those seen so far hold about the budget.
    """
    slots, policy = plan.slots(rows), plan.policy
    cascades = plan.policy.stages[-1].divide.cascades

    def keep(i: int, spec: LayerSpec, observed: Any, kept: Any) -> Any:
        division, begun = kept
        layer, weight = begin_layer(policy, spec, plan.length, plan.places[i], observed, slots[i])
        division, begun = division.see(weight), [*begun, layer]
        for j in range(len(begun) if cascades else 0):
            capacity = division.capacity(j)
            if capacity < begun[j][0].k.shape[2]:
                spec = layer_spec(config, config.full_layers[j])
                begun[j] = cut_layer(policy, spec, plan.places[j], capacity, begun[j], division.slots[j])
        return division, begun

    start: tuple[Division, list[Any]] = (start_division(plan, rows), [])
    x, rings, (division, begun) = _run(params, config, tokens, lengths, policy.needs, chunk, keep, start)
    return x, finish(plan, division, begun, config, rings, rows)


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
