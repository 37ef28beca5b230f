"""Every TPU kernel compiles for three generations of chips, and XLA hands it the cache as it lies in memory."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.aot.compile_tpu import ENVIRONMENT, GENERATIONS, cases, relayouts

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs pip install libtpu"),
]


@pytest.mark.parametrize("generation", GENERATIONS)
def test_kernels_compile_and_caches_stay_where_they_are(generation):
    command = [sys.executable, "-m", "tests.aot.compile_tpu", generation]
    done = subprocess.run(
        command,
        cwd=Path(__file__).parents[2],
        env=os.environ | ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=1200,
    )
    results = {}
    for line in done.stdout.splitlines():
        if line.startswith("{"):
            result = json.loads(line)
            results[result["name"]] = result
    assert done.returncode == 0, f"died at {list(results)[-1:]}: {done.stderr[-2000:]}"
    assert set(results) == set(cases())
    problems = {}
    for name, result in results.items():
        if "error" in result:
            problems[name] = result["error"]
        elif result["relayouts"] or result["temp"] * 100 >= result["cache"]:
            problems[name] = {"temp": result["temp"], "relayouts": result["relayouts"]}
    assert not problems, json.dumps(problems, indent=1)


def test_relayouts_are_found():
    """A copy is a problem where it is large; a parameter, a kernel and a prefetch are none."""
    text = """HloModule x
ENTRY %main {
  %p = bf16[4,8,8192,64]{3,2,1,0} parameter(0)
  %c = bf16[4,8,8192,64]{2,3,1,0} copy(%p)
  %d = bf16[4,8,8192,64]{2,3,1,0:S(1)} copy-done(%e)
  %s = f32[4,8]{1,0} fusion(%p), kind=kLoop
  %k = f32[4,8,8192,64]{3,2,1,0} fusion(%p), kind=kCustom
}"""
    assert [line[:2] for line in relayouts(text, 1 << 20)] == ["%c"]
