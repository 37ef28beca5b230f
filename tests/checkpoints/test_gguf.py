"""GGUF files: each architecture as llama.cpp's converter writes it, each quantization, each kind of damage."""

import dataclasses
from pathlib import Path

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.checkpoints import huggingface
from kvjax.checkpoints.check import CheckpointError
from kvjax.checkpoints.gguf import config_from_gguf, dequantize, load, read_header
from kvjax.models import forward
from kvjax.models.config import Config

DATA = Path(__file__).parents[1] / "data" / "families"
Kind = gguf.GGMLQuantizationType
TOKENIZER = {"model": "llama", "tokens": ["<unk>", "<s>", "</s>", "a"], "scores": [0.0] * 4, "token_type": [2, 3, 3, 1]}
TOKENIZER |= {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0}


# --- A writer that follows llama.cpp's convert_hf_to_gguf.py ----------------------------------------------------------


def to_gguf(config: Config, params: dict, **more) -> tuple[dict, dict]:
    """Metadata and tensors of a model, as llama.cpp's converter makes them of a Hugging Face folder."""
    arch = config.family if config.family != "mistral" else "llama"
    metadata = {
        "general.architecture": arch,
        **{f"tokenizer.ggml.{name}": value for name, value in TOKENIZER.items()},
        f"{arch}.context_length": config.max_length,
        f"{arch}.embedding_length": config.hidden_size,
        f"{arch}.block_count": config.num_layers,
        f"{arch}.feed_forward_length": config.mlp_size,
        f"{arch}.attention.head_count": config.num_heads,
        f"{arch}.attention.head_count_kv": config.num_kv_heads,
        f"{arch}.attention.key_length": config.head_dim,
        f"{arch}.attention.layer_norm_rms_epsilon": config.norm_eps,
        f"{arch}.rope.freq_base": config.rope.theta,
        f"{arch}.rope.dimension_count": config.rope.rotary_dim,
    }
    if config.sliding_window:
        metadata[f"{arch}.attention.sliding_window"] = config.sliding_window
    if config.attn_softcap:
        metadata[f"{arch}.attn_logit_softcapping"] = config.attn_softcap
        metadata[f"{arch}.final_logit_softcapping"] = config.logit_softcap
    metadata |= {f"{arch}.{name}": value for name, value in more.items()}

    norm = lambda weight: np.asarray(weight) + np.float32(config.norm_offset)  # noqa: E731
    matrix = lambda weight: np.asarray(weight).T  # noqa: E731
    tensors = {"token_embd.weight": np.asarray(params["embed"]), "output_norm.weight": norm(params["final_norm"])}
    if not config.tied:
        tensors["output.weight"] = np.asarray(params["lm_head"])
    for i, layer in enumerate(params["layers"]):
        block = {"attn_norm.weight": norm(layer["attn_norm"]), "ffn_norm.weight": norm(layer["mlp_norm"])}
        if config.post_norms:
            block["post_attention_norm.weight"] = norm(layer["post_attn_norm"])
            block["post_ffw_norm.weight"] = norm(layer["post_mlp_norm"])
        if config.qk_norm:
            block |= {f"attn_{x}_norm.weight": norm(layer[f"{x}_norm"]) for x in "qk"}
        if config.qkv_bias:
            block |= {f"attn_{x}.bias": np.asarray(layer[f"{x}_bias"]) for x in "qkv"}
        q, k, v = (matrix(layer[f"{x}_proj"]) for x in "qkv")
        gate, up = matrix(layer["gate_proj"]), matrix(layer["up_proj"])
        if arch == "phi3":
            block |= {"attn_qkv.weight": np.concatenate([q, k, v]), "ffn_up.weight": np.concatenate([gate, up])}
        else:
            if arch == "llama":
                q, k = permute(q, config.num_heads), permute(k, config.num_kv_heads)
            block |= {"attn_q.weight": q, "attn_k.weight": k, "attn_v.weight": v}
            block |= {"ffn_gate.weight": gate, "ffn_up.weight": up}
        block |= {"attn_output.weight": matrix(layer["o_proj"]), "ffn_down.weight": matrix(layer["down_proj"])}
        tensors |= {f"blk.{i}.{name}": value for name, value in block.items()}
    return metadata, tensors


