"""One decoder-only transformer for all families: pure functions of (params, tokens, cache).

The model does not know what a cache is. A layer projects its tokens and calls `attend(spec, state, tokens, shared)`,
which returns the attention output, the layer's new state and what it hands on to the next layer; what these are, and
what happened to them, is the caller's business. Three callers exist: plain causal attention without any state
(`forward`), observation of a prompt (`generation.prefill`), and a cache (`cache.Layer.attend`).
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from kvjax.cache.types import EMPTY, LayerSpec, Tokens
from kvjax.kernels.mesh import SEQ, axes_in_use, tokens_apart
from kvjax.kernels.prefill import causal_attention
from kvjax.models.config import Config, Rope
from kvjax.models.params import layer_params, layer_runs
from kvjax.models.rope import apply_rope, rope_tables

# (layer, its state, its new tokens, what layers share) -> (output [B, H * G, T, D], new state, what layers share).
Attend = Callable[[LayerSpec, Any, Tokens, Any], tuple[Array, Any, Any]]
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
        latent=config.mla.rank if config.mla else 0,
        kernels=config.kernels,
    )


def embed(params: Params, config: Config, tokens: Array) -> Array:
    """Token ids [B, T] -> [B, T, hidden]."""
    x = tokens_apart(params["embed"][tokens])
    return x * jnp.asarray(config.embed_scale, x.dtype)


def unembed(params: Params, config: Config, x: Array) -> Array:
    """Final norm and output projection: [..., hidden] -> logits [..., vocab] float32."""
    table = params["embed"] if config.tied else params["lm_head"]
    x = rms_norm(x, params["final_norm"], config)
    logits = jnp.einsum("...h,vh->...v", x, table, preferred_element_type=jnp.float32)
    return config.logit_softcap * jnp.tanh(logits / config.logit_softcap) if config.logit_softcap else logits


def project(weights: Params, config: Config, spec: LayerSpec, x: Array, pos: Array) -> Tokens:
    """Queries, keys and values of normed inputs x [B, T, hidden] at positions pos [B, T].

    Latent attention comes in its absorbed form: one key per token, queries taken to it, and values that are its end.
    """

    def heads(name: str) -> Array:
        y = x @ weights[f"{name}_proj"]
        y = y + weights[f"{name}_bias"] if config.qkv_bias else y
        y = jnp.swapaxes(y.reshape(*y.shape[:2], -1, config.head_dim), 1, 2)
        return rms_norm(y, weights[f"{name}_norm"], config) if config.qk_norm and name != "v" else y

    if config.mla:
        q = jnp.einsum("bhtd,hdc->bhtc", heads("q"), weights["k_up"])
        k = (_all_heads(heads("k"), heads("v")) if config.qk_norm else x) @ weights["kv_down"]
        k = (k + weights["kv_bias"] if "kv_bias" in weights else k)[:, None]
        v = k[..., config.mla.rope_dim :]
    else:
        q, k, v = heads("q"), heads("k"), heads("v")
    cos, sin = rope_tables(spec.rope, pos)
    trained = weights.get("trained")
    return Tokens(q=apply_rope(q, cos, sin), k=apply_rope(k, cos, sin), v=v, q_raw=q, k_raw=k, pos=pos, trained=trained)


def merge(weights: Params, config: Config, out: Array) -> Array:
    """From every head's attention output (mixed values, or mixed latents) [B, heads, T, D] to [B, T, hidden]."""
    out = jnp.einsum("bhtr,hrd->bhtd", out, weights["v_up"]) if config.mla else out
    return _all_heads(out) @ weights["o_proj"]


def _all_heads(*x: Array) -> Array:
    """Several [B, heads, T, D] side by side: [B, T, heads * D + ...]."""
    return jnp.concatenate([jnp.swapaxes(y, 1, 2).reshape(y.shape[0], y.shape[2], -1) for y in x], -1)


