"""kvjax beside NVIDIA kvpress on this machine's CPU: same weights, prompts, budgets, dtype and threads, in one run.

    python -m venv peers && peers/bin/pip install -e ".[gemma,kvpress]"
    peers/bin/python scripts/bench_kvpress.py --out docs/measured/kvpress

Gemma 3 270M in float32. Quality: needles in 2,000 tokens, under both protocols ("agnostic": the context is compressed,
the question comes after; "aware": the question but its last token is compressed with the context). Bytes are what the
caches' tensors take, full-attention and sliding layers together. Times: reading and compressing 2,000 tokens, and 16
steps of decoding after that; processes are fresh and take turns, figures are medians, ratios are kvpress' time by ours.

kvpress treats this architecture as if all layers were alike and would compress sliding-window layers too, which leaves
nothing of the model. So its presses are hooked to the full-attention layers alone, and their questions see masks that
belong to each layer's length; scores and selection are its own code.
"""

import argparse
import copy
import dataclasses
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).parents[1]
NEEDLES = ROOT / "tests" / "data" / "needles_gemma3_270m.json"
STEPS = 16
KEPT = (0.5, 0.25)  # Shares of the tokens.
# kvjax's policy for a share {b}, and kvpress' for a ratio {r} of what is removed; where defaults differ, kvpress'.
METHODS = {
    "full": ("full", "None"),
    "knorm": ("knorm({b})", "KnormPress({r})"),
    "keydiff": ("keydiff({b})", "KeyDiffPress({r})"),
    "expected_attention": ("expected_attention({b})", "ExpectedAttentionPress({r})"),
    "snapkv": ("snapkv({b}, window=64)", "SnapKVPress({r})"),
    "tova": ("tova({b}, phase='prompt')", "TOVAPress({r})"),
    "streaming_llm": ("streaming_llm({b}, shifted=False)", "StreamingLLMPress({r})"),
    "pyramidkv": ("pyramidkv({b}, window=64)", "PyramidKVPress({r})"),
    "chunkkv": ("chunkkv({b}, score=snapkv(window=64))", "ChunkKVPress(SnapKVPress({r}))"),
    "h2o": ("h2o({b}, recent=0, phase='prompt', normalized=True)", "ObservedAttentionPress({r})"),
    "random": ("random({b})", "RandomPress({r}, seed=0)"),
    "think": ("think(0.4, whole=0)", "ThinKPress(0.4)"),
    "4 bits": ("int4(group=64)", "quantized"),
}
TIMED = ("full", "knorm", "expected_attention", "snapkv", "chunkkv", "h2o", "think", "4 bits")  # At the smallest share.
ONCE = ("full", "think", "4 bits")  # Have no budget of tokens.


def cells() -> list[tuple[str, float | None]]:
    return [(name, share) for name in METHODS for share in ((None,) if name in ONCE else KEPT)]


def timed_cells() -> list[tuple[str, float | None]]:
    return [(name, None if name in ONCE else min(KEPT)) for name in TIMED]


def prompts(count: int, protocol: str) -> list[tuple[list[int], list[int], list[int]]]:
    """(what is compressed, what is asked after it, the answer) of each needle."""
    out = []
    for row in json.loads(NEEDLES.read_text())["niah"][:count]:
        early = len(row["question_ids"]) - 1 if protocol == "aware" else 0
        question = row["question_ids"]
        out.append((row["context_ids"] + question[:early], question[early:], row["answer_ids"]))
    return out


# kvjax


def kvjax_quality(count: int) -> list[dict]:
    import functools

    import jax
    import jax.numpy as jnp
    import numpy as np

    import kvjax
    from kvjax.policies import Needs

    model = kvjax.load("gemma3-270m", jnp.float32)
    policies = {(name, b): kvjax.parse_policy(METHODS[name][0].format(b=b)) for name, b in cells()}
    needs = functools.reduce(Needs.__or__, (policy.needs for policy in policies.values()))
    found: dict[tuple, list] = {}
    for protocol in ("agnostic", "aware"):
        for context, question, answer in prompts(count, protocol):
            seen = model.observe(context, needs)
            for cell, policy in policies.items():
                cache = kvjax.compress(kvjax.plan(policy, model.config, len(context), jnp.float32), seen)
                logits, _ = model.extend(cache, question + answer[:-1])
                found.setdefault((protocol, *cell), []).append(
                    score(np.asarray(jax.nn.log_softmax(logits[0, len(question) - 1 :])), answer) + (cache.nbytes,)
                )
    return rows_of(found)


