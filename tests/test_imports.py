"""The house's order: imports run one way, and importing kvjax costs little."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "kvjax"
FILES = sorted(PACKAGE.rglob("*.py"))

# What each room of kvjax may import from the others.
MAY_IMPORT = {
    "kernels": set(),
    "cache": {"kernels"},
    "models": {"kernels", "cache"},  # A model calls the cache's `attend`; it never knows which policy runs.
    "checkpoints": {"kernels", "models", "cache"},
    "convert": {"kernels", "cache", "models"},
    "policies": {"kernels", "cache", "models"},  # Scores rotate queries, plans read a model's shapes.
    "methods": {"kernels", "cache", "policies"},
    "generation": {"kernels", "cache", "models", "policies"},
    "training": {"kernels", "cache", "models", "checkpoints", "policies", "methods", "generation"},
    "sharding": {"kernels", "cache", "models", "policies", "generation"},
    "model": {"cache", "checkpoints", "generation", "models", "policies"},
    "evaluation": {"kernels", "cache", "model", "models", "checkpoints", "policies", "methods", "generation"},
    "lm_eval": {"cache", "evaluation", "generation", "model", "models", "policies"},
}
ENTRANCES = {"__init__", "__main__", "cli", "commands"}  # These see every room, and no room looks back at them.


def room(file: Path) -> str:
    """`kvjax/cache/dense.py` is in `cache`; `kvjax/cli.py` is `cli`."""
    return file.relative_to(PACKAGE).with_suffix("").parts[0]


def imports(file: Path) -> Iterator[tuple[int, str]]:
    """Line and absolute dotted name of each import, also of those inside functions."""
    here = file.relative_to(ROOT).parts
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = here[: len(here) - node.level] if node.level else ()
            base = ".".join((*package, *filter(None, [node.module])))
            # `from kvjax import cache` names a room only with the imported name behind it.
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_run_one_way(file):
    mine = room(file)
    if mine in ENTRANCES:
        return
    assert mine in MAY_IMPORT, f"kvjax/{mine} is new: say in {Path(__file__).name} what it may import."
    allowed = MAY_IMPORT[mine] | {mine}
    for line, name in imports(file):
        top, _, rest = name.partition(".")
        if top == "kvjax":
            other = rest.partition(".")[0] or "__init__"
            assert other in allowed, f"{file.relative_to(ROOT)}:{line}: kvjax.{mine} may not import {name}."


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_pytorch(file):
    for line, name in imports(file):
        assert name.split(".")[0] not in {"torch", "transformers"}, f"{file.relative_to(ROOT)}:{line}: {name}"


def run(code: str, **environment: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=os.environ | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_importing_kvjax_is_light():
    run("import sys, kvjax; sys.exit(str({'torch', 'transformers', 'matplotlib'} & sys.modules.keys() or '') or None)")


def test_importing_kvjax_starts_no_device():
    # An array or `jax.devices()` at import time would look for this platform and fail; `jax.distributed.initialize`
    # and a user's `jax.config` must still find JAX untouched.
    run("import kvjax", JAX_PLATFORMS="no_such_platform")
