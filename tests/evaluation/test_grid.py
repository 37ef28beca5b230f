"""Grids: what a file may say, what is run and shared, what goes on after an interruption, and what the numbers mean."""

import json
import multiprocessing
import pathlib
import shutil
import threading
import time

import jax
import numpy as np
import pytest

import kvjax
from kvjax.cache import EMPTY
from kvjax.evaluation import grid as grids
from kvjax.evaluation.grid import make_grid, prepare, read_grid, run_grid, unfinished
from kvjax.evaluation.leaderboard import leaderboard, leaderboard_table
from kvjax.evaluation.results import make_folder, read_rows

GRID = {
    "name": "small",
    "model": "tiny",
    "policies": ["kivi", "random"],
    "sizes": [50],
    "protocols": ["aware", "agnostic"],
    "tasks": [
        {"task": "needle", "context": [140], "count": 2},
        {"task": "passkey", "context": 145, "count": 2},
        {"task": "ppl", "context": 150, "count": 2},
    ],
    "continuation": 4,
    "speed": False,
}
ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def model():
    return kvjax.load("tiny")


@pytest.fixture(scope="module")
def ran(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    grid = make_grid(GRID, "small")
    jobs = prepare(lambda _: model, grid, folder)
    seen = []
    assert run_grid(lambda _: model, grid, jobs, folder, progress=lambda *now: seen.append(now)) == 0
    return grid, jobs, folder, seen


def rows_of(jobs):
    return [row for job in jobs for row in read_rows(job.folder, job.config)]


def test_jobs_are_tasks_under_protocols(ran):
    _, jobs, _, _ = ran
    names = [job.folder.name for job in jobs]
    assert names == [
        "needle-140-aware",
        "needle-140-agnostic",
        "passkey-145-aware",
        "passkey-145-agnostic",
        "ppl-150-agnostic",  # Has no question: one protocol is all.
    ]
    assert unfinished(jobs) == 0


def test_every_row_says_what_it_is(ran):
    _, jobs, _, _ = ran
    for row in rows_of(jobs):
        assert {"policy", "method", "budget", "task", "group", "length", "protocol", "seed", "context"} <= set(row)
        assert row["config_hash"] and row["versions"]["jax"] == jax.__version__ and row["device"] and row["time"]
        assert row["nbytes"] > 0 and row["compress_s"] > 0
        assert ("perplexity" in row) == (row["task"] == "ppl") != ("score" in row)
    assert {(row["method"], row["budget"]) for row in rows_of(jobs)} == {
        ("full", None),
        ("kivi", None),
        ("random", "50%B"),
    }


def test_written_answers_are_scored(ran, model):
    _, jobs, _, _ = ran
    job = next(job for job in jobs if job.folder.name == "passkey-145-agnostic")
    rows = [row for row in rows_of([job]) if row["policy"] == "full"]
    for row, case in zip(rows, job.cases, strict=True):
        cache = model.prefill(list(case.prompt))
        written = model.generate(list(case.question), cache=cache, max_new_tokens=case.sample.max_new_tokens)
        assert row["prediction"] == model.tokenizer.decode(written)
        assert row["score"] == float(any(answer in row["prediction"] for answer in row["references"]))


def test_progress_counts_all_rows(ran):
    _, jobs, _, seen = ran
    total = sum(job.rows for job in jobs)
    assert seen[-1][:2] == (total, total) and all(a[0] <= b[0] for a, b in zip(seen, seen[1:], strict=False))


def test_who_stays(ran, model):
    _, jobs, _, _ = ran
    job = next(job for job in jobs if job.folder.name == "needle-140-agnostic")
    found, prompt = json.loads((job.folder / "kept.json").read_text()), job.cases[0].prompt
    assert "".join(found["tokens"]) == model.tokenizer.decode(prompt) and len(found["tokens"]) == len(prompt)
    assert found["policies"]["full"]["share"] == [1.0] * len(prompt)
    mine = found["policies"]["random('50%B')"]
    cache = model.prefill(list(prompt), "random('50%B')")
    positions = [
        np.broadcast_to(layer.pos[0], (model.config.cache_heads, layer.pos.shape[-1])) for layer in cache.layers
    ]
    assert mine["heads"] == [(pos != EMPTY).sum(-1).tolist() for pos in positions]
    heads = [row for pos in positions for row in pos]
    expected = [np.mean([token in row for row in heads]) for token in range(len(prompt))]
    np.testing.assert_allclose(mine["share"], expected, atol=1e-4)


def test_heads_and_log(ran, model):
    grid, jobs, folder, _ = ran
    heads = json.loads((folder / "heads.json").read_text())
    assert np.shape(heads["retrieval"]) == (len(heads["layers"]), model.config.num_heads)
    about = json.loads((folder / "grid.json").read_text())
    assert about["jobs"] == [job.folder.name for job in jobs] and about["policies"][0] == "full"
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [line["job"] for line in log if line["event"] == "done"] == about["jobs"]


def test_the_leaderboard(ran):
    _, jobs, _, _ = ran
    rows = rows_of(jobs)
    board = leaderboard(rows)
    assert board[0]["policy"] == "full" and board[0]["smaller"] == 1 and board[0]["differences"] == {}
    by_name = {row["policy"]: row for row in board}
    mine = [row for row in rows if row["policy"] == "kivi" and "score" in row]
    means = [np.mean([r["score"] for r in mine if (r["task"], r["protocol"]) == key]) for key in
             dict.fromkeys((r["task"], r["protocol"]) for r in mine)]  # fmt: skip
    assert by_name["kivi"]["score"] == pytest.approx(np.mean(means))
    assert by_name["kivi"]["low"] <= by_name["kivi"]["score"] <= by_name["kivi"]["high"]
    low, high = by_name["kivi"]["bootstrap"]  # Of two contexts a task, all of which may be drawn twice.
    assert by_name["kivi"]["low"] <= low <= by_name["kivi"]["score"] <= high <= by_name["kivi"]["high"]
    assert by_name["kivi"]["perplexity"] == pytest.approx(
        np.exp(np.mean([np.log(r["perplexity"]) for r in rows if r["policy"] == "kivi" and "perplexity" in r]))
    )
    assert leaderboard_table(board).row_count == 3
    found = by_name["kivi"]["differences"]["score"]
    assert found["mean"] == pytest.approx(by_name["kivi"]["score"] - board[0]["score"])
    assert found["low"] <= found["mean"] <= found["high"]
    again = {row["policy"]: row for row in leaderboard(rows, against="kivi")}
    assert again["kivi"]["differences"] == {} and again["full"]["differences"]["score"]["p"] == found["p"]
    assert again["full"]["differences"]["score"]["mean"] == pytest.approx(-found["mean"])
    with pytest.raises(ValueError, match="Did you mean kivi"):
        leaderboard(rows, against="kiwi")


def test_what_is_there_is_not_run_again(ran, model, monkeypatch):
    grid, jobs, folder, _ = ran
    before = rows_of(jobs)
    monkeypatch.setattr(grids, "run", None)
    assert run_grid(lambda _: model, grid, prepare(lambda _: model, grid, folder), folder) == 0
    assert rows_of(jobs) == before


def test_an_interrupted_grid_goes_on(ran, model, tmp_path):
    grid, jobs, _, _ = ran
    mine = prepare(lambda _: model, grid, tmp_path)

    def stop(done: int, total: int, what: str) -> None:
        if done >= 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_grid(lambda _: model, grid, mine, tmp_path, progress=stop)
    left = unfinished(mine)
    assert 0 < left < sum(job.rows for job in mine)
    run_grid(lambda _: model, grid, mine, tmp_path)
    timed = ("time", "prefill_s", "compress_s", "decode_tokens_per_s")
    plain = [[{k: v for k, v in row.items() if k not in timed} for row in rows_of(of)] for of in (jobs, mine)]
    assert plain[0] == plain[1]


def _hold(folder: str, held, done) -> None:
    with grids._claimed(pathlib.Path(folder)) as free:
        assert free
        held.set()
        done.wait(60)


def test_a_job_belongs_to_one_process_and_is_free_when_it_dies(ran, tmp_path):
    context = multiprocessing.get_context("spawn")
    held, done = context.Event(), context.Event()
    other = context.Process(target=_hold, args=(str(tmp_path), held, done))
    other.start()
    assert held.wait(60)
    with grids._claimed(tmp_path) as free:
        assert not free
    other.kill()
    other.join()
    with grids._claimed(tmp_path) as free:
        assert free


def test_who_looks_at_a_folder_leaves_alone_what_another_is_writing(tmp_path):
    writing = tmp_path / "results.json.partial"
    writing.write_text("[")
    make_folder(tmp_path)
    assert writing.read_text() == "["
    assert [path.name for path in tmp_path.iterdir()] == [writing.name]


def test_devices_share_the_jobs(ran, model, tmp_path):
    grid = make_grid(GRID | {"policies": ["full"], "sizes": []}, "small")
    mine = prepare(lambda _: model, grid, tmp_path)[:2]
    run_grid(lambda _: model, grid, mine, tmp_path, devices=jax.devices()[1:3])
    whole = [row for row in rows_of(ran[1][:2]) if row["policy"] == "full"]
    for one, other in zip(whole, rows_of(mine), strict=True):
        assert one["score"] == other["score"] and one["nll"] == pytest.approx(other["nll"], abs=1e-4)


def test_devices_stop_together(model, tmp_path, monkeypatch):
    """What goes wrong on one device does not wait for all that the others have left."""
    grid = make_grid(GRID | {"policies": ["full"], "sizes": []}, "small")
    ran, finished, broken = [], [], threading.Event()

    def run(model, task, cases, settings, config, folder, rows, progress):
        ran.append(folder)
        if len(ran) == 1:
            broken.wait(60)
            raise OSError("The disk is full.")
        for done in range(500):
            broken.set()
            time.sleep(0.01)
            progress(done, 500, "")
        finished.append(folder)

    monkeypatch.setattr(grids, "run", run)
    with pytest.raises(OSError, match="disk is full"):
        run_grid(lambda _: model, grid, prepare(lambda _: model, grid, tmp_path), tmp_path, devices=jax.devices()[1:3])
    assert len(ran) == 2 and not finished


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"polices": []}, "no setting 'polices'. Did you mean policies"),
        ({"policies": "kivi"}, "policies is a list"),
        ({"speed": 1}, "speed is true or false"),
        ({"continuation": True}, "continuation is a whole number"),
        ({"sizes": [0]}, "percentages"),
        ({"protocols": ["both"]}, "aware, agnostic or both"),
        ({"dtype": "int8"}, "dtype is float32"),
        ({"tasks": [{"name": "needle"}]}, "a task is a name, or a mapping"),
        ({"tasks": ["nedle"]}, "needle"),
        ({"tasks": [{"task": "needle", "contxt": 5}]}, "context"),
        ({"tasks": []}, "tasks is missing"),
        ({"model": 3}, "model is text"),
        ({"model": []}, "model is missing"),
        ({"model": ["a/x", "b/x.gguf"]}, "a/x and b/x.gguf would have one folder"),
        ({"tasks": [{"task": "qa_1", "path": "nowhere"}]}, "nowhere"),
        ({"policies": ["snapkvv"]}, "Did you mean snapkv"),
    ],
)
def test_mistakes_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        make_grid(GRID | change, "small", "grid.yaml")


