"""The parameters of a decoder, declared once: an NNX module that holds arrays and computes nothing.

`Decoder` says each array's shape, axes and initializer. Everything else works on plain nested dicts of arrays:
`abstract_params` gives shapes for loading, `init_params` random weights, `stack_layers` the layout that `lax.scan`
wants.

Latent attention (`Config.mla`) has instead of k_proj and v_proj a matrix `kv_down` from a layer's input to the one key
that is stored, and for every query head `k_up`, which takes its queries to that key, and `v_up`, which takes the mixed
latents to its values. Where keys are normed per head (`qk_norm`), which no matrix can absorb, k_proj, v_proj and k_norm
stay and `kv_down` starts from the keys and values of all heads.

    {"embed": [vocab, hidden], "final_norm": [hidden], "lm_head": [vocab, hidden] unless tied,
     "layers": (one dict per layer) or (one dict per run of like layers, every leaf with a leading layer axis)}
"""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from kvjax.models.config import Config

# Logical axes of every parameter; a sharding is a table from these names to mesh axes.
AXES = {
    "embed": ("vocab", "hidden"),
    "lm_head": ("vocab", "hidden"),
    "final_norm": ("hidden",),
    "attn_norm": ("hidden",),
    "post_attn_norm": ("hidden",),
    "mlp_norm": ("hidden",),
    "post_mlp_norm": ("hidden",),
    "q_proj": ("hidden", "heads"),
    "k_proj": ("hidden", "kv_heads"),
    "v_proj": ("hidden", "kv_heads"),
    "q_bias": ("heads",),
    "k_bias": ("kv_heads",),
    "v_bias": ("kv_heads",),
    "q_norm": ("head_dim",),
    "k_norm": ("head_dim",),
    "o_proj": ("heads", "hidden"),
    "kv_down": ("kv_in", "latent_key"),
    "kv_bias": ("latent_key",),
    "k_up": ("query_heads", "head_dim", "latent_key"),
    "v_up": ("query_heads", "latent", "head_dim"),
    "gate_proj": ("hidden", "mlp"),
    "up_proj": ("hidden", "mlp"),
    "down_proj": ("mlp", "hidden"),
}


def axis_sizes(config: Config) -> dict[str, int]:
    """Size of every logical axis ("heads" and "kv_heads" count channels of all heads)."""
    kv, mla = config.num_kv_heads * config.head_dim, config.mla
    latent = {"kv_in": 2 * kv if config.qk_norm else config.hidden_size, "latent_key": config.key_dim}
    return {
        "vocab": config.vocab_size,
        "hidden": config.hidden_size,
        "mlp": config.mlp_size,
        "heads": config.num_heads * config.head_dim,
        "kv_heads": kv,
        "head_dim": config.head_dim,
        "query_heads": config.num_heads,
        **({**latent, "latent": mla.rank} if mla else {}),
    }


def layer_names(config: Config) -> list[str]:
    """Parameters of one layer."""
    names = ["attn_norm", "q_proj", "k_proj", "v_proj", "o_proj", "mlp_norm", "gate_proj", "up_proj", "down_proj"]
    names += ["q_bias", "k_bias", "v_bias"] if config.qkv_bias else []
    if config.mla:
        names += ["kv_down", "k_up", "v_up"]
        if not config.qk_norm:
            absorbed = ("k_proj", "v_proj", "k_bias", "v_bias")
            names = [name for name in names if name not in absorbed] + (["kv_bias"] if config.qkv_bias else [])
    names += ["q_norm", "k_norm"] if config.qk_norm else []
    names += ["post_attn_norm", "post_mlp_norm"] if config.post_norms else []
    return names


class Arrays(nnx.Module):
    """Named parameters: matrices drawn at 1 / sqrt(fan-in), norm weights at identity, biases at zero."""

    def __init__(self, config: Config, names: list[str], *, rngs: nnx.Rngs, dtype: Any):
        sizes = axis_sizes(config)
        for name in names:
            shape = tuple(sizes[axis] for axis in AXES[name])
            if len(shape) > 1:
                fan_in = config.hidden_size if name in ("embed", "lm_head") else shape[-2]
                value = jax.random.normal(rngs.params(), shape, dtype) * fan_in**-0.5
            else:
                value = jnp.full(shape, 1 - config.norm_offset if name.endswith("norm") else 0, dtype)
            setattr(self, name, nnx.Param(value))


class Decoder(nnx.Module):
    """All parameters of a model."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs, dtype: Any = jnp.float32):
        top = ["embed", "final_norm"] + ([] if config.tied else ["lm_head"])
        self.top = Arrays(config, top, rngs=rngs, dtype=dtype)
        self.layers = nnx.List(
            Arrays(config, layer_names(config), rngs=rngs, dtype=dtype) for _ in range(config.num_layers)
        )


def to_params(module: Decoder) -> dict[str, Any]:
    """The module's arrays as the nested dict that the forward pass takes."""
    state = nnx.to_pure_dict(nnx.state(module, nnx.Param))
    return {**state["top"], "layers": tuple(state["layers"][i] for i in range(len(state["layers"])))}


def init_params(config: Config, key: jax.Array, dtype: Any = jnp.float32) -> dict[str, Any]:
    """Random parameters, one dict per layer."""
    return to_params(Decoder(config, rngs=nnx.Rngs(params=key), dtype=dtype))


def abstract_params(config: Config, dtype: Any = jnp.float32) -> dict[str, Any]:
    """The same pytree as `init_params`, of `jax.ShapeDtypeStruct`."""
    return jax.eval_shape(lambda key: init_params(config, key, dtype), jax.random.key(0))


def layer_runs(config: Config) -> list[tuple[int, ...]]:
    """Runs of consecutive layers of one type."""
    groups = itertools.groupby(range(config.num_layers), key=lambda i: config.layer_types[i])
    return [tuple(run) for _, run in groups]


def stack_layers(params: dict[str, Any], config: Config) -> dict[str, Any]:
    """Params whose "layers" are runs of like layers, stacked: compiles in one body per run under `lax.scan`.

    Worth it on accelerators for deep models. On CPUs a scan copies every layer's weights at every step (twice the time
    of a decode step, measured), so `kvjax.load` leaves layers apart there.
    """
    layers = params["layers"]
    stacked = [jax.tree.map(lambda *leaves: jnp.stack(leaves), *(layers[i] for i in run)) for run in layer_runs(config)]
    return {**params, "layers": tuple(stacked)}


def layer_params(params: dict[str, Any], config: Config) -> tuple[dict[str, Any], ...]:
    """One dict per layer, whichever layout the params have."""
    blocks = params["layers"]
    if len(blocks) == config.num_layers and blocks[0]["attn_norm"].ndim == 1:
        return blocks
    return tuple(
        jax.tree.map(lambda leaf, i=i: leaf[i], block) for block in blocks for i in range(block["attn_norm"].shape[0])
    )
