"""Hugging Face folders: what loads, and what each kind of damage says."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tokenizers
from safetensors.numpy import load_file, save_file

from kvjax.checkpoints.check import CheckpointError
from kvjax.checkpoints.huggingface import load, read_config

DATA = Path(__file__).parents[1] / "data" / "families"
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def copy(tmp_path):
    """Copies a recorded folder to a place where it may be damaged."""

    def to_damage(name: str) -> Path:
        return Path(shutil.copytree(DATA / name, tmp_path / name))

    return to_damage


def edit_json(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(folder: Path, edit) -> None:
    """Rewrites model.safetensors; `edit` changes the dict of its tensors in place."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file({name: np.ascontiguousarray(value) for name, value in tensors.items()}, path)


def assert_same(params, others) -> None:
    jax.tree.map(np.testing.assert_array_equal, params, others)


# --- What loads -------------------------------------------------------------------------------------------------------


def test_layout():
    params, config, tokenizer = load(DATA / "llama2", jnp.float32)
    stored = load_file(DATA / "llama2" / "model.safetensors")
    layer = params["layers"][1]
    np.testing.assert_array_equal(params["embed"], stored["model.embed_tokens.weight"])
    np.testing.assert_array_equal(params["lm_head"], stored["lm_head.weight"])
    np.testing.assert_array_equal(layer["down_proj"], stored["model.layers.1.mlp.down_proj.weight"].T)
    np.testing.assert_array_equal(layer["mlp_norm"], stored["model.layers.1.post_attention_layernorm.weight"])
    assert config.eos_ids == (2,) and tokenizer is None


def test_gemma_norms():
    layer = load(DATA / "gemma2", jnp.float32)[0]["layers"][0]
    stored = load_file(DATA / "gemma2" / "model.safetensors")
    for ours, theirs in {
        "attn_norm": "input_layernorm",
        "post_attn_norm": "post_attention_layernorm",
        "mlp_norm": "pre_feedforward_layernorm",
        "post_mlp_norm": "post_feedforward_layernorm",
    }.items():
        np.testing.assert_array_equal(layer[ours], stored[f"model.layers.0.{theirs}.weight"].astype(np.float32))


def test_phi3_is_unfused():
    params, config, _ = load(DATA / "phi3_longrope", jnp.float32)
    stored = load_file(DATA / "phi3_longrope" / "model.safetensors")
    layer = params["layers"][0]
    qkv = jnp.concatenate([layer[name] for name in ("q_proj", "k_proj", "v_proj")], axis=1)
    np.testing.assert_array_equal(qkv.T, stored["model.layers.0.self_attn.qkv_proj.weight"])
    np.testing.assert_array_equal(
        layer["up_proj"].T, stored["model.layers.0.mlp.gate_up_proj.weight"][config.mlp_size :]
    )


@pytest.mark.parametrize("name", ["llama32_tied", "llama2"])  # Stored as bfloat16 and as float16.
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_dtype(name, dtype):
    params, _, _ = load(DATA / name, dtype)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(dtype)}
    stored = load_file(DATA / name / "model.safetensors")[Q_PROJ]
    np.testing.assert_array_equal(params["layers"][0]["q_proj"], stored.T.astype(dtype))


def test_shards_equal_one_file(copy):
    folder = copy("llama31")
    tensors = {}
    for shard in folder.glob("*.safetensors"):
        tensors |= load_file(shard)
    save_file(tensors, folder / "model.safetensors")
    assert len(list(folder.glob("model-*"))) == 3
    assert_same(load(DATA / "llama31")[0], load(folder)[0])


@pytest.mark.parametrize("prefix", ["language_model.", "model.language_model."])
def test_multimodal_gemma3(copy, prefix):
    folder = copy("gemma3")

    def nest(tensors):
        for name in list(tensors):
            inner = name if prefix == "language_model." else name.removeprefix("model.")
            tensors[prefix + inner] = tensors.pop(name)
        tensors["vision_tower.vision_model.head.weight"] = np.ones(3, np.float16)
        tensors["model.multi_modal_projector.mm_input_projection_weight"] = np.ones(3, np.float16)

    edit_tensors(folder, nest)
    text_config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": text_config}))
    params, config, _ = load(folder)
    assert config == read_config(DATA / "gemma3")
    assert_same(params, load(DATA / "gemma3")[0])