def mlp(weights: Params, config: Config, x: Array, rows: int = MLP_ROWS) -> Array:
    """Gated MLP of x [B, T, hidden], in pieces of at most `rows` tokens."""

    def piece(x: Array) -> Array:
        gate = ACTIVATIONS[config.activation](x @ weights["gate_proj"])
        return (gate * (x @ weights["up_proj"])) @ weights["down_proj"]

    batch, length, hidden = x.shape
    parts = axes_in_use().get(SEQ, 1)  # Every device takes pieces of its own tokens.
    parts = parts if length % parts == 0 else 1
    pieces = -(-batch * length // (parts * rows))
    if pieces == 1:
        return piece(x)
    size = -(-length // (parts * pieces))
    x = x.reshape(batch, parts, length // parts, hidden)
    x = jnp.pad(x, ((0, 0), (0, 0), (0, pieces * size - x.shape[2]), (0, 0)))
    out = lax.map(piece, jnp.moveaxis(x.reshape(batch, parts, pieces, size, hidden), 2, 0))
    return jnp.moveaxis(out, 0, 2).reshape(x.shape)[:, :, : length // parts].reshape(batch, length, hidden)


def run_layer(
    weights: Params,
    config: Config,
    spec: LayerSpec,
    x: Array,
    pos: Array,
    state: Any,
    shared: Any,
    attend: Attend,
    rows: int = MLP_ROWS,
) -> tuple[Array, Any, Any]:
    """One transformer layer: x [B, T, hidden] -> the same, the layer's new state, and what it hands on."""
    with jax.named_scope("attention"):
        new = project(weights, config, spec, rms_norm(x, weights["attn_norm"], config), pos)
        out, state, shared = attend(spec, state, new, shared)
        out = merge(weights, config, out.astype(x.dtype))
        x = x + (rms_norm(out, weights["post_attn_norm"], config) if config.post_norms else out)
    with jax.named_scope("mlp"):
        out = mlp(weights, config, rms_norm(x, weights["mlp_norm"], config), rows)
        x = x + (rms_norm(out, weights["post_mlp_norm"], config) if config.post_norms else out)
    return tokens_apart(x), state, shared


def alike(states: Sequence[Any]) -> bool:
    """Whether pytrees agree in structure, static fields, shapes and dtypes, so that they can be stacked."""

    def shape(state):
        return jax.tree.structure(state), [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(state)]

    return all(shape(state) == shape(states[0]) for state in states[1:])


def run_layers(
    params: Params, config: Config, x: Array, pos: Array, states: Sequence[Any], shared: Any, attend: Attend
) -> tuple[Array, tuple[Any, ...], Any]:
    """All layers, each with its state; `shared` goes from one to the next.

    Stacked params (see `stack_layers`) run under `lax.scan` where a run has several layers whose states are alike.
    """
    if len(params["layers"]) == config.num_layers:
        run = [(i,) for i in range(config.num_layers)]
    else:
        run = layer_runs(config)
    new_states: list[Any] = []
    for layers, block in zip(run, params["layers"], strict=True):
        spec, mine = layer_spec(config, layers[0]), [states[i] for i in layers]
        stacked = block["attn_norm"].ndim == 2
        if stacked and len(layers) > 1 and alike(mine):

            def step(carry, xs, spec=spec):
                (x, shared), (weights, state) = carry, xs
                x, state, shared = run_layer(weights, config, spec, x, pos, state, shared, attend)
                return (x, shared), state

            together = jax.tree.map(lambda *leaves: jnp.stack(leaves), *mine)
            (x, shared), together = lax.scan(step, (x, shared), (block, together))
            new_states += [jax.tree.map(lambda leaf, i=i: leaf[i], together) for i in range(len(layers))]
            continue
        for i, state in enumerate(mine):
            weights = jax.tree.map(lambda leaf, i=i: leaf[i], block) if stacked else block
            x, state, shared = run_layer(weights, config, spec, x, pos, state, shared, attend)
            new_states.append(state)
    return x, tuple(new_states), shared


def positions(tokens: Array, lengths: Array | None) -> Array:
    """Positions [B, T] of right-padded prompts: 0, 1, ... and `EMPTY` from `lengths` [B] on."""
    pos = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    return pos if lengths is None else jnp.where(pos < lengths[:, None], pos, EMPTY)


def plain_attend(spec: LayerSpec, state: None, new: Tokens, shared: None) -> tuple[Array, None, None]:
    """Causal attention of a prompt over itself; nothing is stored."""
    out, _ = causal_attention(new.q, new.k, new.v, new.pos, scale=spec.scale, window=spec.window, softcap=spec.softcap)
    return out, state, shared


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
    states = (None,) * config.num_layers
    x, *_ = run_layers(params, config, embed(params, config, tokens), pos, states, None, plain_attend)
    return unembed(params, config, x)


__all__ = ["forward", "layer_params", "layer_spec", "run_layer", "run_layers"]
