"""The command as people run it: in a process of its own, with what it prints and its exit code."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import rich.console

from kvjax.commands import complete, options
from tests import quick

ROOT = Path(__file__).parents[1]
TINY = str(ROOT / "tests" / "data" / "families" / "gemma3")  # Random weights, 128 tokens, no tokenizer.


def kvjax(*args: str, folder: Path = ROOT, stdin: str = "") -> subprocess.CompletedProcess:
    settings = {"COLUMNS": "200", "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    environment = os.environ | settings | quick.ENVIRONMENT
    return subprocess.run(
        [sys.executable, "-m", "kvjax", *args], cwd=folder, env=environment, capture_output=True, text=True, input=stdin
    )


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    lines = [
        {"context_ids": [(7 * i + n) % 126 + 2 for n in range(40)], "question_ids": [5, 6], "answer_ids": [7, 8]}
        for i in range(2)
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    return str(path)


def test_help_teaches():
    done = kvjax("--help")
    assert done.returncode == 0 and all(
        name in done.stdout for name in ("compare", "eval", "generate", "bench", "methods")
    )
    assert "Examples" in kvjax("compare", "--help").stdout


def test_methods():
    listed = json.loads(kvjax("methods", "--json").stdout)
    assert {"full", "snapkv", "kivi"} <= {row["name"] for row in listed}
    assert all(row["paper"] and row["url"] and row["phase"] and row["store"] for row in listed)
    table = kvjax("methods").stdout
    assert all(row["name"] in table and row["url"] in table for row in listed)
    assert "window: Queries at the end of the prompt" in kvjax("methods", "snapkv").stdout


def test_compare(rows, tmp_path):
    command = [
        "compare",
        "--model",
        TINY,
        "--task",
        rows,
        "--policies",
        "full; knorm(0.5); int4(group=16)",
        "--out",
        "out",
    ]
    done = kvjax(*command, "--json", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)["summary"]
    assert [row["policy"] for row in summary] == ["full", "knorm(0.5)", "int4(group=16)"]
    assert summary[1]["nbytes"] < summary[0]["nbytes"]
    written = json.loads((tmp_path / "out" / "results.json").read_text())
    assert len(written) == 6 and (tmp_path / "out" / "pareto.png").stat().st_size > 0

    again = kvjax(*command, folder=tmp_path)
    assert "6 rows are there" in again.stderr and "knorm(0.5)" in again.stdout
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == written

    other = kvjax(*command, "--protocol", "agnostic", folder=tmp_path)
    assert other.returncode == 2 and "other settings (protocol)" in other.stderr


def test_eval_and_bench(rows, tmp_path):
    done = kvjax("eval", "knorm(0.5)", "--model", TINY, "--tasks", rows, "--no-speed", "--out", "out", folder=tmp_path)
    assert done.returncode == 0 and "knorm(0.5)" in done.stdout, done.stderr
    done = kvjax("bench", "--model", TINY, "--policies", "knorm(8)", "--contexts", "32,64", "--tokens", "4", "--json")
    assert done.returncode == 0, done.stderr
    assert [(row["policy"], row["context"]) for row in json.loads(done.stdout)] == [
        ("full", 32),
        ("knorm(8)", 32),
        ("full", 64),
        ("knorm(8)", 64),
    ]


def test_on_a_mesh(rows, tmp_path, monkeypatch):
    """The same command on eight devices: the same answers, by a mesh alone."""
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "8")
    command = ["eval", "knorm(0.5)", "--model", TINY, "--tasks", rows, "--no-speed", "--json", "--out"]
    alone = kvjax(*command, "alone", folder=tmp_path)
    spread = kvjax(*command, "spread", "--mesh", "data=1,seq=2,model=4", folder=tmp_path)
    assert alone.returncode == spread.returncode == 0, alone.stderr + spread.stderr
    for one, other in zip(*(json.loads(done.stdout)["summary"] for done in (alone, spread)), strict=True):
        assert one["policy"] == other["policy"] and one["nll"] == pytest.approx(other["nll"], abs=1e-4)
    wrong = kvjax(*command, "wrong", "--mesh", "seq=3", folder=tmp_path)
    assert wrong.returncode == 2 and "takes 3 devices, and there are 8" in wrong.stderr


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["methods", "snapk"], "Unknown method 'snapk'. Did you mean snapkv"),
        (["compare", "--policies", "snapkv(0.25); snapk(0.5)"], "Unknown method 'snapk'"),
        (["compare", "--policies", "snapkv(0.25, windw=3)"], "no parameter 'windw'"),
        (["compare", "--policies", "kivi | snapkv(0.25)"], "evict first"),
        (["compare", "--task", "needles"], "no task 'needles' and no file of that name; did you mean needle? A task"),
        (["compare", "--model", "gemma3-270"], "Did you mean gemma3-270m"),
        (["compare", "--model", TINY], "has no tokenizer"),
        (["compare", "--out", "/proc/nowhere"], "Cannot write to the folder /proc/nowhere"),
        (["compare", "--samples", "0"], "samples must be at least 1"),
        (["compare", "--task", "longbench_qasper"], "needs path"),
        (["eval", "kivi", "--tasks", "needle; ppl", "--set", "depht=1"], "none of needle, ppl has such a parameter"),
        (["generate", "--policy", "full", ""], "prompt is empty"),
        (["generate", "hello", "--temperature", "-1"], "temperature"),
        (["generate", "hello", "--model", TINY], "no tokenizer"),
        (["bench", "--contexts", "12,x"], "numbers separated by commas"),
        (["bench", "--model", TINY, "--contexts", "1000"], "the model's context is 256"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_bad_input_is_one_line_and_exit_code_2(command, message, tmp_path):
    done = kvjax(*command, folder=tmp_path)
    assert done.returncode == 2 and message in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and done.stderr.count("\n") == 1 and not done.stdout


def test_a_policy_the_prompt_cannot_serve(rows, tmp_path):
    done = kvjax("compare", "--model", TINY, "--task", rows, "--policies", "snapkv(8)", folder=tmp_path)
    assert done.returncode == 2 and "needs at least" in done.stderr
    done = kvjax(
        "compare", "--model", TINY, "--task", rows, "--policies", "kivi(group=64, residual=64)", folder=tmp_path
    )
    assert done.returncode == 2 and "values have 16 channels" in done.stderr


@pytest.mark.slow
def test_generate(gemma):
    done = kvjax("generate", "-", "--policy", "int8", "-n", "8", stdin="The capital of France is")
    assert done.returncode == 0 and "France" in done.stdout, done.stderr
    assert "cache after them" in done.stderr and "int8" in done.stderr


GRID = """
name: small
model: tiny
policies: [knorm, random]
sizes: [50]
tasks:
  - {task: needle, context: 140, count: 1, depths: [0.2, 0.8]}
  - {task: longbench_qasper, path: data, context: 300}