def permute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows (head, half, pair) -> (head, pair, half), for a rotary embedding of neighbouring channels."""
    return weight.reshape(heads, 2, -1, weight.shape[-1]).swapaxes(1, 2).reshape(weight.shape)


def write(path: Path, metadata: dict, tensors: dict, kind: Kind = Kind.F32) -> Path:
    """Writes a GGUF file; matrices whose rows allow it are quantized."""
    writer = gguf.GGUFWriter(path, arch=metadata["general.architecture"])
    for key, value in metadata.items():
        if key == "general.architecture":
            continue
        match value:
            case bool():
                writer.add_bool(key, value)
            case int():
                writer.add_uint32(key, value)
            case float():
                writer.add_float32(key, value)
            case str():
                writer.add_string(key, value)
            case list():
                writer.add_array(key, value)
    for name, value in tensors.items():
        value = np.ascontiguousarray(value, np.float32)
        if kind == Kind.F32 or value.ndim == 1 or value.shape[1] % gguf.GGML_QUANT_SIZES[kind][0]:
            writer.add_tensor(name, value)
        else:
            writer.add_tensor(name, gguf.quantize(value, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def tiny(tmp_path):
    """A small Llama: path of a file that may be changed, and how to write it again with other contents."""
    params, config, _ = huggingface.load(DATA / "llama2", jnp.float32)
    metadata, tensors = to_gguf(config, params)

    def rewrite(
        kind: Kind = Kind.F32, metadata_changes: dict | None = None, tensor_changes: dict | None = None
    ) -> Path:
        new_metadata = {k: v for k, v in (metadata | (metadata_changes or {})).items() if v is not None}
        new_tensors = {k: v for k, v in (tensors | (tensor_changes or {})).items() if v is not None}
        return write(tmp_path / "tiny.gguf", new_metadata, new_tensors, kind)

    return rewrite


# --- Architectures ----------------------------------------------------------------------------------------------------


def rope_settings(config: Config) -> tuple[dict, dict]:
    """How a converted file states the extension of the context: metadata and tensors."""
    rope = config.rope
    match rope.scaling:
        case "linear":
            return {"rope.scaling.type": "linear", "rope.scaling.factor": rope.factor}, {}
        case "yarn":
            settings = {"type": "yarn", "factor": rope.factor, "original_context_length": rope.original_length}
            settings |= {"yarn_beta_fast": rope.beta_fast, "yarn_beta_slow": rope.beta_slow}
            return {f"rope.scaling.{name}": value for name, value in settings.items()}, {}
        case "llama3":
            inverse = rope.theta ** -(np.arange(0, rope.rotary_dim, 2) / rope.rotary_dim)
            return {}, {"rope_freqs.weight": llama3_divisors(rope, 2 * np.pi / inverse)}
        case "longrope":
            settings = {"original_context_length": rope.original_length, "attn_factor": rope.attention_factor}
            factors = {"long": rope.long_factor, "short": rope.short_factor}
            tensors = {f"rope_factors_{name}.weight": np.asarray(values) for name, values in factors.items()}
            return {f"rope.scaling.{name}": value for name, value in settings.items()}, tensors
    return {}, {}


def llama3_divisors(rope, wavelengths: np.ndarray) -> np.ndarray:
    low, high = rope.original_length / rope.low_freq_factor, rope.original_length / rope.high_freq_factor
    smooth = (rope.original_length / wavelengths - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    between = 1 / ((1 - smooth) / rope.factor + smooth)
    return np.where(wavelengths < high, 1.0, np.where(wavelengths > low, rope.factor, between))


@pytest.mark.parametrize("family", sorted(path.name for path in DATA.iterdir() if path.is_dir()))
def test_architectures(family, tmp_path):
    """A converted file gives the parameters and the logits of the Hugging Face folder."""
    params, config, _ = huggingface.load(DATA / family, jnp.float32)
    if not config.rope.truncate:  # llama.cpp knows no such yarn.
        rope = dataclasses.replace(config.rope, truncate=True)
        config = dataclasses.replace(config, rope=rope, sliding_rope=rope)
    settings, factors = rope_settings(config)
    if config.family in ("gemma2", "gemma3", "qwen2", "qwen3") and config.sliding_window:
        settings["attention.sliding_window_pattern"] = [kind == "sliding" for kind in config.layer_types]
    if config.query_scale != config.head_dim**-0.5:
        settings["attention.scale"] = config.query_scale
    metadata, tensors = to_gguf(config, params, **settings)
    loaded, found, tokenizer = load(write(tmp_path / "model.gguf", metadata, tensors | factors), jnp.float32)

    rounding = 6e-8 if config.norm_offset else 0  # 1 + w has fewer digits of w.
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=rounding), loaded, params)
    assert found.layer_types == config.layer_types
    assert (found.bos_id, found.eos_ids) == (tokenizer.bos_id, tokenizer.eos_ids) == (1, (2,))
    tokens = jnp.arange(100)[None] * 7 % config.vocab_size
    np.testing.assert_allclose(forward(loaded, found, tokens), forward(params, config, tokens), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("layers", "arch", "full"), [(12, "gemma3", (5, 11)), (4, "gemma2", (1, 3)), (3, "qwen3", (0, 1, 2))]
)
def test_what_files_leave_unsaid(layers, arch, full, tmp_path):
    """Released Gemma files do not say which layers slide, nor at which base these rotate."""
    metadata = to_gguf(
        huggingface.read_config(DATA / "llama2"), {"embed": 0, "final_norm": 0, "layers": (), "lm_head": 0}
    )
    metadata = {k.replace("llama.", f"{arch}."): v for k, v in metadata[0].items()}
    metadata |= {"general.architecture": arch, f"{arch}.block_count": layers, f"{arch}.rope.freq_base": 1e6}
    metadata |= {f"{arch}.attention.sliding_window": 8} if "gemma" in arch else {}
    path = write(tmp_path / "header.gguf", metadata, {"token_embd.weight": np.zeros((128, 32))})
    config = config_from_gguf(read_header(path))
    assert config.full_layers == full and config.rope.theta == 1e6 and config.tied
    assert config.sliding_rope.theta == (1e4 if arch == "gemma3" else 1e6)


# --- Quantizations ----------------------------------------------------------------------------------------------------

ERRORS = {
    Kind.F16: 1e-3,
    Kind.BF16: 8e-3,
    Kind.Q8_0: 1e-2,
    Kind.Q5_1: 0.05,
    Kind.Q5_0: 0.1,
    Kind.Q4_1: 0.1,
    Kind.Q4_0: 0.15,
}


@pytest.mark.parametrize("kind", ERRORS, ids=lambda kind: kind.name)
def test_quantized_files(kind, tiny):
    original, _, _ = load(tiny(), jnp.float32)
    path = tiny(kind)
    header = read_header(path)
    assert header.tensors["blk.0.attn_q.weight"].kind == kind
    loaded, _, _ = load(path, jnp.float32)
    largest = jax.tree.map(lambda x: float(jnp.abs(x).max()), original)
    error = jax.tree.map(lambda x, y: float(jnp.abs(x - y).max()), original, loaded)
    assert all(e <= ERRORS[kind] * m for e, m in zip(jax.tree.leaves(error), jax.tree.leaves(largest), strict=True))
    assert kind == Kind.F16 or max(jax.tree.leaves(error)) > 0  # The original is float16.


KNOWN = [kind for kind in Kind if kind in gguf.quants._type_traits]


@pytest.mark.parametrize("kind", KNOWN, ids=lambda kind: kind.name)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # Random bytes are scales of any size.
def test_dequantize(kind, rng):
    """In pieces the same as at once, for everything the gguf package knows, K- and I-quants included."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    packed = rng.integers(0, 256, (1, size * ((3 << 18) // size + 5)), np.uint8)
    whole = gguf.dequantize(packed, kind)[0]
    np.testing.assert_array_equal(dequantize(packed[0], kind, np.float32), whole)
    rounded = dequantize(packed[0], kind, jnp.bfloat16)
    assert rounded.dtype == jnp.bfloat16
    np.testing.assert_array_equal(rounded.astype(np.float32), whole.astype(jnp.bfloat16).astype(np.float32))