def kvjax_speed(repeats: int) -> dict:
    import jax
    import jax.numpy as jnp

    import kvjax

    model = kvjax.load("gemma3-270m", jnp.float32)
    tokens = jnp.asarray([prompts(1, "agnostic")[0][0]], jnp.int32)
    out = {}
    for name, b in timed_cells():
        policy, times = kvjax.parse_policy(METHODS[name][0].format(b=b)), []
        for repeat in range(repeats + 1):  # The first compiles, and does not count.
            start = time.perf_counter()
            logits, cache = kvjax.prefill_logits(model.params, model.config, policy, tokens)
            jax.block_until_ready(cache)
            read = time.perf_counter() - start
            after, done, key = policy.after_prompt, jnp.zeros(1, bool), jax.random.key(0)
            cache = dataclasses.replace(cache.reserve(STEPS), policy=after)
            jax.block_until_ready(cache)
            start = time.perf_counter()
            step = kvjax.decode(model.params, model.config, after, cache, logits, key, done, max_new_tokens=STEPS)
            jax.block_until_ready(step[0])
            times += [(read, (time.perf_counter() - start) / STEPS)] if repeat else []
        out[f"{name}|{b}"] = times
    return out


# kvpress


def torch_model(folder: str):
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    load = AutoModelForCausalLM.from_pretrained
    return load(folder, dtype=torch.float32, attn_implementation="sdpa").eval()


def press_of(name: str, b: float | None):
    import kvpress

    text = METHODS[name][1].format(r=None if b is None else 1 - b)
    return eval(text, vars(kvpress)) if text not in ("None", "quantized") else None


def quantized(model):
    from transformers import QuantizedCache

    return QuantizedCache(backend="hqq", config=model.config, nbits=4, q_group_size=64, residual_length=0)


def tensors(x, seen: set[int]) -> int:
    """Bytes of all tensors that can be reached from a cache, each counted once."""
    import torch

    if isinstance(x, torch.Tensor):
        known, _ = x.data_ptr() in seen, seen.add(x.data_ptr())
        return 0 if known else x.nbytes  # Views of larger tensors keep these alive; that is not counted.
    if isinstance(x, dict):
        return sum(tensors(value, seen) for value in x.values())
    if isinstance(x, list | tuple):
        return sum(tensors(value, seen) for value in x)
    return tensors(vars(x), seen) if type(x).__module__.startswith("transformers.cache") else 0


def masked(model, cache, length: int) -> list:
    """Hooks that give every layer the mask of what it holds, for tokens that come after `length` others."""
    import torch

    def mask(module, args, kwargs):
        layer, new = cache.layers[module.layer_idx], kwargs["hidden_states"].shape[1]
        held = layer.keys.shape[2] if layer.keys.numel() else getattr(layer, "cumulative_length", 0)
        ahead = torch.ones(new, new, dtype=torch.bool).tril()
        before = torch.ones(new, held, dtype=torch.bool)
        if module.is_sliding:  # Its tokens are the newest.
            query = length + torch.arange(new)[:, None]
            before = query - torch.arange(length - held, length)[None] < module.sliding_window
        kwargs["attention_mask"] = torch.cat([before, ahead], 1)[None, None]
        return args, kwargs

    return [layer.self_attn.register_forward_pre_hook(mask, with_kwargs=True) for layer in model.model.layers]


