"""Does ShadowKV's host tier work on this machine? Run it once on a GPU or TPU: `python scripts/check_host_offload.py`.

Every check is a process of its own, so that one that aborts says nothing about the next. They are, in this order:

  device    what this machine is;
  gather    entries of an array in pinned_host are fetched under `jit`;
  loop      the same in a `while_loop` whose donated state holds the array, as in decoding;
  stream    the same again, but the whole array crosses the link: what is left to do where `loop` fails;
  cache     a prompt is compressed: values are in pinned_host, all else on the device; rows and Orbax keep them there;
  extend    a question on that cache equals the same with everything on the device;
  decode    32 tokens from it are those from the device-resident cache; bytes per memory kind; time per step of both;
  whole     the same where a layer's values cross the link whole (`host_gather=False`), should the host not gather.

Options: --context, --batch, --heads and --layers (of a random model) set the size; --checks runs only some.
On a CPU, whose memory is the host's, values are moved to pinned_host by hand, which checks all but the link.
The last line is "OK" or "FAILED: ..." and so is the exit code.
"""

import argparse
import dataclasses
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

CHECKS = ("device", "gather", "loop", "stream", "cache", "extend", "decode", "whole")


def main() -> int:
    options = parse()
    if options.only:
        globals()[f"check_{options.only}"](options)
        return 0
    failed = []  # JAX stays out of this process: it would hold most of the device's memory.
    for name in options.checks.split(","):
        start = time.perf_counter()
        command = [sys.executable, __file__, "--only", name, "--context", str(options.context)]
        sizes = ["--heads", str(options.heads), "--layers", str(options.layers), "--batch", str(options.batch)]
        try:
            done = subprocess.run([*command, *sizes], capture_output=True, text=True, timeout=options.timeout)
        except subprocess.TimeoutExpired:
            print(f"--- {name}: FAILED, no end in {options.timeout:.0f} s", flush=True)
            failed.append(name)
            continue
        print(f"--- {name}: {'ok' if done.returncode == 0 else 'FAILED'} in {time.perf_counter() - start:.0f} s")
        print(done.stdout, end="", flush=True)
        if done.returncode:
            failed.append(name)
            print(done.stderr[-3000:], flush=True)
    print(f"FAILED: {', '.join(failed)}" if failed else "OK")
    return bool(failed)


def check_device(options: argparse.Namespace) -> None:
    import jax

    del options
    device = jax.devices()[0]
    kinds = [memory.kind for memory in device.addressable_memories()]
    print(f"jax {jax.__version__}, {device.platform} ({device.device_kind}), memories {', '.join(kinds)}")
    assert "pinned_host" in kinds


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context", type=int, default=4096, help="tokens of the prompt")
    parser.add_argument("--batch", type=int, default=2, help="prompts")
    parser.add_argument("--heads", type=int, default=4, help="KV heads of 128 channels; two query heads each")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--checks", default=",".join(CHECKS))
    parser.add_argument("--timeout", type=float, default=240.0, help="seconds per check")
    parser.add_argument("--only", choices=CHECKS, help=argparse.SUPPRESS)
    return parser.parse_args()


def there(x: Any) -> Any:
    """In the host's memory, on CPUs too."""
    import jax

    from kvjax.cache.host import HOST

    return jax.device_put(x, HOST)


def check_gather(options: argparse.Namespace) -> None:
    import jax
    import jax.numpy as jnp
    import numpy as np

    from kvjax.cache.host import fetch

    x, index = arrays(options)
    found = jax.jit(fetch)(there(x), index)
    assert found.sharding.memory_kind == "device", found.sharding
    np.testing.assert_array_equal(found, jnp.take_along_axis(x, index[..., None, None], 2))


def check_loop(options: argparse.Namespace) -> None:
    from kvjax.cache.host import fetch

    in_a_loop(options, fetch)


def check_stream(options: argparse.Namespace) -> None:
    from kvjax.cache.host import fetch, to_device

    in_a_loop(options, lambda x, index: fetch(to_device(x), index))


def in_a_loop(options: argparse.Namespace, fetch: Callable[[Any, Any], Any]) -> None:
    import jax
    import jax.numpy as jnp
    import numpy as np

    from kvjax.cache.host import on_host

    x, index = arrays(options)
    number = x.shape[2]

    def loop(x: Any, index: Any) -> Any:
        def body(state: Any) -> Any:
            i, x, total = state
            return i + 1, x, total + fetch(x, (index + i) % number).astype(jnp.float32)

        total = jnp.zeros((*index.shape, *x.shape[3:]), jnp.float32)
        return jax.lax.while_loop(lambda state: state[0] < 4, body, (0, x, total))[1:]

    run = jax.jit(loop, donate_argnums=0)
    kept, total = run(there(x), index)
    assert on_host(kept) and kept.sharding.memory_kind == "pinned_host", kept.sharding
    np.testing.assert_array_equal(kept, x)
    np.testing.assert_array_equal(total, jax.jit(loop)(x, index)[1])
    start = time.perf_counter()
    for _ in range(5):
        kept, total = run(kept, index)
    jax.block_until_ready(total)
    print(f"{(time.perf_counter() - start) / 20 * 1e3:.3f} ms for {total.size * x.dtype.itemsize:,} bytes")


