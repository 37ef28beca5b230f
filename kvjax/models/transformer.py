"""One decoder-only transformer for all families: pure functions of (params, tokens, cache).

The model does not know what a cache is. A layer projects its tokens and calls `attend(spec, state, tokens)`, which
returns the attention output and the layer's new state; what the state is, and what happened to it, is the caller's
business. Three callers
exist: plain causal attention without any state (`forward`), observation of a prompt (`generation.prefill`), and a cache
(`cache.attend`).
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from kvjax.cache.types import EMPTY, LayerSpec, Tokens
from kvjax.kernels.attention import causal_attention
from kvjax.models.config import Config, Rope
from kvjax.models.params import layer_params, layer_runs
from kvjax.models.rope import apply_rope, rope_tables

Attend = Callable[[LayerSpec, Any, Tokens], tuple[Array, Any]]
Params = dict[str, Any]

ACTIVATIONS = {"silu": jax.nn.silu, "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True)}
MLP_ROWS = 4096  # Tokens that go through an MLP at once: bounds its activations on long prompts.


def rms_norm(x: Array, weight: Array, config: Config) -> Array:
    """RMSNorm over the last axis (arXiv 1910.07467), in float32."""
    x32 = x.astype(jnp.float32)
    normed = x32 * lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + config.norm_eps)
    return (normed * (weight.astype(jnp.float32) + config.norm_offset)).astype(x.dtype)


def rotate(rope: Rope, x: Array, positions: Array) -> Array:
    """Rotary embedding of x [B, heads, T, D] at positions [B, T]."""
    return apply_rope(x, *rope_tables(rope, positions))


def layer_spec(config: Config, layer: int) -> LayerSpec:
    """What attention needs to know of one layer."""
    return LayerSpec(
        window=config.sliding_window if config.layer_types[layer] == "sliding" else 0,
        scale=config.query_scale,
        softcap=config.attn_softcap,
        rope=config.layer_rope(layer),
        rotate=rotate,
    )


def embed(params: Params, config: Config, tokens: Array) -> Array:
    """Token ids [B, T] -> [B, T, hidden]."""
    x = params["embed"][tokens]
    return x * jnp.asarray(config.embed_scale, x.dtype)


def unembed(params: Params, config: Config, x: Array) -> Array:
    """Final norm and output projection: [..., hidden] -> logits [..., vocab] float32."""
    table = params["embed"] if config.tied else params["lm_head"]
    x = rms_norm(x, params["final_norm"], config)
    logits = jnp.einsum("...h,vh->...v", x, table, preferred_element_type=jnp.float32)
    return config.logit_softcap * jnp.tanh(logits / config.logit_softcap) if config.logit_softcap else logits


def project(weights: Params, config: Config, spec: LayerSpec, x: Array, pos: Array) -> Tokens:
    """Queries, keys and values of normed inputs x [B, T, hidden] at positions pos [B, T]."""

    def heads(name: str) -> Array:
        y = x @ weights[f"{name}_proj"]
        y = y + weights[f"{name}_bias"] if config.qkv_bias else y
        y = jnp.swapaxes(y.reshape(*y.shape[:2], -1, config.head_dim), 1, 2)
        return rms_norm(y, weights[f"{name}_norm"], config) if config.qk_norm and name != "v" else y

    q, k, v = heads("q"), heads("k"), heads("v")
    cos, sin = rope_tables(spec.rope, pos)
    return Tokens(q=apply_rope(q, cos, sin), k=apply_rope(k, cos, sin), v=v, q_raw=q, k_raw=k, pos=pos)


def mlp(weights: Params, config: Config, x: Array, rows: int = MLP_ROWS) -> Array:
    """Gated MLP of x [B, T, hidden], in pieces of at most `rows` tokens."""

    def piece(x: Array) -> Array:
        gate = ACTIVATIONS[config.activation](x @ weights["gate_proj"])
        return (gate * (x @ weights["up_proj"])) @ weights["down_proj"]

    batch, length, hidden = x.shape
    pieces = -(-batch * length // rows)
    if pieces == 1:
        return piece(x)
    size = -(-length // pieces)
    x = jnp.pad(x, ((0, 0), (0, pieces * size - length), (0, 0)))
    out = lax.map(piece, jnp.swapaxes(x.reshape(batch, pieces, size, hidden), 0, 1))
    return jnp.swapaxes(out, 0, 1).reshape(x.shape)[:, :length]


def run_layer(
    weights: Params,
    config: Config,
    spec: LayerSpec,
    x: Array,
    pos: Array,
    state: Any,
    attend: Attend,
    rows: int = MLP_ROWS,
) -> tuple[Array, Any]:
    """One transformer layer: x [B, T, hidden] -> the same, and the layer's new state."""
    with jax.named_scope("attention"):
        new = project(weights, config, spec, rms_norm(x, weights["attn_norm"], config), pos)
        out, state = attend(spec, state, new)
        out = jnp.swapaxes(out, 1, 2).reshape(*x.shape[:2], -1).astype(x.dtype) @ weights["o_proj"]
        x = x + (rms_norm(out, weights["post_attn_norm"], config) if config.post_norms else out)
    with jax.named_scope("mlp"):
        out = mlp(weights, config, rms_norm(x, weights["mlp_norm"], config), rows)
        x = x + (rms_norm(out, weights["post_mlp_norm"], config) if config.post_norms else out)
    return x, state