def kvpress_quality(count: int, folder: str) -> list[dict]:
    import torch
    from record_kvpress import observe

    model = torch_model(folder)
    found: dict[tuple, list] = {}
    with torch.inference_mode():
        for protocol in ("agnostic", "aware"):
            for context, question, answer in prompts(count, protocol):
                for attention in ("sdpa", "eager"):
                    model.set_attn_implementation(attention)
                    whole, seen = observe(model, context)
                    model.set_attn_implementation("sdpa")
                    for name, b in cells():
                        if (name == "h2o") == (attention == "eager"):
                            cache = compressed(model, whole, seen, name, b, context)
                            fed, hooks = torch.tensor([question + answer[:-1]]), masked(model, cache, len(context))
                            at, size = torch.arange(len(context), len(context) + fed.shape[1]), tensors(cache, set())
                            keep = {"position_ids": at[None], "logits_to_keep": len(answer)}
                            logits = model(fed, past_key_values=cache, cache_position=at, **keep).logits[0]
                            for hook in hooks:
                                hook.remove()
                            log_p = torch.log_softmax(logits, -1).numpy()
                            found.setdefault((protocol, name, b), []).append(score(log_p, answer) + (size,))
    return rows_of(found)


def compressed(model, whole, seen, name: str, b: float | None, context: list[int]):
    """The cache that a press makes of a prefill that was kept."""
    import torch

    if METHODS[name][1] == "quantized":
        cache = quantized(model)
        model.model(input_ids=torch.tensor([context]), past_key_values=cache)
        return cache
    cache, press = copy.deepcopy(whole), press_of(name, b)
    for module, kwargs, weights in seen if press is not None else ():
        layer, weights = cache.layers[module.layer_idx], weights if name == "h2o" else None
        args = (module, kwargs["hidden_states"], layer.keys, layer.values, weights, kwargs)
        layer.keys, layer.values = press.compress(*args)
    return cache


def kvpress_speed(repeats: int, folder: str) -> dict:
    import torch
    from record_kvpress import rotary
    from transformers import DynamicCache

    model, ids, out = torch_model(folder), torch.tensor([prompts(1, "agnostic")[0][0]]), {}
    full = [layer.self_attn for layer in model.model.layers if not layer.self_attn.is_sliding]
    for attention in full:
        attention.rotary_emb = rotary(model)
    for name, b in timed_cells():
        press, times = press_of(name, b), []
        model.set_attn_implementation("eager" if name == "h2o" else "sdpa")
        for repeat in range(repeats + 1):
            with torch.inference_mode():
                cache = quantized(model) if METHODS[name][1] == "quantized" else DynamicCache(config=model.config)
                hooks = [x.register_forward_hook(press.forward_hook, with_kwargs=True) for x in full if press]
                start = time.perf_counter()
                logits = model(ids, past_key_values=cache, logits_to_keep=1).logits
                read = time.perf_counter() - start
                for hook in hooks:
                    hook.remove()
                start = time.perf_counter()
                for step in range(STEPS):
                    at = torch.tensor([ids.shape[1] + step])
                    token = logits[:, -1].argmax(-1, keepdim=True)
                    logits = model(token, past_key_values=cache, position_ids=at[None], cache_position=at).logits
                times += [(read, (time.perf_counter() - start) / STEPS)] if repeat else []
        out[f"{name}|{b}"] = times
    return out


# Both


def score(log_p, answer: list[int]) -> tuple[bool, float]:
    """Whether greedy decoding writes the answer, and the mean negative log-likelihood of its tokens in nats."""
    picked = [float(log_p[i, token]) for i, token in enumerate(answer)]
    return bool((log_p.argmax(-1) == answer).all()), -sum(picked) / len(picked)


def rows_of(found: dict[tuple, list]) -> list[dict]:
    return [
        {
            "protocol": protocol,
            "method": name,
            "kept": b,
            "answered": sum(right for right, _, _ in rows),
            "samples": len(rows),
            "nll": statistics.mean(nll for _, nll, _ in rows),
            "nbytes": statistics.mean(size for _, _, size in rows),
        }
        for (protocol, name, b), rows in found.items()
    ]


def child(out: pathlib.Path, side: str, part: str, number: int, folder: str, threads: int):
    """What a process of its own measures; what an interrupted run has left is not measured again."""
    if out.exists():
        return json.loads(out.read_text())
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, __file__, "--side", side, "--part", part, "--number", str(number), "--folder", folder]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{side} {part} failed:\n{done.stderr[-3000:]}")
    out.write_text(done.stdout.splitlines()[-1])
    print(f"{out.stem} done", flush=True)
    return json.loads(out.read_text())