continuation: 4
"""


def test_a_grid_is_shown_run_and_reported(tmp_path):
    (tmp_path / "small.yaml").write_text(GRID)
    (tmp_path / "data").mkdir()
    shutil.copy(ROOT / "tests" / "data" / "tasks" / "longbench" / "qasper.jsonl", tmp_path / "data")
    shown = kvjax("eval", "small.yaml", "--dry-run", folder=tmp_path)
    assert shown.returncode == 0 and "9 of 9 rows are left to run" in shown.stdout, shown.stderr
    assert re.search(r"needle-140-agnostic +2 +3 +140 +6 +1\.7 MB +8\d\d\.\d kB", shown.stdout)
    assert not (tmp_path / "results").exists()  # Nothing was run, and nothing was made.
    refused = kvjax("eval", "small.yaml", "--tasks", "ppl", folder=tmp_path)
    assert refused.returncode == 2 and "--tasks does not go with a grid" in refused.stderr
    ran = json.loads(kvjax("eval", "small.yaml", "--json", folder=tmp_path).stdout)
    assert [row["policy"] for row in ran["leaderboard"]][0] == "full" and len(ran["leaderboard"]) == 3
    rows = json.loads((tmp_path / ran["folder"] / "longbench_qasper-300-agnostic" / "results.json").read_text())
    assert all(0 <= row["score"] <= 1 and "prediction" in row and row["references"] for row in rows)
    page = (tmp_path / ran["page"]).read_text()
    assert "knorm" in page and "http://" not in page.split("</style>")[0]
    again = kvjax("report", ran["folder"], "--out", "again.html", folder=tmp_path)
    assert again.returncode == 0 and (tmp_path / "again.html").exists()


def test_a_dry_run_of_a_comparison_says_how_large_caches_would_be(rows, tmp_path):
    command = ["compare", "--model", TINY, "--task", rows, "--policies", "knorm(0.5)", "--dry-run", "--json"]
    shown = json.loads(kvjax(*command, folder=tmp_path).stdout)[0]
    assert shown["rows_left"] == 4 and shown["nbytes"]["knorm(0.5)"] < shown["nbytes"]["full"]
    assert not (tmp_path / "results").exists()


def test_tasks():
    listed = json.loads(kvjax("tasks", "ruler", "--json").stdout)
    assert len(listed) == 13 and listed[0]["parameters"]["count"]
    wrong = kvjax("tasks", "rulr")
    assert wrong.returncode == 2 and "Did you mean ruler?" in wrong.stderr


def test_doctor():
    done = kvjax("doctor", "--json")
    found = json.loads(done.stdout)
    assert done.returncode == 0 and found["problems"] == []
    assert found["versions"]["jax"] and found["devices"][0]["kind"] == "cpu" and found["devices"][0]["bytes"] > 2**30
    assert set(found["kernels"]) >= {"int8", "kivi2"}
    assert all(one["implementation"] == "xla" and one["reason"] for one in found["kernels"].values())


def test_the_doctor_knows_what_is_wrong():
    from kvjax.commands.doctor import problems

    clean = problems("gpu", has=lambda name: "/usr/bin/" + name, exists=lambda path: True)
    assert clean == []
    os_settings = os.environ.pop("JAX_PLATFORMS", None)
    try:
        found = problems("cpu", has=lambda name: "/usr/bin/" + name, exists=lambda path: path == "/dev/accel0")
    finally:
        if os_settings is not None:
            os.environ["JAX_PLATFORMS"] = os_settings
    assert len(found) == 2 and 'pip install "kvjax[gpu]"' in found[0] and 'pip install "kvjax[tpu]"' in found[1]


def test_parameters_of_tasks_are_written_as_in_a_grid():
    given = options.parameters(["depths=[0, 0.5]", "path=data/a=b", "count = 3"])
    assert given == {"depths": [0, 0.5], "path": "data/a=b", "count": 3}
    for wrong in (["path"], ["=3"], ["path="], ["a=1", "a=2"], ["a=[1"]):
        with pytest.raises(ValueError, match="--set"):
            options.parameters(wrong)


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("compare --task nee", ["needle", "needle_multikey", "needle_multivalue", "needle_multiquery"]),
        ("methods snap", ["snapkv"]),
        ("compare --model ti", ["tiny"]),
        ("eval configs/experiments/leaderboard_t", ["configs/experiments/leaderboard_tiny.yaml"]),
    ],
)
def test_the_shell_completes(words, offered, monkeypatch):
    monkeypatch.setenv("_KVJAX_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", f"kvjax {words}")
    monkeypatch.setenv("COMP_CWORD", str(len(words.split())))
    command = [str(Path(sys.executable).parent / "kvjax")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == offered, done.stderr


def test_what_stands_before_the_name_that_is_completed_stays(tmp_path, monkeypatch):
    assert complete.policies("full; snap") == ["full; snapkv"]
    assert complete.policies("snapkv(0.25) | kiv") == ["snapkv(0.25) | kivi"]
    assert complete.tasks("needle; ppl") == ["needle; ppl"] and "ruler" in complete.tasks("rule")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "small.gguf").touch()
    (tmp_path / "models" / "notes.txt").touch()
    assert complete.models("mod") == ["models/"] and complete.models("models/") == ["models/small.gguf"]


def test_progress_keeps_its_numbers_in_a_narrow_terminal(monkeypatch):
    written = io.StringIO()
    console = rich.console.Console(width=80, file=written, force_terminal=True, color_system=None)
    monkeypatch.setattr(options, "notes", console)
    with options.progress_bar("leaderboard_tiny") as advance:
        advance(624, 840, "niah_multikey_1-1020-agnostic: snapkv('25%B') | kivi(bits=4)")
    assert re.search(r"624/840 \d:\d\d:\d\d left \S+ niah_multikey.*…", written.getvalue()), written.getvalue()
