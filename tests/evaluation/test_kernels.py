"""Measuring kernels: what is measured is what was meant. No test looks at a time."""

import dataclasses
import io
import json
import math
import os
import runpy
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from kvjax.cache import tree_nbytes
from kvjax.cli import app
from kvjax.evaluation import kernels
from kvjax.evaluation.kernels import KINDS, Case
from kvjax.kernels import tuning
from kvjax.kernels.choose import KernelError
from kvjax.kernels.decode import reference

ROOT = Path(__file__).parents[2]


def small(kind: str, **others) -> Case:
    return Case(**{"kind": kind, "context": 256, "heads": 2, "dim": 64, "batch": 2} | others)


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_are_those_of_the_arrays(kind):
    case = small(kind)
    request = kernels.abstract_request(case)
    tail = () if request.tail is None else (request.tail.k, request.tail.v)
    assert case.nbytes == tree_nbytes((request.k, request.v, tail))
    ragged = dataclasses.replace(case, ragged=True)
    assert ragged.lengths == [64, 256]
    assert ragged.nbytes - tree_nbytes(tail) == (case.nbytes - tree_nbytes(tail)) * 320 // 512


@pytest.mark.parametrize("kind", KINDS)
def test_random_stores_hold_numbers_like_any_other(kind):
    request = jax.jit(kernels.random_request, static_argnums=0)(small(kind), jnp.uint32(3))
    for x in (request.k.decode(), request.v.decode()):
        assert abs(float(x.mean())) < 0.1 and 0.8 < float(x.std()) < 1.3
        assert len(np.unique(np.asarray(x[0, 0]))) > 100
    other = kernels.random_request(small(kind), jnp.uint32(4))
    assert not np.array_equal(request.k.decode(), other.k.decode())
    assert not np.array_equal(request.k.decode(), request.v.decode())


def test_kinds_are_named_as_tuned_tables_name_them():
    named = {kind: tuning.shape(kernels.abstract_request(small(kind))).kind for kind in KINDS}
    assert named["int8"] == "int8" and named["kivi2"] == "2-bit/32 tokens 2-bit/32 channels"
    assert named["int4"] == named["int4-token"] == "4-bit/64 channels"  # One group for all of 64 channels.


@pytest.mark.parametrize("kind", ["bf16", "kivi4"])
def test_a_program_computes_attention(kind):
    case = small(kind, ragged=True)
    program = kernels.kernel_program(case)
    q, request = program.make(jnp.uint32(0))
    np.testing.assert_allclose(program.run(q, request), reference.decode(request).out, atol=1e-4)


def test_dense_attention_is_what_it_says():
    program = kernels.dense_program(small("bf16", ragged=True, tokens=3))
    q, (k, v, lengths) = program.make(jnp.uint32(0))
    logits = jnp.where(
        jnp.arange(256) < lengths[:, None, None, None], jnp.einsum("bhnd,bhsd->bhns", q, k) / 8, -jnp.inf
    )
    wanted = jnp.einsum("bhns,bhsd->bhnd", jax.nn.softmax(logits), v)
    np.testing.assert_allclose(program.run(q, (k, v, lengths)), wanted, atol=1e-5)


def test_a_loop_calls_as_often_as_it_says_each_time_with_another_query():
    # Every call adds one to the query, if it sees what the last one left; 1e-6 of 1e6.
    loop = jax.jit(kernels.looped(lambda q, data: jnp.full_like(q, 1e6) * data, 3))
    assert loop(jnp.zeros(2), (1.0, 2.0)).tolist() == [9.0, 9.0]
    doubling = jax.jit(kernels.looped(lambda q, data: 1e6 * q * data, 3))
    assert doubling(jnp.ones(1), (1.0, 1.0)).tolist() == pytest.approx([64.0])