def test_dtype(tiny):
    params, _, _ = load(tiny(Kind.Q8_0), jnp.bfloat16)
    exact, _, _ = load(tiny(Kind.Q8_0), jnp.float32)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y.astype(jnp.bfloat16)), params, exact)


def test_gemma_from_the_package(gemma):
    """The whole file against what PyTorch computes is in the tests of the model; here, that nothing was guessed."""
    c = gemma.config
    assert (c.family, c.num_layers, c.head_dim, c.full_layers) == ("gemma3", 18, 256, (5, 11, 17))
    assert (c.norm_eps, c.sliding_window, c.query_scale, c.tied) == (1e-6, 512, 256**-0.5, True)
    assert (c.rope.theta, c.sliding_rope.theta, c.vocab_size) == (1e6, 1e4, 262144)


# --- Damage -----------------------------------------------------------------------------------------------------------


def refused(path: Path, *words: str) -> None:
    """Loading fails with a message that names the file and each of the words."""
    with pytest.raises(CheckpointError) as caught:
        load(path, jnp.float32)
    for word in (path.name, *words):
        assert word in str(caught.value)


def test_not_a_gguf_file(tmp_path):
    for content in (b"", b"GG", b"not a GGUF file"):
        (tmp_path / "x.gguf").write_bytes(content)
        refused(tmp_path / "x.gguf", "not a GGUF file")
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "none.gguf", jnp.float32)


