"""Every family against what transformers computes from the same files; `scripts/record_families.py` recorded it."""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.checkpoints import huggingface
from kvjax.models.config import Config
from kvjax.models.families import FAMILIES, config_from_hf, token_ids, weight_table
from kvjax.models.params import abstract_params, layer_names
from kvjax.models.rope import inverse_frequencies
from kvjax.models.transformer import forward

DATA = Path(__file__).parents[1] / "data" / "families"
NAMES = sorted(path.name for path in DATA.iterdir() if path.is_dir())
LONGROPE = ["phi3_longrope", "phi3_partial"]
TOLERANCE = 1e-5  # Of the largest logit. Measured: 2e-6; rounding in another order.


@functools.cache
def model(name: str):
    params, config, _ = huggingface.load(DATA / name, jnp.float32)
    return params, config


@functools.cache
def expected(name: str) -> dict[str, np.ndarray]:
    return dict(np.load(DATA / name / "expected.npz"))


def text(name: str, kind: str = "") -> np.ndarray:
    """Prompts with their greedy continuation but its last token: each argmax along it must be the next one."""
    return np.concatenate((expected(name)[f"{kind}ids"], expected(name)[f"{kind}greedy"][:, :-1]), axis=1)


def error(logits, reference: np.ndarray) -> float:
    """Largest deviation, in units of the largest logit."""
    return np.abs(np.asarray(logits) - reference).max() / np.abs(reference).max()


@pytest.mark.parametrize("name", NAMES)
def test_logits_and_greedy_continuation(name):
    params, config = model(name)
    want = expected(name)
    length = want["ids"].shape[1]
    logits = forward(params, config, text(name))
    assert error(logits[:, :length], want["logits"]) < TOLERANCE
    np.testing.assert_array_equal(np.argmax(logits[:, length - 1 :], axis=-1), want["greedy"])


@pytest.mark.parametrize("name", LONGROPE)
def test_longrope_decides_per_row(name):
    # One row beyond the original length and one, padded, below: each as if it were alone.
    params, config = model(name)
    want, long, short = expected(name), text(name), text(name, "short_")
    tokens = np.stack((long[0], np.pad(short[1], (0, long.shape[1] - short.shape[1]))))
    logits = forward(params, config, tokens, lengths=jnp.array([long.shape[1], short.shape[1]]))
    prompt = want["short_ids"].shape[1]
    assert error(logits[0, : want["ids"].shape[1]], want["logits"][0]) < TOLERANCE
    assert error(logits[1, :prompt], want["short_logits"][1]) < TOLERANCE
    np.testing.assert_array_equal(np.argmax(logits[1, prompt - 1 : short.shape[1]], -1), want["short_greedy"][1])
    assert error(want["logits"][:, :prompt], want["short_logits"]) > 100 * TOLERANCE  # Or nothing would be shown.


def without(**changes):
    return lambda config: dataclasses.replace(config, **changes)


def with_rope(**changes):
    return lambda config: dataclasses.replace(config, rope=dataclasses.replace(config.rope, **changes))


# If the recorded models did not depend on a feature, agreeing with them would say nothing about it.
FEATURES = {
    "llama3 rope": ("llama31", with_rope(scaling="none")),
    "llama3 factor": ("llama32_tied", with_rope(factor=8.0)),
    "yarn ramp": ("llama_yarn_mqa", with_rope(beta_fast=32.0)),
    "yarn rounding": ("llama_yarn_mqa", with_rope(truncate=True)),
    "yarn attention": ("qwen25_yarn", with_rope(attention_factor=1.0)),
    "window": ("mistral_sliding", without(sliding_window=9)),
    "first layers full": ("qwen25_sliding", without(layer_types=("sliding",) * 3)),
    "bias": ("qwen2", without(qkv_bias=False)),
    "qk norm": ("qwen3", without(qk_norm=False)),
    "norm epsilon": ("llama32_tied", without(norm_eps=1e-2)),
    "norm offset": ("gemma2", without(norm_offset=0.0)),
    "post norms": ("gemma2", without(post_norms=False)),
    "attention softcap": ("gemma2", without(attn_softcap=0.0)),
    "logit softcap": ("gemma2", without(logit_softcap=0.0)),
    "query scale": ("gemma2", without(query_scale=16**-0.5)),
    "embed scale": ("gemma2", without(embed_scale=1.0)),
    "activation": ("gemma3", without(activation="silu")),
    "linear rope": ("gemma3", with_rope(scaling="none")),
    "local rope": ("gemma3", lambda config: dataclasses.replace(config, sliding_rope=config.rope)),
    "longrope factors": ("phi3_longrope", lambda c: with_rope(long_factor=c.rope.short_factor)(c)),
    "longrope attention": ("phi3_longrope", with_rope(attention_factor=1.0)),
    "partial rotation": (
        "phi3_partial",
        lambda c: with_rope(rotary_dim=4, long_factor=c.rope.long_factor[:2], short_factor=c.rope.short_factor[:2])(c),
    ),
}


