"""The kernels of prefill attention compile for three generations of TPUs, in memory that grows with length alone."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.aot.compile_prefill_tpu import cases
from tests.aot.compile_tpu import ENVIRONMENT, GENERATIONS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs pip install libtpu"),
]


@pytest.mark.parametrize("generation", GENERATIONS)
def test_kernels_compile(generation):
    done = subprocess.run(
        [sys.executable, "-m", "tests.aot.compile_prefill_tpu", generation],
        cwd=Path(__file__).parents[2],
        env=os.environ | ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=1200,
    )
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    results = {line["name"]: line for line in lines}
    assert done.returncode == 0, f"died at {list(results)[-1:]}: {done.stderr[-2000:]}"
    assert set(results) == set(cases())
    assert not {name: result["error"] for name, result in results.items() if "error" in result}
    assert not {name: result["copies"] for name, result in results.items() if result["copies"]}
    # Copies of the arguments in another layout, and statistics; one head's matrix of 8192 x 8192 floats has 256 MiB.
    for name, result in results.items():
        assert result["temp"] < 2 * result["arguments"] + (16 << 20), name
    for dim in (64, 128):
        small, large = (results[f"D = {dim}, T = {tokens}"]["temp"] for tokens in (4096, 8192))
        assert large < 2.2 * small + (1 << 20)