def test_small_stores_take_turns_on_accelerators(monkeypatch):
    program = lambda nbytes: kernels.Program(lambda seed: (seed, ()), lambda q, data: q, nbytes)  # noqa: E731
    assert program(1).copies == 1
    monkeypatch.setattr(kernels.jax, "default_backend", lambda: "tpu")
    large = kernels.CHIP_CACHE
    assert [program(n).copies for n in (2 * large, large, large // 4, 1)] == [1, 1, 4, kernels.MOST_COPIES]
    assert not program(large // 4).in_cache and program(1000).in_cache


def test_rows_compare_with_dense_attention_and_survive_what_fails(monkeypatch):
    cases = [small(kind, heads=1) for kind in ("bf16", "int8", "fp8")]
    program = kernels.kernel_program

    def broken(case, *args, **options):
        made = program(case, *args, **options)
        return made if case.kind != "int8" else dataclasses.replace(made, run=lambda q, data: 1 / 0)

    monkeypatch.setattr(kernels, "kernel_program", broken)
    plain, failed, other = kernels.bench_kernels(cases, bandwidth=1e9, seconds=1e-4, repeats=1)
    assert failed["error"].startswith("ZeroDivisionError") and "seconds" not in failed
    for row in (plain, other):
        assert row["implementation"] == "xla" and "no Pallas kernel for cpu" in row["reason"]
        assert row["bf16_ratio"] == plain["seconds"] / row["seconds"] and row["dense_ratio"] > 0
        assert row["copy_fraction"] == pytest.approx(row["nbytes"] / row["seconds"] / 1e9)
    assert other["nbytes"] < plain["nbytes"]
    screen = io.StringIO()
    Console(width=200, file=screen).print(kernels.kernel_table([plain, failed, other]))
    text = screen.getvalue()
    assert all(kind in text for kind in ("bf16", "int8", "fp8"))
    assert kernels.reasons([plain, failed, other])[1:] == [f"int8 at 256: {failed['error']}"]


def test_nothing_begins_when_time_is_over():
    assert list(kernels.bench_kernels([small("int8")], bandwidth=1e9, until=-math.inf)) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "int3"}, "no kind of store 'int3': bf16, int8"),
        ({"context": 100}, "multiple of 128"),
        ({"batch": 0}, "batch must be at least 1"),
        ({"dim": 100}, "multiple of 64"),
    ],
)
def test_cases_that_make_no_sense(arguments, message):
    with pytest.raises(ValueError, match=message):
        Case(**{"kind": "int8", "context": 256} | arguments)


def test_a_kernel_that_would_be_interpreted_is_not_timed():
    kernels.check_implementation([small("int8")], "auto")
    with pytest.raises(KernelError, match="interpreted here"):
        kernels.check_implementation([small("int8")], "tpu")