def alike(states: Sequence[Any]) -> bool:
    """Whether pytrees agree in structure, static fields, shapes and dtypes, so that they can be stacked."""

    def shape(state):
        return jax.tree.structure(state), [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(state)]

    return all(shape(state) == shape(states[0]) for state in states[1:])


def run_layers(
    params: Params, config: Config, x: Array, pos: Array, states: Sequence[Any], attend: Attend
) -> tuple[Array, tuple[Any, ...]]:
    """All layers. Stacked params (see `stack_layers`) run under `lax.scan` where the states of a run are alike too."""
    if len(params["layers"]) == config.num_layers:
        run = [(i,) for i in range(config.num_layers)]
    else:
        run = layer_runs(config)
    new_states: list[Any] = []
    for layers, block in zip(run, params["layers"], strict=True):
        spec, mine = layer_spec(config, layers[0]), [states[i] for i in layers]
        stacked = block["attn_norm"].ndim == 2
        if stacked and alike(mine):

            def step(x, xs, spec=spec):
                weights, state = xs
                return run_layer(weights, config, spec, x, pos, state, attend)

            together = jax.tree.map(lambda *leaves: jnp.stack(leaves), *mine)
            x, together = lax.scan(step, x, (block, together))
            new_states += [jax.tree.map(lambda leaf, i=i: leaf[i], together) for i in range(len(layers))]
            continue
        for i, state in enumerate(mine):
            weights = jax.tree.map(lambda leaf, i=i: leaf[i], block) if stacked else block
            x, state = run_layer(weights, config, spec, x, pos, state, attend)
            new_states.append(state)
    return x, tuple(new_states)


def positions(tokens: Array, lengths: Array | None) -> Array:
    """Positions [B, T] of right-padded prompts: 0, 1, ... and `EMPTY` from `lengths` [B] on."""
    pos = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    return pos if lengths is None else jnp.where(pos < lengths[:, None], pos, EMPTY)


def plain_attend(spec: LayerSpec, state: None, new: Tokens) -> tuple[Array, None]:
    """Causal attention of a prompt over itself; nothing is stored."""
    out, _ = causal_attention(new.q, new.k, new.v, new.pos, scale=spec.scale, window=spec.window, softcap=spec.softcap)
    return out, state


@functools.partial(jax.jit, static_argnames="config")
def forward(params: Params, config: Config, tokens: Array, lengths: Array | None = None) -> Array:
    """Logits of a whole batch of prompts, without a cache.

    Args:
      params: From `kvjax.load` or `init_params`.
      config: The architecture.
      tokens: Ids [B, T] int32, right-padded.
      lengths: Tokens of each row [B] int32; default: all.

    Returns:
      [B, T, vocab] float32; rows of padding hold numbers without meaning.
    """
    pos = positions(tokens, lengths)
    x, _ = run_layers(params, config, embed(params, config, tokens), pos, (None,) * config.num_layers, plain_attend)
    return unembed(params, config, x)


__all__ = ["forward", "layer_params", "layer_spec", "run_layer", "run_layers"]
