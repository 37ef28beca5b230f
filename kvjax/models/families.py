"""Families as data: what each one's Hugging Face `config.json` means, and what it calls its weights.

`config_from_hf` turns the settings into a `Config`; `weight_table` says where every parameter lies. A `Family` holds
only what differs from the others: the settings that its `config.json` may leave out, which layers slide, and which
features it has. Both spellings of the settings are read: `rope_theta` with `rope_scaling`, and the `rope_parameters` of
transformers 5, for all layers at once or per layer type. A setting that would change what the model computes and that
kvjax does not have is refused.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, cast

from kvjax.models.config import Config, LayerType, Rope

Settings = Mapping[str, Any]


def config_from_hf(config_json: Mapping[str, Any], source: str) -> Config:
    """The architecture that a Hugging Face `config.json` describes.

    Args:
      config_json: The parsed file. For a multimodal Gemma 3 its `text_config` is used: kvjax runs the language model.
      source: The file's name, for error messages.

    Raises:
      ValueError: The family is unknown, or a setting is missing, of the wrong kind, or not supported.
    """
    model_type = _model_type(config_json, source)
    family = FAMILIES[model_type]
    if model_type == "gemma3":
        config_json = {**_required(config_json, "text_config", dict, source), **_outer_settings(config_json)}
    # An explicit null means "none", whatever the family's default is; so nulls go after the defaults came in.
    settings = {name: value for name, value in {**family.defaults, **config_json}.items() if value is not None}
    _refuse_unsupported(settings, family, source)

    hidden = _whole(settings, "hidden_size", source)
    heads = _whole(settings, "num_attention_heads", source)
    head_dim = _whole(settings, "head_dim", source) if "head_dim" in settings else hidden // heads
    max_length = _whole(settings, "max_position_embeddings", source)
    window = _window(settings, source)
    layer_types = _layer_types(settings, family, window, source)
    rope = _rope(settings, family, "full_attention", head_dim, source)
    sliding_rope = _rope(settings, family, "sliding_attention", head_dim, source)
    if window >= max_length and rope == sliding_rope:
        # The window hides nothing (Phi-3-mini-128k), so these layers are full, and open to compression.
        layer_types = ("full",) * len(layer_types)
    fields = {
        "family": family.name,
        "vocab_size": _whole(settings, "vocab_size", source),
        "hidden_size": hidden,
        "mlp_size": _whole(settings, "intermediate_size", source),
        "num_heads": heads,
        "num_kv_heads": _whole(settings, "num_key_value_heads", source, default=heads),
        "head_dim": head_dim,
        "layer_types": layer_types,
        "sliding_window": window if "sliding" in layer_types else 0,
        "rope": rope,
        "sliding_rope": sliding_rope,
        "max_length": max_length,
        "norm_eps": _number(settings, "rms_norm_eps", source),
        "activation": _activation(settings, source),
        "query_scale": head_dim**-0.5,
        "tied": bool(settings.get("tie_word_embeddings")),
        "bos_id": _whole(settings, "bos_token_id", source, default=-1, least=0),
        "eos_ids": token_ids(settings.get("eos_token_id"), f"{source}: eos_token_id"),
    }
    fields |= family.features(settings, source)
    try:
        return Config(**fields)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


def token_ids(value: Any, source: str) -> tuple[int, ...]:
    """Token ids from a setting that may be null, one id or a list.

    Raises:
      ValueError: It is something else.
    """
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
        raise ValueError(f"{source} is {value!r}, expected a token id, a list of token ids, or null.")
    return tuple(ids)


# --- Families ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """What sets a family apart.

    Attributes:
      name: `Config.family`.
      defaults: Settings that `config.json` may leave out, as transformers fills them in.
      sliding: (layer, settings, source) -> whether the layer slides, where settings have a window but no `layer_types`.
      features: (settings, source) -> fields of `Config` that only this family sets.
      layer_weights: Parameter to tensor name, within a layer.
    """

    name: str
    defaults: Settings
    sliding: Callable[[int, Settings, str], bool] = lambda layer, settings, source: False
    features: Callable[[Settings, str], dict[str, Any]] = lambda settings, source: {}
    layer_weights: Mapping[str, str]


def _gemma_features(settings: Settings, source: str) -> dict[str, Any]:
    return {
        "norm_offset": 1.0,
        "post_norms": True,
        "embed_scale": _whole(settings, "hidden_size", source) ** 0.5,
        "query_scale": _number(settings, "query_pre_attn_scalar", source) ** -0.5,
        "attn_softcap": _number(settings, "attn_logit_softcapping", source, default=0.0),
        "logit_softcap": _number(settings, "final_logit_softcapping", source, default=0.0),
    }


def _every_layer(layer: int, settings: Settings, source: str) -> bool:
    return True


def _after_first_layers(layer: int, settings: Settings, source: str) -> bool:
    return layer >= _whole(settings, "max_window_layers", source, least=0)


def _all_but_every_nth(layer: int, settings: Settings, source: str) -> bool:
    return (layer + 1) % _whole(settings, "sliding_window_pattern", source) != 0


_COMMON = {
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": False,
}
_QWEN = _COMMON | {
    "max_position_embeddings": 32_768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
_GEMMA = _COMMON | {
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
    "bos_token_id": 2,
    "eos_token_id": 1,
}

_PLAIN_WEIGHTS = {
    "attn_norm": "input_layernorm",
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "o_proj": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "gate_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "down_proj": "mlp.down_proj",
}
_FUSED_WEIGHTS = _PLAIN_WEIGHTS | {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "self_attn.qkv_proj"),
    **dict.fromkeys(("gate_proj", "up_proj"), "mlp.gate_up_proj"),
}
_QK_NORMS = {"q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm"}
_GEMMA_WEIGHTS = _PLAIN_WEIGHTS | {
    "post_attn_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "post_mlp_norm": "post_feedforward_layernorm",
}

_GEMMA3 = Family(
    name="gemma3",
    defaults=_GEMMA
    | {
        "vocab_size": 262_208,
        "max_position_embeddings": 131_072,
        "sliding_window_pattern": 6,
        "rope_theta": 1_000_000.0,
        "rope_local_base_freq": 10_000.0,
    },
    sliding=_all_but_every_nth,
    features=lambda settings, source: {**_gemma_features(settings, source), "qk_norm": True},
    layer_weights=_GEMMA_WEIGHTS | _QK_NORMS,
)

FAMILIES: Mapping[str, Family] = {  # By `model_type`.
    "llama": Family(
        name="llama",
        defaults=_COMMON | {"max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2},
        layer_weights=_PLAIN_WEIGHTS,
    ),
    "mistral": Family(
        name="mistral",
        defaults=_COMMON
        | {
            "num_key_value_heads": 8,
            "max_position_embeddings": 131_072,
            "sliding_window": 4096,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        sliding=_every_layer,
        layer_weights=_PLAIN_WEIGHTS,
    ),
    "qwen2": Family(
        name="qwen2",
        defaults=_QWEN,
        sliding=_after_first_layers,
        features=lambda settings, source: {"qkv_bias": True},
        layer_weights=_PLAIN_WEIGHTS
        | {"q_bias": "self_attn.q_proj", "k_bias": "self_attn.k_proj", "v_bias": "self_attn.v_proj"},
    ),
    "qwen3": Family(
        name="qwen3",
        defaults=_QWEN | {"head_dim": 128},
        sliding=_after_first_layers,
        features=lambda settings, source: {"qk_norm": True},
        layer_weights=_PLAIN_WEIGHTS | _QK_NORMS,
    ),
    "gemma2": Family(
        name="gemma2",
        defaults=_GEMMA
        | {
            "vocab_size": 256_000,
            "max_position_embeddings": 8192,
            "sliding_window_pattern": 2,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
        sliding=_all_but_every_nth,
        features=_gemma_features,
        layer_weights=_GEMMA_WEIGHTS,
    ),
    "gemma3_text": _GEMMA3,
    "gemma3": _GEMMA3,  # Multimodal: the language model is in `text_config`.
    "phi3": Family(
        name="phi3",
        defaults=_COMMON
        | {
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 4096,
            "original_max_position_embeddings": 4096,
            "bos_token_id": 1,
            "eos_token_id": 32_000,
        },
        sliding=_every_layer,
        layer_weights=_FUSED_WEIGHTS,
    ),
}

_ARCHITECTURES = {  # For a `config.json` without `model_type`.
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Gemma2ForCausalLM": "gemma2",
    "Gemma3ForCausalLM": "gemma3_text",
    "Gemma3ForConditionalGeneration": "gemma3",
    "Phi3ForCausalLM": "phi3",
}


# --- Weights ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Weight:
    """Where one parameter lies in a Hugging Face checkpoint.

    Attributes:
      name: Tensor, without the prefix of the model ("layers.0.self_attn.q_proj.weight").
      transpose: A matrix, stored [out, in].
      parts: Rows of each parameter that shares the tensor, where several are fused (Phi-3); () if it is ours alone.
      part: Which of `parts` is ours.
    """

    name: str
    transpose: bool = False
    parts: tuple[int, ...] = ()
    part: int = 0


def weight_table(config: Config) -> dict[str, Weight]:
    """Every parameter, by its path in the tree ("embed", "layers.3.q_proj"), and where it lies."""
    table = {"embed": Weight("embed_tokens.weight"), "final_norm": Weight("norm.weight")}
    table |= {} if config.tied else {"lm_head": Weight("lm_head.weight")}
    layer = _layer_table(config)
    return table | {
        f"layers.{i}.{name}": dataclasses.replace(weight, name=f"layers.{i}.{weight.name}")
        for i in range(config.num_layers)
        for name, weight in layer.items()
    }


def _layer_table(config: Config) -> dict[str, Weight]:
    """Parameter to `Weight` within one layer."""
    family = next(family for family in FAMILIES.values() if family.name == config.family)
    tensors = {
        name: f"{module}.{'bias' if name.endswith('_bias') else 'weight'}"
        for name, module in family.layer_weights.items()
    }
    q, kv, mlp = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim, config.mlp_size
    rows = {"q_proj": q, "k_proj": kv, "v_proj": kv, "gate_proj": mlp, "up_proj": mlp}

    def weight(name: str, tensor: str) -> Weight:
        fused = [other for other, its_tensor in tensors.items() if its_tensor == tensor]  # In their order within it.
        parts = tuple(rows[other] for other in fused) if len(fused) > 1 else ()
        return Weight(tensor, transpose=name.endswith("_proj"), parts=parts, part=fused.index(name))

    return {name: weight(name, tensor) for name, tensor in tensors.items()}


# --- Rotary embedding -------------------------------------------------------------------------------------------------


def _rope(settings: Settings, family: Family, layer_type: str, head_dim: int, source: str) -> Rope:
    """The rotary embedding of "full_attention" or "sliding_attention" layers."""
    parameters = _rope_parameters(settings, layer_type, source)
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if family.name == "phi3" and kind in ("su", "yarn"):
        kind = "longrope"  # Names it had before it was published.
    max_length = _whole(settings, "max_position_embeddings", source)
    # Older settings state the rotating share of a head outside the rope parameters.
    share = _number(settings, "partial_rotary_factor", source, default=1.0)
    share = _number(parameters, "partial_rotary_factor", source, default=share)
    rotary_dim = int(head_dim * share)
    if rotary_dim % 2 or not 0 < rotary_dim <= head_dim:
        raise ValueError(f"{source}: {rotary_dim} of {head_dim} channels rotate, expected an even number of them.")
    base = {"theta": _number(parameters, "rope_theta", source), "rotary_dim": rotary_dim}
    # Phi-3 states the original length outside the rope parameters; transformers gives that place precedence.
    lengths = parameters | {k: v for k, v in settings.items() if k == "original_max_position_embeddings"}
    original = _whole(lengths, "original_max_position_embeddings", source, default=max_length)

    match kind:
        case "default":
            return Rope(**base)
        case "linear":
            return Rope(**base, scaling="linear", factor=_number(parameters, "factor", source))
        case "llama3":
            return Rope(
                **base,
                scaling="llama3",
                factor=_number(parameters, "factor", source),
                original_length=original,
                low_freq_factor=_number(parameters, "low_freq_factor", source),
                high_freq_factor=_number(parameters, "high_freq_factor", source),
            )
        case "yarn":
            factor = _number(parameters, "factor", source, default=max_length / original)
            return Rope(
                **base,
                scaling="yarn",
                factor=factor,
                original_length=original,
                beta_fast=_number(parameters, "beta_fast", source, default=32.0),
                beta_slow=_number(parameters, "beta_slow", source, default=1.0),
                truncate=bool(parameters.get("truncate", True)),
                attention_factor=_yarn_attention_factor(parameters, factor, source),
            )
        case "longrope":
            factor = _number(parameters, "factor", source, default=max_length / original)
            inferred = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
            return Rope(
                **base,
                scaling="longrope",
                factor=factor,
                original_length=original,
                attention_factor=_number(parameters, "attention_factor", source, default=inferred),
                short_factor=_factors(parameters, "short_factor", rotary_dim, source),
                long_factor=_factors(parameters, "long_factor", rotary_dim, source),
            )
        case _:
            raise ValueError(
                f"{source}: rope type {kind!r} is not supported; supported: default, linear, llama3, yarn, longrope."
            )


def _rope_parameters(settings: Settings, layer_type: str, source: str) -> dict[str, Any]:
    """Rope settings of one layer type, whichever way they are spelled, with `rope_theta` filled in."""
    spelling = "rope_parameters" if settings.get("rope_parameters") else "rope_scaling"
    given = settings.get(spelling) or {}
    # Gemma 3 rotates sliding layers with a base of their own; settings for all layers at once do not concern them.
    local = layer_type == "sliding_attention" and "rope_local_base_freq" in settings
    if isinstance(given, Mapping) and {"full_attention", "sliding_attention"} & given.keys():
        given = given.get(layer_type) or {}
    elif local:
        given = {}
    if not isinstance(given, Mapping):
        raise ValueError(f"{source}: {spelling} is {given!r}, expected an object.")
    theta = settings.get("rope_local_base_freq" if local else "rope_theta")
    return {"rope_theta": theta, **{name: value for name, value in given.items() if value is not None}}


def _yarn_attention_factor(parameters: Settings, factor: float, source: str) -> float:
    """Stated, or inferred from `factor`: sharper attention over longer contexts (arXiv 2309.00071, section 3.4)."""

    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    numerator = _number(parameters, "mscale", source, default=0.0)
    denominator = _number(parameters, "mscale_all_dim", source, default=0.0)
    inferred = mscale(numerator) / mscale(denominator) if numerator and denominator else mscale(1.0)
    return _number(parameters, "attention_factor", source, default=inferred)


def _factors(parameters: Settings, name: str, rotary_dim: int, source: str) -> tuple[float, ...]:
    factors = _required(parameters, name, list, source)
    if len(factors) != rotary_dim // 2:
        raise ValueError(
            f"{source}: {name} has {len(factors)} factors, expected {rotary_dim // 2} (one per rotating pair)."
        )
    return tuple(float(factor) for factor in factors)


# --- Layers, activation, what is refused ------------------------------------------------------------------------------


def _window(settings: Settings, source: str) -> int:
    """Width of sliding layers, 0 where no layer slides."""
    return _whole(settings, "sliding_window", source, default=0) if settings.get("use_sliding_window", True) else 0


def _layer_types(settings: Settings, family: Family, window: int, source: str) -> tuple[LayerType, ...]:
    depth = _whole(settings, "num_hidden_layers", source)
    kinds = {"sliding_attention": "sliding", "full_attention": "full"}
    slides = [window > 0 and family.sliding(i, settings, source) for i in range(depth)]
    listed = settings.get("layer_types", ["sliding_attention" if slide else "full_attention" for slide in slides])
    if unknown := set(listed) - kinds.keys():
        raise ValueError(f"{source}: layer_types has {sorted(unknown)}; supported: {', '.join(kinds)}.")
    if len(listed) != depth:
        raise ValueError(f"{source}: layer_types lists {len(listed)} layers, expected num_hidden_layers = {depth}.")
    if "sliding_attention" in listed and not window:
        raise ValueError(f"{source}: layer_types lists sliding layers, but sliding_window is not set or not in use.")
    return tuple(cast(LayerType, kinds[kind]) for kind in listed)


def _activation(settings: Settings, source: str) -> str:
    known = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
    name = settings.get("hidden_activation", settings.get("hidden_act"))
    if name not in known:
        raise ValueError(f"{source}: activation {name!r} is not supported; supported: {', '.join(known)}.")
    return known[name]


def _model_type(config_json: Settings, source: str) -> str:
    stated, architectures = config_json.get("model_type"), config_json.get("architectures") or []
    names = [stated] if stated else [_ARCHITECTURES.get(architecture, "") for architecture in architectures]
    for name in names:
        if name in FAMILIES:
            return name
    raise ValueError(
        f"{source}: model_type is {stated!r} and architectures {architectures}, which is not among the supported: "
        f"{', '.join(FAMILIES)}."
    )


def _outer_settings(config_json: Settings) -> dict[str, Any]:
    """What a multimodal config says about its language model outside `text_config`."""
    names = ("bos_token_id", "eos_token_id", "tie_word_embeddings", "quantization_config")
    return {name: config_json[name] for name in names if name in config_json}


def _refuse_unsupported(settings: Settings, family: Family, source: str) -> None:
    """Refuses settings that change what the model computes."""
    unsupported = {
        "attention_bias": "biases on attention projections",
        "mlp_bias": "biases in the MLP",
        "use_bidirectional_attention": "attention to later tokens",
        "num_local_experts": "mixtures of experts",
        "num_experts": "mixtures of experts",
        "quantization_config": "quantized weights; load the original checkpoint, or a GGUF file of it",
    }
    for name, meaning in unsupported.items():
        if settings.get(name):
            raise ValueError(f"{source}: {name} is {settings[name]!r}; not supported for {family.name}: {meaning}.")


# --- Reading settings -------------------------------------------------------------------------------------------------


def _required(settings: Settings, name: str, kind: type, source: str) -> Any:
    if settings.get(name) is None:
        raise ValueError(f"{source}: {name} is missing; a {kind.__name__} is needed.")
    if not isinstance(settings[name], kind):
        raise ValueError(f"{source}: {name} is {settings[name]!r}, expected a {kind.__name__}.")
    return settings[name]


def _number(settings: Settings, name: str, source: str, default: float | None = None) -> float:
    """A setting as float; `default` where it is absent or null."""
    value = settings.get(name, default)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        found = "missing" if value is None else repr(value)
        raise ValueError(f"{source}: {name} is {found}, expected a number.")
    return float(value)


def _whole(settings: Settings, name: str, source: str, default: int | None = None, least: int = 1) -> int:
    """A setting as int of at least `least`; `default`, unchecked, where it is absent or null."""
    value = settings.get(name)
    if value is None and default is not None:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        found = "missing" if value is None else repr(value)
        raise ValueError(f"{source}: {name} is {found}, expected a whole number of at least {least}.")
    return value