def test_the_command_prints_a_table_and_writes_rows(tmp_path):
    command = ["bench", "kernels", "--kinds", "int8,bf16", "--contexts", "256", "--heads", "1", "--dim", "64"]
    done = CliRunner().invoke(app, [*command, "--json", str(tmp_path / "rows.json")], env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    assert "of copy" in done.stdout and "there is no Pallas kernel for cpu" in done.stdout
    written = json.loads((tmp_path / "rows.json").read_text())
    assert [row["kind"] for row in written["rows"]] == ["bf16", "int8"] and written["copy_bytes_per_s"] > 0
    done = CliRunner().invoke(app, [*command, "--json", "-"])
    assert [row["kind"] for row in json.loads(done.stdout)["rows"]] == ["bf16", "int8"]


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["bench", "kernels", "--kinds", "int3"], "no kind of store 'int3'"),
        (["bench", "kernels", "--contexts", "4k"], "numbers separated by commas"),
        (["bench", "kernels", "--implementation", "gpu"], "gpu kernel"),
        (["bench", "--batch", "3", "kernels"], "--batch belongs to `kvjax bench`"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_of_the_command_is_one_line(command, message):
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 2 and message in done.stderr and not done.stdout, done.output


def script(name: str, *args: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "scripts" / name), *args]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.mark.slow
def test_the_check_of_an_accelerator_runs_from_end_to_end(tmp_path):
    done = script("check_accelerator.py", "--quick", "--small", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = tmp_path.glob("cpu/*.json")
    report = json.loads(path.read_text())
    parts = report["parts"]
    assert list(parts) == ["numerics", "bandwidth", "steps", "peers", "shapes"]
    assert {row["verdict"] for row in parts["numerics"]} == {"PASS"}
    checked = {tuple(row["check"].split()[:2]) for row in parts["numerics"]}
    names = ("decode", "prefill", "paged", "write")
    assert {(kernel, how.strip(",")) for kernel, how in checked} == {(x, y) for x in names for y in ("tpu", "xla")}
    assert [row["policy"] for row in parts["steps"]] == ["full", "kivi", "snapkv(128)"]
    assert all("error" not in row for rows in parts.values() for row in rows)
    sizes = {row["policy"]: row["cache_nbytes"] for row in parts["steps"]}
    assert sizes["kivi"] < sizes["full"]
    table = path.with_suffix(".md").read_text()
    assert all(f"## {part}" in table for part in parts) and "no measurement" in table


DYING = """
import os, sys
sys.path.insert(0, {folder!r})
import check_accelerator

def numerics(run, report):
    for item in ("a", "b", "c"):
        if item in run.tried:
            continue
        run.begin(item)
        if item == "b":
            os._exit(7)
        yield {{"check": item, "verdict": "PASS", "errors": {{"": 0.0}}, "tolerance": 1.0}}

check_accelerator.PARTS = check_accelerator.PARTS | {{"numerics": numerics}}
check_accelerator.main()
"""


def test_what_takes_the_process_down_costs_no_other_result(tmp_path):
    program = tmp_path / "dying.py"
    program.write_text(DYING.format(folder=str(ROOT / "scripts")))
    command = [sys.executable, str(program), "--small", "--only", "numerics", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})
    assert done.returncode == 1 and "Wrong: b." in done.stderr and "ended with 7" in done.stdout, done.stderr
    (path,) = tmp_path.glob("cpu/*.json")
    rows = json.loads(path.read_text())["parts"]["numerics"]
    assert [(row["check"], row["verdict"]) for row in rows] == [("a", "PASS"), ("b", "ERROR"), ("c", "PASS")]
    assert "hung or died" in path.with_suffix(".md").read_text()


def check_accelerator() -> dict:
    return runpy.run_path(str(ROOT / "scripts" / "check_accelerator.py"), run_name="check_accelerator")


def test_an_error_of_a_kernel_shows():
    relative_error = check_accelerator()["relative_error"]
    wanted = np.asarray([4.0, -1e30])
    assert relative_error(wanted, wanted) == 0
    assert relative_error(np.asarray([4.4, -1e30]), wanted) == pytest.approx(0.1)
    for wrong in ([np.nan, -1e30], [4.0, 1.0], [-1e30, -1e30], [4.0]):
        assert relative_error(np.asarray(wrong), wanted) == math.inf


def test_the_tuner_writes_a_table_that_kernels_read(tmp_path, monkeypatch):
    arguments = ("--kinds", "int8", "--dims", "64", "--contexts", "256", "--out", str(tmp_path))
    done = script("tune_kernels.py", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    path = tmp_path / tuning.file_name("cpu")
    first = json.loads(path.read_text())
    (entry,) = first["entries"]
    assert (entry["kind"], entry["dim"], entry["rows"], entry["slots"]) == ("int8", 64, 4, 256)
    monkeypatch.setenv(tuning.VARIABLE, str(tmp_path))
    assert tuning.tuned(entry["kernel"], tuning.Shape("int8", 64, 4, 300), "cpu") == entry["options"]


def test_the_tuner_tries_no_block_that_kernels_would_not_use():
    every_option = runpy.run_path(str(ROOT / "scripts" / "tune_kernels.py"), run_name="tune_kernels")["every_option"]
    tried = every_option({"block": (128, 256, 512), "stages": (2, 3), "splits": (1,)}, {"block", "stages"}, 300)
    assert tried == [{}, *({"block": block, "stages": stages} for block in (128, 256) for stages in (2, 3))]


def test_new_entries_replace_old_ones_of_their_shape():
    merge = runpy.run_path(str(ROOT / "scripts" / "tune_kernels.py"), run_name="tune_kernels")["merge"]
    entry = {"kernel": "decode", "kind": "int8", "dim": 64, "rows": 4, "slots": 256, "options": {"block": 64}}
    other, new = entry | {"slots": 512}, entry | {"options": {"block": 128}}
    assert merge([other, entry], new) == [new, other]