def arrays(options: argparse.Namespace) -> Any:
    import jax
    import jax.numpy as jnp

    number = options.context // 8
    shape = (options.batch, options.heads, number, 8, 128)
    x = jax.random.normal(jax.random.key(0), shape, jnp.bfloat16)
    return x, jax.random.randint(jax.random.key(1), (*shape[:2], min(256, number)), 0, number)


def prepared(options: argparse.Namespace, **parameters: Any) -> Any:
    """A random model, its policy and prompt, and the cache: values on the host, and everything on the device."""
    import jax
    import jax.numpy as jnp

    import kvjax
    from kvjax.cache.host import on_host, to_device
    from kvjax.models.config import Rope

    config = kvjax.Config(
        family="llama",
        vocab_size=1024,
        hidden_size=1024,
        mlp_size=2048,
        num_heads=2 * options.heads,
        num_kv_heads=options.heads,
        head_dim=128,
        layer_types=("full",) * options.layers,
        sliding_window=0,
        rope=Rope(theta=5e5, rotary_dim=128),
        sliding_rope=Rope(theta=5e5, rotary_dim=128),
        max_length=2 * options.context,
        query_scale=128**-0.5,
        tied=True,
        eos_ids=(1,),
    )
    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    params = kvjax.init_params(config, jax.random.key(0), dtype)
    policy = kvjax.policy("shadowkv", options.context // 16, outliers=options.context // 512, **parameters)
    shape = (options.batch, options.context)
    tokens = jax.random.randint(jax.random.key(2), shape, 2, config.vocab_size)
    cache = kvjax.prefill(params, config, policy, tokens)
    values = {id(layer.tiers[0].v) for layer in cache.layers}
    host = jax.tree.map(lambda leaf: leaf if id(leaf) not in values or on_host(leaf) else there(leaf), cache)
    device = jax.tree.map(to_device, cache)
    return params, config, policy, tokens, host, device


def values_of(cache: Any) -> list[Any]:
    return [layer.tiers[0].v for layer in cache.layers]


def assert_on_host(cache: Any) -> None:
    import jax

    from kvjax.cache.host import on_host

    values = {id(v) for v in values_of(cache)}
    for leaf in jax.tree.leaves(cache):
        kind = "pinned_host" if id(leaf) in values else "device"
        assert leaf.sharding.memory_kind == kind and on_host(leaf) == (kind == "pinned_host"), leaf.sharding


def check_cache(options: argparse.Namespace) -> None:
    import jax
    import numpy as np

    import kvjax
    from kvjax.cache import memory_nbytes
    from kvjax.checkpoints.orbax import load_cache, save_cache

    params, config, policy, tokens, host, device = prepared(options)
    if jax.default_backend() != "cpu":  # `prefill` has put them there by itself.
        assert_on_host(kvjax.prefill(params, config, policy, tokens))
    assert_on_host(host)
    assert memory_nbytes(device).keys() == {"device"}
    full = 2 * tokens.size * options.layers * options.heads * 128 * values_of(host)[0].dtype.itemsize
    for name, size in {"full cache": full, **memory_nbytes(host)}.items():
        print(f"{name:>12}: {size:>14,} bytes ({size / full:.1%})")
    assert_on_host(host.rows([1, 0]) if options.batch > 1 else host.rows([0]))
    assert_on_host(host.reserve(64))
    with tempfile.TemporaryDirectory() as folder:
        save_cache(f"{folder}/cache", host)
        back = load_cache(f"{folder}/cache")
    assert_on_host(back)
    for x, y in zip(jax.tree.leaves(back), jax.tree.leaves(host), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def check_extend(options: argparse.Namespace) -> None:
    import numpy as np

    import kvjax

    params, config, policy, tokens, host, device = prepared(options)
    question = tokens[:, :16]
    (found, after), (want, _) = (kvjax.extend(params, config, policy, cache, question) for cache in (host, device))
    assert_on_host(after)
    exact = params["embed"].dtype == "float32"  # Whoever gathers, sums are taken in another order.
    np.testing.assert_allclose(found, want, rtol=0, atol=1e-5 if exact else 0.02 * np.abs(np.asarray(want)).max())
    print(f"largest difference of logits: {np.abs(np.asarray(found) - np.asarray(want)).max():.2e}")


def check_decode(options: argparse.Namespace) -> None:
    decode(options)


def check_whole(options: argparse.Namespace) -> None:
    decode(options, host_gather=False)


def decode(options: argparse.Namespace, **parameters: Any) -> None:
    import jax
    import numpy as np

    import kvjax
    from kvjax.cache import memory_nbytes

    params, config, policy, tokens, host, device = prepared(options, **parameters)
    config = dataclasses.replace(config, eos_ids=())
    question = tokens[:, :1]
    print(f"bytes: {memory_nbytes(host)}; all on the device: {memory_nbytes(device)}")
    found = {}
    for name, cache in (("pinned_host", host), ("device", device)):
        seconds = []
        for number in (32, 32, 8):  # The first compiles; the last tells what does not depend on the steps.
            jax.block_until_ready(cache)
            start = time.perf_counter()
            drawn, _ = kvjax.generate(params, config, policy, question, cache=cache, max_new_tokens=number)
            jax.block_until_ready(drawn)
            seconds.append(time.perf_counter() - start)
            found.setdefault(name, np.asarray(drawn))
        print(f"{name:>12}: {seconds[1] / 32 * 1e3:.2f} ms a step (first call {seconds[0]:.1f} s)")
    np.testing.assert_array_equal(found["pinned_host"], found["device"])


if __name__ == "__main__":
    sys.exit(main())
