"""The kernels of decode and paged attention compile for an H200 and spill no registers, and XLA hands them the cache as
it lies in memory.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from kvjax.kernels.decode import gpu
from tests.aot.compile_gpu import ENVIRONMENT, SHARED_MEMORY, cases

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("jax_cuda13_plugin") is None, reason="needs pip install jax[cuda13]"),
    pytest.mark.skipif(jax.__version_info__ < gpu.NEEDED, reason=f"the kernel needs JAX {gpu.NEEDED}"),
]


def test_kernels_compile_without_spills_and_copies():
    done = subprocess.run(
        [sys.executable, "-m", "tests.aot.compile_gpu"],
        cwd=Path(__file__).parents[2],
        env=os.environ | ENVIRONMENT,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=1800,
    )
    results = {}
    for line in done.stdout.splitlines():
        if line.startswith("{"):
            result = json.loads(line)
            results[result["name"]] = result
    assert done.returncode == 0, f"died after {list(results)[-1:]}: {done.stderr[-2000:]}"
    assert set(results) == set(cases())
    problems = {}
    for name, result in results.items():
        if "error" in result:
            problems[name] = result["error"]
        elif (
            result["relayouts"]
            or result["temp"] * 100 >= result["cache"]
            or result["spills"]
            or result["smem"] > SHARED_MEMORY
        ):
            problems[name] = result
    assert not problems, json.dumps(problems, indent=1)