@pytest.mark.parametrize("feature", FEATURES)
def test_recorded_models_depend_on(feature):
    name, change = FEATURES[feature]
    params, config = model(name)
    want = expected(name)
    with jax.disable_jit():  # Compiling once more takes longer.
        logits = forward(params, change(config), want["ids"])
    assert error(logits, want["logits"]) > 30 * TOLERANCE


@pytest.mark.parametrize("name", NAMES)
def test_weight_table_has_every_parameter(name):
    _, config = model(name)
    layers = {f"layers.{i}.{leaf}" for i in range(config.num_layers) for leaf in layer_names(config)}
    top = set(abstract_params(config)) - {"layers"}
    assert set(weight_table(config)) == layers | top


# --- Settings ---------------------------------------------------------------------------------------------------------

ROPES = json.loads((DATA / "rope.json").read_text())


@pytest.mark.parametrize("name", ROPES)
def test_rope_frequencies(name):
    want = ROPES[name]
    rope = config_from_hf(want["settings"], "config.json").rope
    for long, key in ((False, "frequencies"), (True, "long_frequencies")):
        found = inverse_frequencies(rope, long=long)
        assert found.dtype == np.float32
        # One unit in the last place: PyTorch's power is not always correctly rounded.
        np.testing.assert_array_max_ulp(found, np.array(want[key], np.float32), maxulp=1)
    np.testing.assert_allclose(rope.attention_factor, want["attention_factor"], rtol=1e-12)


TINY = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
}


def parse(model_type: str, **settings) -> Config:
    return config_from_hf({**TINY, "model_type": model_type, **settings}, "config.json")


def test_defaults_are_those_of_transformers():
    assert parse("llama", num_key_value_heads=None).num_kv_heads == 4
    assert parse("llama").eos_ids == (2,)
    assert parse("qwen2").bos_id == -1 and parse("qwen2").eos_ids == ()
    assert parse("qwen3").head_dim == 128
    assert parse("phi3").norm_eps == 1e-5
    assert parse("gemma2").tied and not parse("llama").tied
    assert (parse("gemma2").attn_softcap, parse("gemma3_text").attn_softcap) == (50.0, 0.0)


def test_gemma3_hub_settings_leave_most_out():
    # As google/gemma-3-4b-it states its language model.
    text_config = {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    }
    settings = {"model_type": "gemma3", "eos_token_id": [1, 106], "text_config": text_config, "vision_config": {}}
    config = config_from_hf(settings, "config.json")
    assert (config.family, config.vocab_size, config.max_length) == ("gemma3", 262_208, 131_072)
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (8, 4, 256)
    assert config.full_layers == (5, 11, 17, 23, 29)
    assert (config.rope.scaling, config.rope.factor, config.rope.theta) == ("linear", 8.0, 1e6)
    assert (config.sliding_rope.scaling, config.sliding_rope.theta) == ("none", 1e4)
    assert config.eos_ids == (1, 106) and config.tied and config.qk_norm and config.post_norms
    assert config.query_scale == 256**-0.5 and config.embed_scale == 2560**0.5


def test_old_and_new_spelling_agree():
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}
    old = parse("llama", rope_theta=5e5, rope_scaling=scaling)
    assert old == parse("llama", rope_parameters={"rope_theta": 5e5, **scaling})
    assert old == parse(
        "llama", rope_theta=5e5, rope_scaling={("type" if k == "rope_type" else k): v for k, v in scaling.items()}
    )
    per_layer = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    pattern = {"head_dim": 16, "sliding_window": 8}
    new = parse(
        "gemma3_text", rope_parameters=per_layer, layer_types=["sliding_attention", "full_attention"] * 2, **pattern
    )
    old = parse(
        "gemma3_text",
        rope_scaling={"type": "linear", "factor": 8.0},
        sliding_window_pattern=2,
        rope_theta=1e6,
        **pattern,
    )
    assert new == old and new.layer_types == ("sliding", "full") * 2


@pytest.mark.parametrize("kind", ["su", "yarn", "longrope"])
def test_phi3_names_of_longrope(kind):
    factors = {"short_factor": [1.0] * 6, "long_factor": [2] * 6}
    config = parse(
        "phi3",
        rope_scaling={"type": kind, **factors},
        original_max_position_embeddings=512,
        partial_rotary_factor=0.75,
    )
    assert config.rope.scaling == "longrope" and config.rope.rotary_dim == 12
    assert config.rope.original_length == 512 and config.rope.factor == 2.0
    assert config.rope.attention_factor == pytest.approx((1 + np.log(2) / np.log(512)) ** 0.5)


