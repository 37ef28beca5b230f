"""kvjax against Hugging Face transformers on this machine's CPU: same weights, prompts, dtype and threads, in one run.

    pip install torch transformers accelerate && python scripts/bench_transformers.py --out results.json

Cells: prefill of 2,048 tokens; decoding at 2,048 and 8,192 tokens of context; batch 1 and 8; peak memory of each. Each
cell runs in a process of its own, the two libraries by turns, and is repeated; the table gives medians, and ratios are
transformers' time by ours. Caches for decoding hold random numbers of the right shapes: speed does not depend on what
they say. A last part compares kvjax's 4-bit cache with its full one, and the time per token after prompts of different
lengths under a fixed budget.

Peak memory is the process's peak resident size while the cell runs, after the weights are loaded.
"""

import argparse
import ctypes
import dataclasses
import gc
import json
import os
import statistics
import subprocess
import sys
import time

MODEL = "gemma3-270m"
STEPS = 16
CELLS = [
    {"kind": kind, "context": context, "batch": batch}
    for kind, contexts in (("prefill", (2048,)), ("decode", (2048, 8192)))
    for context in contexts
    for batch in (1, 8)
]
OURS_ONLY = [
    {"kind": "decode", "context": 8192, "batch": 1, "policy": policy}
    for policy in ("full", "int4(group=0)", "int4", "kivi(bits=4)", "int8")
] + [{"kind": "decode", "context": context, "batch": 1, "policy": "snapkv(512)"} for context in (1024, 4096, 16384)]