def test_repeated_tied_head_and_stored_frequencies_are_no_weights(copy):
    folder = copy("llama32_tied")

    def add(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(8, np.float32)

    edit_tensors(folder, add)
    assert_same(load(folder)[0], load(DATA / "llama32_tied")[0])


def test_generation_config_has_the_last_word_on_eos(copy):
    folder = copy("llama2")
    (folder / "generation_config.json").write_text('{"eos_token_id": [5, 6]}')
    assert read_config(folder).eos_ids == (5, 6)
    (folder / "generation_config.json").write_text('{"temperature": 0.6}')
    assert read_config(folder).eos_ids == (2,)


def test_tokenizer(copy):
    folder = copy("llama2")
    words = {"<unk>": 0, "<s>": 1, "</s>": 2, "hello": 3, "world": 4}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.save(str(folder / "tokenizer.json"))
    _, config, tokenizer = load(folder)
    assert tokenizer is not None and tokenizer.encode("hello world") == [3, 4]
    # This tokenizer puts nothing in front of a text, whatever config.json names as BOS.
    assert config.bos_id == -1 and config.eos_ids == (2,)


# --- Damage -----------------------------------------------------------------------------------------------------------


def refuse(folder: Path, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        load(folder, jnp.float32)


def test_no_config(copy):
    folder = copy("llama2")
    (folder / "config.json").unlink()
    refuse(folder, r"config\.json is missing")


@pytest.mark.parametrize("text, message", [("{", "is not valid JSON"), ("[1]", "holds a list, expected a JSON object")])
def test_config_is_no_object(copy, text, message):
    folder = copy("llama2")
    (folder / "config.json").write_text(text)
    refuse(folder, rf"config\.json {message}")


def test_unsupported_settings_name_the_file(copy):
    folder = copy("llama2")
    edit_json(folder / "config.json", model_type="mixtral")
    refuse(folder, r"llama2.config\.json: model_type is 'mixtral'")


def test_no_weights(copy):
    folder = copy("llama2")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refuse(folder, r"has neither model\.safetensors nor .*; it has config\.json, expected\.npz, pytorch_model\.bin\.")


def test_missing_shard_is_named(copy):
    folder = copy("llama31")
    (folder / "model-00002-of-00003.safetensors").unlink()
    refuse(folder, r"lacks 1 of 3 shards: model-00002-of-00003\.safetensors")


def test_index_without_map(copy):
    folder = copy("llama31")
    edit_json(folder / "model.safetensors.index.json", weight_map=None)
    refuse(folder, r"index\.json has no weight_map")


def test_shard_lacks_what_the_index_says(copy):
    folder = copy("llama31")
    index = folder / "model.safetensors.index.json"
    shards = json.loads(index.read_text())["weight_map"]
    edit_json(index, weight_map=shards | {"model.extra.weight": shards[Q_PROJ]})
    refuse(folder, rf"{shards[Q_PROJ]} lacks model\.extra\.weight, which the index says it holds")


@pytest.mark.parametrize("size", [0, 4, 1000, 100_000])  # Nothing, half a length, half a header, half the weights.
def test_truncated(copy, size):
    folder = copy("llama2")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    refuse(folder, rf"model\.safetensors \({size} bytes\) is not a complete safetensors file")


def test_missing_tensor(copy):
    folder = copy("llama2")
    edit_tensors(folder, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    refuse(folder, r"llama2: 1 tensor is missing: layers\.1\.mlp\.up_proj\.weight")


def test_unexpected_tensor(copy):
    folder = copy("llama2")
    edit_tensors(
        folder, lambda tensors: tensors.update({"model.layers.0.self_attn.q_proj.bias": np.ones(64, np.float16)})
    )
    refuse(folder, r"not expected: layers\.0\.self_attn\.q_proj\.bias")


def test_tied_head_that_differs(copy):
    folder = copy("llama32_tied")
    edit_tensors(folder, lambda tensors: tensors.update({"lm_head.weight": np.ones((128, 32), ml_dtypes.bfloat16)}))
    refuse(folder, r"tie_word_embeddings is true, but lm_head\.weight differs from model\.embed_tokens\.weight")


def test_wrong_shape(copy):
    folder = copy("llama2")
    edit_tensors(folder, lambda tensors: tensors.update({Q_PROJ: tensors[Q_PROJ][:48]}))
    refuse(folder, rf"model\.safetensors: tensor {Q_PROJ} has shape \(48, 64\), expected \(64, 64\)\.")


def test_wrong_shape_of_a_fused_tensor(copy):
    folder = copy("phi3_longrope")
    name = "model.layers.0.self_attn.qkv_proj.weight"
    edit_tensors(folder, lambda tensors: tensors.update({name: np.concatenate((tensors[name], tensors[name]))}))
    refuse(folder, rf"{name} has shape \(256, 64\), expected \(128, 64\) \(64 \+ 32 \+ 32 rows\)")


def test_quantized_dtype(copy):
    folder = copy("llama2")
    edit_tensors(folder, lambda tensors: tensors.update({Q_PROJ: tensors[Q_PROJ].astype(np.int8)}))
    refuse(folder, rf"{Q_PROJ} is stored as I8, expected one of BF16, F16, F32, F64")


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_not_finite(copy, bad):
    folder = copy("llama2")

    def damage(tensors):
        tensors[Q_PROJ] = tensors[Q_PROJ].copy()
        tensors[Q_PROJ][3, 5] = bad

    edit_tensors(folder, damage)
    refuse(folder, rf"tensor {Q_PROJ} \(layers\.0\.q_proj\) holds 1 values that are NaN or infinite")
