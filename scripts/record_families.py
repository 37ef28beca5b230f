"""Records what transformers says about tiny random models of every family, for tests/models/test_families.py.

    python scripts/record_families.py tests/data/families

Needs PyTorch and transformers (5.23.0 wrote the files in the repository), which kvjax itself does not. Every folder
gets a Hugging Face checkpoint and `expected.npz`:

    ids [2, 40] int32          the prompts, longer than every sliding window
    logits [2, 40, vocab]      float32
    greedy [2, 8] int32        the most likely continuation
    short_ids, short_logits, short_greedy    the same for prompts of 12 tokens; only for longrope, whose answers to
                                             short texts are not the beginning of those to long ones

Weights are drawn wide enough that attention is far from uniform, and rounded to the stored 16-bit type before the
models run in float32, so that nothing is lost in the files.

`rope.json` lists the rotary frequencies of context extensions at the sizes of released models.
"""

import json
import pathlib
import shutil
import sys

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

LENGTH, SHORT, NEW = 40, 12, 8
MARGIN = 5e-3  # Least lead of the best logit over the second: greedy continuations must not hang on rounding.

TINY = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
GEMMA = {"head_dim": 16, "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 24, "sliding_window": 8}
LONG = [1.0, 1.5, 2.5, 4.0, 6.0, 9.0, 12.0, 16.0]
SHORT_FACTORS = [1.0, 1.0, 1.05, 1.1, 1.2, 1.3, 1.4, 1.5]

# Settings as the hub has them, in the spelling of their time. A model is built from exactly these.
MODELS = {
    "llama2": TINY | {"model_type": "llama", "hidden_size": 64, "num_key_value_heads": 4, "num_hidden_layers": 2},
    "llama31": TINY | {"model_type": "llama", "rope_theta": 500000.0, "rope_scaling": LLAMA3_ROPE, "head_dim": 16},
    "llama32_tied": TINY
    | {
        "model_type": "llama",
        "rope_scaling": LLAMA3_ROPE | {"factor": 32.0},
        "tie_word_embeddings": True,
        "head_dim": 16,
    },
    "llama_yarn_mqa": TINY
    | {
        "model_type": "llama",
        "num_key_value_heads": 1,
        "head_dim": 16,
        "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
        | {"beta_fast": 4, "truncate": False},
    },
    "mistral_sliding": TINY | {"model_type": "mistral", "head_dim": 16, "sliding_window": 8},
    "qwen2": TINY | {"model_type": "qwen2", "sliding_window": 8, "use_sliding_window": False, "rms_norm_eps": 1e-6},
    "qwen25_sliding": TINY
    | {"model_type": "qwen2", "sliding_window": 8, "use_sliding_window": True, "max_window_layers": 1},
    "qwen25_yarn": TINY
    | {
        "model_type": "qwen2",
        "tie_word_embeddings": True,
        "rope_theta": 1000000.0,
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    },
    "qwen3": TINY | {"model_type": "qwen3", "head_dim": 16, "rope_theta": 1000000.0},
    "gemma2": TINY
    | GEMMA
    | {
        "model_type": "gemma2",
        "tie_word_embeddings": True,
        "attn_logit_softcapping": 3.0,
        "final_logit_softcapping": 10.0,
    },
    "gemma3": TINY
    | GEMMA
    | {
        "model_type": "gemma3_text",
        "tie_word_embeddings": True,
        "sliding_window_pattern": 3,
        "rope_theta": 1000000.0,
        "rope_local_base_freq": 10000.0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "num_hidden_layers": 4,
    },
    "phi3": TINY | {"model_type": "phi3", "original_max_position_embeddings": 256, "sliding_window": 8},
    "phi3_longrope": TINY
    | {
        "model_type": "phi3",
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "original_max_position_embeddings": 24,
        "sliding_window": 512,
        "rope_scaling": {"type": "longrope", "short_factor": SHORT_FACTORS, "long_factor": LONG},
    },
    "phi3_partial": TINY
    | {
        "model_type": "phi3",
        "partial_rotary_factor": 0.75,
        "original_max_position_embeddings": 24,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "rope_scaling": {"type": "longrope", "short_factor": SHORT_FACTORS[:3], "long_factor": LONG[:3]},
    },
}

# Rotary settings at the sizes of released models. The factors of longrope are made up.
ROPES = {
    "llama-3.1-8b": {"model_type": "llama", "head_dim": 128, "max_position_embeddings": 131072}
    | {"rope_theta": 500000.0, "rope_scaling": LLAMA3_ROPE | {"original_max_position_embeddings": 8192}},
    "llama-3.2-1b": {"model_type": "llama", "head_dim": 64, "max_position_embeddings": 131072}
    | {
        "rope_theta": 500000.0,
        "rope_scaling": LLAMA3_ROPE | {"factor": 32.0, "original_max_position_embeddings": 8192},
    },
    "llama-2-linear": {"model_type": "llama", "head_dim": 128, "max_position_embeddings": 16384}
    | {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "qwen2.5-7b-yarn": {"model_type": "qwen2", "hidden_size": 512, "max_position_embeddings": 131072}
    | {"rope_theta": 1000000.0}
    | {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}},
    "yarn-smooth": {"model_type": "llama", "head_dim": 64, "max_position_embeddings": 131072}
    | {
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 32.0,
            "original_max_position_embeddings": 4096,
            "truncate": False,
        }
    },
    "yarn-mscale": {"model_type": "llama", "head_dim": 64, "max_position_embeddings": 131072}
    | {
        "rope_scaling": {"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096}
        | {"mscale": 1.0, "mscale_all_dim": 0.7, "beta_fast": 24, "beta_slow": 2}
    },
    "phi-3-mini-128k": {"model_type": "phi3", "hidden_size": 384, "max_position_embeddings": 131072}
    | {"original_max_position_embeddings": 4096}
    | {
        "rope_scaling": {"type": "longrope"}
        | {"short_factor": [1 + i / 32 for i in range(48)], "long_factor": [1 + i * i / 32 for i in range(48)]}
    },
    "phi-4-mini": {"model_type": "phi3", "hidden_size": 512, "max_position_embeddings": 131072}
    | {"original_max_position_embeddings": 4096, "partial_rotary_factor": 0.75}
    | {
        "rope_scaling": {"type": "longrope"}
        | {"short_factor": [1.0] * 48, "long_factor": [1 + i / 2 for i in range(48)]}
    },
}
RESAVED = ("llama31", "qwen25_sliding", "qwen3", "gemma3", "phi3_partial")  # Settings as transformers 5 spells them.
BFLOAT16 = ("llama32_tied", "gemma2")
SHARDED = ("llama31", "phi3")


def draw_weights(model: torch.nn.Module, dtype: torch.dtype, seed: int) -> None:
    """Fills a model with random values that are exact in `dtype`."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        value = torch.randn(weight.shape, generator=generator)
        if name.endswith("norm.weight"):
            around = 0.0 if "gemma" in model.config.model_type else 1.0
            value = around + 0.3 * value + (0.5 if "q_norm" in name or "k_norm" in name else 0.0)
        elif name.endswith("bias"):
            value = 0.5 * value
        elif "embed" not in name:
            value = 1.3 * value * weight.shape[1] ** -0.5
        elif model.config.tie_word_embeddings:
            value = 0.25 * value  # Or every token would predict itself.
        weight.data = value.to(dtype).float()


@torch.no_grad()
def run(model: torch.nn.Module, ids: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Logits of prompts and their greedy continuation, every step from scratch.

    Raises:
      AssertionError: A step was nearly a tie.
    """
    text = ids
    for _ in range(NEW):
        last = model(text, use_cache=False).logits[:, -1]
        best = last.topk(2).values
        assert (best[:, 0] - best[:, 1]).min() > MARGIN, "nearly a tie; try the next seed"
        text = torch.cat((text, last.argmax(-1, keepdim=True)), dim=1)
    logits = model(ids, use_cache=False).logits
    return logits.numpy(), text[:, ids.shape[1] :].numpy().astype(np.int32)


def record(name: str, settings: dict, folder: pathlib.Path, seed: int) -> None:
    """Writes the checkpoint and what transformers answers."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
    dtype = torch.bfloat16 if name in BFLOAT16 else torch.float16
    config = AutoConfig.from_pretrained(folder)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    draw_weights(model, dtype, seed)

    ids = torch.from_numpy(np.random.default_rng(seed).integers(3, settings["vocab_size"], (2, LENGTH)))
    logits, greedy = run(model, ids)
    expected = {"ids": ids.numpy().astype(np.int32), "logits": logits, "greedy": greedy}
    if "short_factor" in settings.get("rope_scaling", {}):
        short_logits, short_greedy = run(model, ids[:, :SHORT])
        expected |= {
            "short_ids": expected["ids"][:, :SHORT],
            "short_logits": short_logits,
            "short_greedy": short_greedy,
        }

    model.to(dtype).save_pretrained(folder, max_shard_size="40KB" if name in SHARDED else "1GB")
    (folder / "generation_config.json").unlink(missing_ok=True)
    if name not in RESAVED:
        (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
    np.savez_compressed(folder / "expected.npz", **expected)


def record_rope(settings: dict) -> dict:
    """Settings, frequencies (of long texts too) and the attention factor; float32 values, exact in JSON."""
    settings = TINY | settings

    def compute(length: int) -> tuple[list[float], float]:
        config = AutoConfig.for_model(**json.loads(json.dumps(settings)))  # It edits what it is given.
        frequencies, factor = ROPE_INIT_FUNCTIONS[config.rope_parameters["rope_type"]](config, None, seq_len=length)
        return frequencies.tolist(), factor

    (short, factor), (long, _) = compute(1), compute(settings["max_position_embeddings"])
    return {"settings": settings, "frequencies": short, "long_frequencies": long, "attention_factor": factor}


def main(root: pathlib.Path) -> None:
    root.mkdir(parents=True, exist_ok=True)
    ropes = {name: record_rope(settings) for name, settings in ROPES.items()}
    (root / "rope.json").write_text(json.dumps(ropes) + "\n")
    for name, settings in MODELS.items():
        for seed in range(100):
            try:
                record(name, settings, root / name, seed)
                break
            except AssertionError:
                continue
        size = sum(path.stat().st_size for path in (root / name).iterdir())
        print(
            f"{name:16} seed {seed}  {size / 1e3:5.0f} KB  {', '.join(sorted(p.name for p in (root / name).iterdir()))}"
        )


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
