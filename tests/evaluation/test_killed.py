"""A run that is killed at any moment, ten times over, ends with the results of one that was left alone."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from kvjax.evaluation.results import FILE
from kvjax.evaluation.runner import KEPT
from tests import quick
from tests.evaluation import long_run

ROOT = Path(__file__).parents[2]
SAMPLES, KILLS = 40, 10
PATIENCE = 120  # Seconds, of which none is meant to be needed.


@pytest.fixture(scope="module")
def task_file(tmp_path_factory) -> Path:
    rng = np.random.default_rng(0)

    def ids(length: int) -> list[int]:
        return rng.integers(2, 128, length).tolist()

    rows = [{"context_ids": ids(40), "question_ids": ids(4), "answer_ids": ids(3)} for _ in range(SAMPLES)]
    path = tmp_path_factory.mktemp("task") / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def start(task_file: Path, folder: Path) -> subprocess.Popen:
    # A cache of compilations of its own: JAX does not write it atomically, and the other tests' must stay whole.
    cache = {"JAX_COMPILATION_CACHE_DIR": str(folder.parent / "jax"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    environment = os.environ | quick.ENVIRONMENT | cache
    command = [sys.executable, "-m", "tests.evaluation.long_run", str(task_file), str(folder)]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def size(folder: Path) -> int:
    return (folder / FILE).stat().st_size if (folder / FILE).exists() else 0


def rows_of(folder: Path) -> list[dict]:
    return json.loads((folder / FILE).read_text()) if (folder / FILE).exists() else []


def kill(process: subprocess.Popen, folder: Path, chance: random.Random, working: bool) -> None:
    """Kills a process at a random moment, or shortly after it has written results."""
    before, end = size(folder), time.monotonic() + PATIENCE
    while working and size(folder) == before and process.poll() is None and time.monotonic() < end:
        time.sleep(0.005)
    time.sleep(chance.uniform(0, 0.05 if working else 2))
    process.send_signal(signal.SIGKILL)


@pytest.mark.slow
def test_a_run_that_is_killed_loses_at_most_the_sample_at_hand(task_file, tmp_path):
    long_run.main(str(task_file), str(tmp_path / "whole"))
    folder, chance, killed, seen = tmp_path / "killed", random.Random(), 0, 0
    for number in range(KILLS):
        process = start(task_file, folder)
        try:
            kill(process, folder, chance, working=number % 2 == 0)
            output = process.communicate(timeout=PATIENCE)[0]
        finally:
            process.kill()
        assert process.returncode in (0, -signal.SIGKILL), output
        killed += process.returncode != 0
        rows = rows_of(folder)  # Whole, whenever it was killed.
        assert len(rows) >= seen and len(rows) % 2 == 0
        seen = len(rows)
    assert killed >= KILLS // 2 and 0 < seen, f"{killed} were killed before they had ended, with {seen} rows"
    process = start(task_file, folder)
    output = process.communicate(timeout=PATIENCE)[0]
    assert process.returncode == 0, output
    assert {file.name for file in folder.iterdir()} == {FILE, KEPT}
    whole, resumed = rows_of(tmp_path / "whole"), rows_of(folder)
    assert len(whole) == 2 * SAMPLES == len(resumed)
    for row, other in zip(whole, resumed, strict=True):
        assert row.keys() == other.keys()
        for key in row.keys() - {"time", "prefill_s", "compress_s"}:
            number = isinstance(row[key], float)
            assert other[key] == (pytest.approx(row[key], rel=1e-5, abs=1e-6) if number else row[key]), key