def save_weights(folder: str) -> None:
    """The packaged 4-bit file as transformers reads it, once for all processes."""
    import torch
    from transformers import AutoModelForCausalLM

    from kvjax.checkpoints.packaged import packaged_gguf

    path = packaged_gguf("gemma3-270m")
    AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).save_pretrained(folder)


def compared(seconds: dict[str, list[float]], rounds: int) -> dict:
    """kvpress' time by ours: of medians over all rounds, and in every round."""

    def ratio(chosen: slice) -> float:
        return statistics.median(seconds["kvpress"][chosen]) / statistics.median(seconds["kvjax"][chosen])

    runs = len(seconds["kvjax"]) // rounds
    each = [ratio(slice(i * runs, (i + 1) * runs)) for i in range(rounds)]
    return {"ratio": ratio(slice(None)), "rounds": each, "seconds": seconds}


def table(result: dict) -> str:
    """Markdown; times are kvpress' by ours, in brackets the least and the most of a round."""
    lines = ["| method | kept | protocol | answered | NLL | MB | prefill + compress | decode |", "|" + "---|" * 8]
    pairs: dict[tuple, dict] = {}
    for side in ("kvpress", "kvjax"):
        for row in result["quality"].get(side, []):
            pairs.setdefault((row["method"], row["kept"], row["protocol"]), {})[side] = row
    order = list(METHODS)
    for (name, b, protocol), pair in sorted(pairs.items(), key=lambda item: (item[0][2], order.index(item[0][0]))):
        theirs, ours, times = pair["kvpress"], pair["kvjax"], ["", ""]
        if protocol == "agnostic" and f"{name}|{b}" in result["speed"]:
            parts = (result["speed"][f"{name}|{b}"][part] for part in ("prefill", "decode"))
            times = [f"{part['ratio']:.2f}x ({min(part['rounds']):.2f} to {max(part['rounds']):.2f})" for part in parts]
        kept = "all" if b is None else f"{b:.0%}"
        right = f"{theirs['answered']} / {ours['answered']} of {ours['samples']}"
        nll = f"{theirs['nll']:.4f} / {ours['nll']:.4f}"
        size = f"{theirs['nbytes'] / 1e6:.2f} / {ours['nbytes'] / 1e6:.2f}"
        lines.append(f"| {' | '.join([name, kept, protocol, right, nll, size, *times])} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("results/kvpress"), help="folder for results")
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3, help="fresh processes of each library, for times")
    parser.add_argument("--repeats", type=int, default=2, help="timed runs in each of them")
    parser.add_argument("--threads", type=int, default=2)
    for hidden in ("--side", "--part", "--folder"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    parser.add_argument("--number", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        of = {"kvjax": (kvjax_quality, kvjax_speed), "kvpress": (kvpress_quality, kvpress_speed)}[args.side]
        more = (args.folder,) if args.side == "kvpress" else ()
        print(json.dumps(of[args.part == "speed"](args.number, *more)))
        return

    parts = args.out / "parts"
    parts.mkdir(parents=True, exist_ok=True)
    result: dict = {"threads": args.threads, "steps": STEPS, "methods": METHODS, "quality": {}, "speed": {}}
    with tempfile.TemporaryDirectory() as folder:
        save_weights(folder)
        for side in ("kvpress", "kvjax"):
            where = parts / f"quality_{side}.json"
            result["quality"][side] = child(where, side, "quality", args.prompts, folder, args.threads)
        times: dict[str, dict[str, list]] = {}
        for i in range(args.rounds):
            for side in ("kvpress", "kvjax"):
                where = parts / f"speed_{side}_{i}.json"
                for cell, measured in child(where, side, "speed", args.repeats, folder, args.threads).items():
                    times.setdefault(cell, {}).setdefault(side, []).extend(measured)
    for cell, sides in times.items():
        for i, part in enumerate(("prefill", "decode")):
            seconds = {side: [round(time[i], 5) for time in all] for side, all in sides.items()}
            result["speed"].setdefault(cell, {})[part] = compared(seconds, args.rounds)
    (args.out / "results.json").write_text(json.dumps(result, indent=1) + "\n")
    (args.out / "table.md").write_text(table(result))
    print(table(result))


if __name__ == "__main__":
    main()