def test_truncated(tiny):
    path = tiny()
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    refused(path, "truncated", "blk.1.ffn_down.weight", str(len(whole) - 100))
    for length in range(4, 2000, 97):  # Anywhere in the header.
        path.write_bytes(whole[:length])
        refused(path, "truncated or corrupt")


def test_corrupt_header(tiny):
    """No flipped byte makes anything but a CheckpointError, or another model."""
    path = tiny()
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    for position in rng.integers(8, 1500, 60):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0xFF]) + whole[position + 1 :])
        try:
            read_header(path)
        except CheckpointError as error:
            assert path.name in str(error)


def test_version(tiny):
    path = tiny()
    whole = path.read_bytes()
    path.write_bytes(whole[:4] + (1).to_bytes(4, "little") + whole[8:])
    refused(path, "version 1", "2 and 3")


def test_missing_tensor(tiny):
    refused(tiny(tensor_changes={"blk.1.attn_k.weight": None}), "1 tensor is missing", "blk.1.attn_k.weight")
    refused(tiny(tensor_changes={"token_embd.weight": None}), "token_embd.weight is missing")


def test_unexpected_tensor(tiny):
    refused(tiny(tensor_changes={"blk.1.attn_q_norm.weight": np.ones(16)}), "not expected", "blk.1.attn_q_norm.weight")
    refused(tiny(metadata_changes={"llama.block_count": 1}), "not expected", "blk.1.")


def test_wrong_shape(tiny):
    wrong = np.zeros((7, 64))
    refused(tiny(tensor_changes={"blk.1.ffn_up.weight": wrong}), "blk.1.ffn_up.weight", "(64, 7)", "expected (64, 48)")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_not_finite(tiny, value):
    weight = np.zeros((48, 64))
    weight[3, 4] = value
    refused(tiny(tensor_changes={"blk.1.ffn_up.weight": weight}), "blk.1.ffn_up.weight", "holds 1 values", "of 3072")


def test_large_but_finite(tiny):
    """A sum that overflows is no damage."""
    load(tiny(tensor_changes={"blk.1.ffn_up.weight": np.full((48, 64), 3e38)}), jnp.float32)


def test_unsupported(tiny):
    refused(tiny(metadata_changes={"general.architecture": "mamba"}), "'mamba'", "supported: llama")
    refused(tiny(metadata_changes={"llama.expert_count": 8}), "mixture of 8 experts")
    refused(tiny(metadata_changes={"llama.block_count": None}), "llama.block_count is missing")
    refused(tiny(metadata_changes={"llama.attention.head_count": [4, 4, 2]}), "differs between layers")
    refused(tiny(metadata_changes={"llama.attention.head_count_kv": 3}), "multiple of num_kv_heads")
    refused(tiny(metadata_changes={"llama.rope.scaling.type": "longrope"}), "longrope")
    refused(tiny(metadata_changes={"split.count": 3}), "one of 3 parts")