def test_every_model_is_asked_the_same(model, tmp_path):
    """One after the other, each in a folder of its own."""
    grid = make_grid(GRID | {"model": ["tiny", "some/other.gguf"], "policies": ["full"], "sizes": []}, "two")
    asked = []
    load = lambda name: asked.append(name) or model  # noqa: E731
    jobs = [job for job in prepare(load, grid, tmp_path) if job.task.name == "needle"]
    names = [f"{name}/needle-140-{protocol}" for name in ("tiny", "other") for protocol in ("aware", "agnostic")]
    assert [job.name for job in jobs] == names
    run_grid(load, grid, jobs, tmp_path)
    assert asked == ["tiny", "some/other.gguf"] * 2
    assert json.loads((tmp_path / "grid.json").read_text())["jobs"] == names
    one, other = rows_of(jobs[:2]), rows_of(jobs[2:])
    assert {row["model"] for row in one} == {"tiny"} and {row["model"] for row in other} == {"some/other.gguf"}
    assert [row["nll"] for row in one] == [row["nll"] for row in other]
    assert all((tmp_path / name / "heads.json").exists() for name in ("tiny", "other"))


def test_files_lie_beside_the_grid_or_where_they_are_said_to_be(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    shutil.copy(ROOT / "tests" / "data" / "tasks" / "longbench" / "qasper.jsonl", tmp_path / "data")
    (tmp_path / "mine.jsonl").write_text('{"context_ids": [3, 4], "question_ids": [5], "answer_ids": [6]}')
    tasks = [{"task": "longbench_qasper", "path": "data"}, "mine.jsonl"]
    (tmp_path / "grid.yaml").write_text(json.dumps(GRID | {"tasks": tasks}))
    assert [task.name for task in read_grid(tmp_path / "grid.yaml").tasks] == ["longbench_qasper", "mine.jsonl"]
    (tmp_path / "other").mkdir()
    shutil.move(tmp_path / "grid.yaml", tmp_path / "other")
    with pytest.raises(ValueError, match=r"There is no qasper.jsonl at data"):
        read_grid(tmp_path / "other" / "grid.yaml")
    monkeypatch.chdir(tmp_path)
    assert len(read_grid(pathlib.Path("other/grid.yaml")).tasks) == 2
    assert grids.beside("./data", tmp_path) == str(tmp_path / "data")
    assert grids.beside("data", tmp_path) == "data" and grids.beside("some/model", tmp_path) == "some/model"


def test_two_jobs_do_not_share_a_folder(model, tmp_path):
    grid = make_grid(GRID | {"tasks": [{"task": "needle", "context": 140}, {"task": "needle", "context": 140}]}, "x")
    with pytest.raises(ValueError, match="Two tasks are called needle-140"):
        prepare(lambda _: model, grid, tmp_path)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(ValueError, match="Cannot read the grid .*no such file"):
        read_grid(tmp_path / "none.yaml")
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(ValueError, match=r"no such file. Did you mean .*/list.yaml\?"):
        read_grid(tmp_path / "lists.yaml")
    with pytest.raises(ValueError, match="a grid is a mapping"):
        read_grid(tmp_path / "list.yaml")


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "experiments").glob("*.yaml")), ids=lambda path: path.name)
def test_the_grids_that_come_along_can_be_read(path):
    grid = read_grid(path)
    assert grid.name == path.stem and len(grid.policies) > 1 and grid.tasks
