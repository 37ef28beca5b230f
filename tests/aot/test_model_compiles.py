"""Whole models decode on TPUs with the kernels that are chosen by default, and the cache stays where it is."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.aot.compile_model import LAYERS, POLICIES, moves
from tests.aot.compile_tpu import ENVIRONMENT

needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs pip install libtpu")
READ = ("kvjax_decode", "kvjax_paged")
# Steps with pages need more on the way, though none of it is a copy of the pool.
TEMP = {"adakv(0.25)": 0.3}


@pytest.mark.slow
@needs_libtpu
def test_models_decode_with_kernels_and_caches_stay_where_they_are():
    done = subprocess.run(
        [sys.executable, "-m", "tests.aot.compile_model", "v5e"],
        cwd=Path(__file__).parents[2],
        env=os.environ | ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=1200,
    )
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    results = {line["name"]: line for line in lines}
    assert done.returncode == 0, f"died at {list(results)[-1:]}: {done.stderr[-2000:]}"
    assert set(results) == set(POLICIES)
    problems = {}
    for name, result in results.items():
        if "error" in result:
            problems[name] = result["error"]
        elif sum(result["kernels"].get(kernel, 0) for kernel in READ) < LAYERS:
            problems[name] = {"kernels": result["kernels"]}
        elif result["moves"] or result["temp"] >= TEMP.get(name, 0.1) * result["cache"]:
            problems[name] = {"temp": result["temp"], "cache": result["cache"], "moves": result["moves"]}
    assert not problems, json.dumps(problems, indent=1)


def test_moves_are_found():
    """Copies, by themselves or in a fusion; not updates, prefetches, what fusions compute on the way, other sizes."""
    text = """HloModule x
%copies (p: bf16[4,96,128]) -> bf16[4,128,96] {
  %p = bf16[4,96,128]{2,1,0} parameter(0)
  ROOT %t = bf16[4,128,96]{2,1,0} transpose(%p), dimensions={0,2,1}
}
%updates (p: bf16[4,96,128]) -> bf16[4,96,128] {
  %p = bf16[4,96,128]{2,1,0} parameter(0)
  %c = f32[4,96,128]{2,1,0} convert(%p)
  ROOT %u = bf16[4,96,128]{2,1,0} dynamic-update-slice(%p, %c)
}
%body (p: (bf16[4,96,128])) -> (bf16[4,96,128]) {
  %a = bf16[4,96,128]{1,2,0:T(8,128)(2,1)S(1)} copy(%p)
  %b = bf16[4,128,96]{2,1,0} fusion(%a), kind=kLoop, calls=%copies
  %d = bf16[4,96,128]{2,1,0} fusion(%a), kind=kLoop, calls=%updates
  %e = (bf16[4,96,128]{2,1,0:S(1)}, bf16[4,96,128]{2,1,0}, u32[]) copy-start(%d)
  %f = bf16[4,96,64]{2,1,0} copy(%g)
}
ENTRY %main {
  %h = f32[4,96,128]{2,1,0} convert(%p)
}"""
    assert [line[:2] for line in moves(text, {4 * 96 * 128})] == ["%a", "%b", "%h"]