def reset_peak() -> None:
    """Gives freed memory back and forgets the peak resident size so far (Linux, glibc)."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def peak_mb() -> float:
    """Peak resident size since the last reset, in MB."""
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024 / 1e6


def timed(run, repeats: int) -> list[float]:
    """Seconds of each call of `run`, after one that is not counted."""
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return times


def run_kvjax(cell: dict, repeats: int) -> list[float]:
    import jax
    import jax.numpy as jnp
    import numpy as np

    import kvjax
    from kvjax.policies.plan import abstract_cache

    jax.config.update("jax_platforms", "cpu")
    model = dataclasses.replace(kvjax.load(MODEL, jnp.float32), tokenizer=None)  # The other side loads none.
    policy = kvjax.parse_policy(cell.get("policy", "full"))
    batch, context = cell["batch"], cell["context"]
    rng = np.random.default_rng(0)
    if cell["kind"] == "prefill":
        tokens = jnp.asarray(rng.integers(0, 262144, (batch, context)), jnp.int32)
        reset_peak()
        return timed(
            lambda: jax.block_until_ready(kvjax.prefill_logits(model.params, model.config, policy, tokens)), repeats
        )

    planned = kvjax.plan(policy, model.config, [context] * batch, jnp.float32)
    shapes = abstract_cache(planned, model.config, batch, jnp.float32)

    def random(leaf):
        if leaf.dtype == jnp.float32 and leaf.ndim == 4:
            return jnp.asarray(rng.standard_normal(leaf.shape, np.float32))
        if leaf.dtype == jnp.int32 and leaf.ndim == 3:  # Positions: every slot holds a token.
            last = jnp.arange(context - leaf.shape[-1], context, dtype=jnp.int32)
            return jnp.broadcast_to(last, leaf.shape)
        return jnp.ones(leaf.shape, leaf.dtype)

    def make_cache():
        cache, layers = jax.tree.map(random, shapes), []
        for layer in cache.layers:  # A ring holds position p at slot p % size; a grouped layer has its residual empty.
            if getattr(layer, "ring", False):
                slot = np.arange(layer.capacity)
                held = context - 1 - (context - 1 - slot) % layer.capacity
                layer = dataclasses.replace(layer, pos=jnp.broadcast_to(jnp.asarray(held, jnp.int32), layer.pos.shape))
            if hasattr(layer, "order"):
                order = np.arange(layer.order.shape[-1])
                order = jnp.asarray(np.where(order < context, order, -1), jnp.int32)
                layer = dataclasses.replace(layer, order=jnp.broadcast_to(order, layer.order.shape))
            layers.append(layer)
        cache = dataclasses.replace(cache, layers=tuple(layers), seen=jnp.full((batch,), context, jnp.int32))
        return jax.block_until_ready(cache.reserve(STEPS))

    reset_peak()
    times = []
    for repeat in range(repeats + 1):
        cache = make_cache()  # `decode` takes it over.
        logits, done = jnp.zeros((batch, model.config.vocab_size)), jnp.zeros(batch, bool)
        start = time.perf_counter()
        out = kvjax.decode(
            model.params, model.config, planned.policy, cache, logits, jax.random.key(0), done, max_new_tokens=STEPS
        )
        jax.block_until_ready(out[0])
        if repeat:
            times.append((time.perf_counter() - start) / STEPS)
        del out, cache
    return times


def run_transformers(cell: dict, repeats: int) -> list[float]:
    import torch
    from transformers import AutoModelForCausalLM, DynamicCache

    from kvjax.checkpoints.packaged import packaged_gguf

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    torch.manual_seed(0)
    path = packaged_gguf(MODEL)
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    batch, context = cell["batch"], cell["context"]
    if cell["kind"] == "prefill":
        ids = torch.randint(0, 262144, (batch, context))
        reset_peak()
        with torch.inference_mode():
            return timed(lambda: model(ids, use_cache=True, logits_to_keep=1), repeats)

    config, times = model.config, []
    reset_peak()
    for repeat in range(repeats + 1):
        cache = DynamicCache(config=config)
        with torch.inference_mode():
            for layer in range(config.num_hidden_layers):
                k = torch.randn(batch, config.num_key_value_heads, context, config.head_dim)
                cache.update(k, k.clone(), layer)
            token, start = torch.zeros(batch, 1, dtype=torch.long), time.perf_counter()
            for step in range(STEPS):
                position = torch.full((batch, 1), context + step)
                out = model(token, past_key_values=cache, use_cache=True, position_ids=position, logits_to_keep=1)
                token = out.logits[:, -1:].argmax(-1)
        if repeat:
            times.append((time.perf_counter() - start) / STEPS)
    return times


def run_cell(library: str, cell: dict, repeats: int, threads: int) -> dict:
    """One cell in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, __file__, "--cell", json.dumps(cell), "--side", library, "--repeats", str(repeats)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{library} {cell} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="bench_transformers.json", help="where the figures go")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--ours", action="store_true", help="only kvjax's own comparisons")
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    parser.add_argument("--side", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.cell:
        run = run_kvjax if args.side == "kvjax" else run_transformers
        times = run(json.loads(args.cell), args.repeats)
        print(json.dumps({"seconds": statistics.median(times), "all": times, "peak_mb": peak_mb()}))
        return

    results = []
    if not args.ours:
        print(f"{'cell':28} {'transformers':>13} {'kvjax':>9} {'ratio':>6}   {'peak MB':>15}")
        for cell in CELLS:
            theirs, ours = (
                run_cell(library, cell, args.repeats, args.threads) for library in ("transformers", "kvjax")
            )
            ratio = theirs["seconds"] / ours["seconds"]
            results.append({**cell, "transformers": theirs, "kvjax": ours, "ratio": ratio})
            name = f"{cell['kind']} {cell['context']} batch {cell['batch']}"
            print(
                f"{name:28} {theirs['seconds'] * 1e3:10.1f} ms {ours['seconds'] * 1e3:6.1f} ms {ratio:6.2f}   "
                f"{theirs['peak_mb']:7.0f} {ours['peak_mb']:7.0f}",
                flush=True,
            )
    for cell in OURS_ONLY:
        ours = run_cell("kvjax", cell, args.repeats, args.threads)
        results.append({**cell, "kvjax": ours})
        print(f"decode at {cell['context']:5} {cell['policy']:16} {ours['seconds'] * 1e3:7.1f} ms a token", flush=True)
    with open(args.out + ".part", "w") as file:
        json.dump({"threads": args.threads, "steps": STEPS, "results": results}, file, indent=1)
    os.replace(args.out + ".part", args.out)


if __name__ == "__main__":
    main()