@pytest.mark.parametrize(
    "model_type, settings, layer_types",
    [
        ("llama", {"sliding_window": None}, ("full",) * 4),
        ("mistral", {"sliding_window": None}, ("full",) * 4),
        ("mistral", {"sliding_window": 16}, ("sliding",) * 4),
        ("mistral", {"sliding_window": 1024}, ("full",) * 4),  # A window as long as the context hides nothing.
        ("qwen2", {"sliding_window": 16, "max_window_layers": 2}, ("full",) * 4),  # use_sliding_window is false.
        (
            "qwen2",
            {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2},
            ("full", "full", "sliding", "sliding"),
        ),
        ("qwen3", {"layer_types": ["full_attention"] * 4}, ("full",) * 4),
        ("phi3", {"sliding_window": 16}, ("sliding",) * 4),
        ("phi3", {}, ("full",) * 4),
        ("gemma2", {"sliding_window": 16}, ("sliding", "full") * 2),
        ("gemma3_text", {"sliding_window": 16}, ("sliding",) * 4),
        # Rotated with a base of their own, so they stay what they are, however long the window.
        ("gemma3_text", {"sliding_window": 4096, "sliding_window_pattern": 4}, ("sliding",) * 3 + ("full",)),
    ],
)
def test_layer_types(model_type, settings, layer_types):
    config = parse(model_type, **settings)
    assert config.layer_types == layer_types
    assert config.sliding_window == (settings["sliding_window"] if "sliding" in layer_types else 0)


def test_architecture_stands_in_for_model_type():
    assert config_from_hf({**TINY, "architectures": ["Qwen3ForCausalLM"]}, "config.json").family == "qwen3"


@pytest.mark.parametrize(
    "model_type, settings, message",
    [
        ("mixtral", {}, "config.json: model_type is 'mixtral'.*supported: llama, mistral"),
        ("", {"architectures": ["FalconForCausalLM"]}, "Falcon"),
        ("llama", {"hidden_size": None}, "hidden_size is missing, expected a whole number"),
        ("llama", {"hidden_size": "big"}, "hidden_size is 'big', expected a whole number"),
        ("llama", {"num_hidden_layers": 0}, "num_hidden_layers is 0, expected a whole number of at least 1"),
        ("llama", {"rms_norm_eps": None}, "rms_norm_eps is missing, expected a number"),
        ("llama", {"num_key_value_heads": 3}, r"config.json: num_heads \(4\) must be a multiple"),
        ("llama", {"hidden_act": "relu"}, "activation 'relu' is not supported; supported: silu"),
        ("llama", {"attention_bias": True}, "attention_bias is True; not supported for llama"),
        ("llama", {"quantization_config": {"quant_method": "gptq"}}, "quantized weights; load the original"),
        ("qwen3", {"num_experts": 8}, "mixtures of experts"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "attention to later tokens"),
        ("gemma3", {}, "text_config is missing"),
        (
            "llama",
            {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
            "rope type 'dynamic' is not supported; supported: def",
        ),
        ("llama", {"rope_scaling": {"type": "linear"}}, "factor is missing"),
        ("llama", {"rope_scaling": "linear"}, "rope_scaling is 'linear', expected an object"),
        ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor is missing"),
        ("llama", {"partial_rotary_factor": 0.2}, "3 of 16 channels rotate, expected an even number"),
        (
            "phi3",
            {"rope_scaling": {"type": "longrope", "short_factor": [1.0]}},
            "short_factor has 1 factors, expected 8",
        ),
        ("phi3", {"rope_scaling": {"type": "longrope"}}, "short_factor is missing; a list is needed"),
        ("qwen2", {"layer_types": ["full_attention"]}, "layer_types lists 1 layers, expected num_hidden_layers = 4"),
        ("qwen2", {"layer_types": ["chunked_attention"] * 4}, "layer_types has .*chunked_attention"),
        ("qwen2", {"layer_types": ["sliding_attention"] * 4}, "sliding_window is not set or not in use"),
        ("llama", {"eos_token_id": "</s>"}, "eos_token_id is '</s>', expected a token id"),
    ],
)
def test_refused(model_type, settings, message):
    with pytest.raises(ValueError, match=message):
        parse(model_type, **settings)


def test_token_ids():
    assert token_ids(None, "x") == () and token_ids(3, "x") == (3,) and token_ids([3, 4], "x") == (3, 4)
    with pytest.raises(ValueError, match="x is True"):
        token_ids(True, "x")


def test_every_family_was_recorded():
    assert {model(name)[1].family for name in NAMES} == {family.name for family in FAMILIES.values()}
