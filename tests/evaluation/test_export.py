"""Files for judges hold what was written, in the keys that their scripts read."""

import json
import pathlib

import numpy as np
import pytest

import kvjax
from kvjax.evaluation import (
    Settings,
    aggregate,
    export_predictions,
    make_cases,
    make_task,
    parse_policies,
    resolved_config,
    run,
    summarize,
)
from kvjax.evaluation.metrics import METRICS
from kvjax.evaluation.rouge import rouge_n
from tests.evaluation.letters import MODEL

FILES = pathlib.Path(__file__).parents[1] / "data" / "tasks"


@pytest.fixture(scope="module")
def model():
    return kvjax.load("tiny")


def go(model, task, policies, folder):
    settings = Settings(policies=parse_policies(policies), speed=False, tokens=2)
    cases = make_cases(task, task.samples(model), settings)
    return run(model, task, cases, settings, resolved_config("tiny", np.float32, task, settings), folder)


def test_rows_have_the_parts_of_rouge(model, tmp_path):
    task = make_task("zeroscrolls_gov_report", path=str(FILES / "zeroscrolls"), tokens=16)
    (row,) = go(model, task, "full", tmp_path)
    references = tuple(row["references"])
    assert row["rouge1"] == max(rouge_n(row["prediction"], text, 1) for text in references) > 0
    assert row["score"] == METRICS["rouge_geometric"](row["prediction"], references, {})
    assert aggregate(row["metric"], [row]) == pytest.approx(row["score"]) and {"rouge2", "rougeL"} <= row.keys()


def test_a_run_for_a_judge(model, tmp_path):
    task = make_task("longmemeval_judged_oracle", path=str(FILES), tokens=4)
    rows = go(model, task, "full; streaming_llm(0.5)", tmp_path)
    assert all("score" not in row and row["prediction"] for row in rows) and "score" not in summarize(rows)[0]
    with pytest.raises(ValueError, match="has 2 answers: give the rows of one policy"):
        export_predictions(rows, tmp_path / "all.jsonl", "longmemeval")
    mine = [row for row in rows if row["policy"] == "full"]
    export_predictions(mine, tmp_path / "full.jsonl", "longmemeval")
    lines = [json.loads(line) for line in (tmp_path / "full.jsonl").read_text().splitlines()]
    assert [line.keys() for line in lines] == [{"question_id", "hypothesis"}] * 4
    assert [line["question_id"] for line in lines] == ["q1", "q2_abs", "q3", "q4"]
    assert [line["hypothesis"] for line in lines] == [row["prediction"] for row in mine]


def test_plans_for_their_judge(tmp_path):
    (sample,) = make_task("longgenbench_plans", path=str(FILES / "longgenbench")).samples(MODEL)
    row = {"sample": sample.id, "prediction": " Snow.\n#*# Week 2 (8th): her birthday", **sample.info}
    export_predictions([row], tmp_path / "plans.json", "longgenbench_plans")
    (plan,) = json.loads((tmp_path / "plans.json").read_text())
    (given,) = json.loads((FILES / "longgenbench" / "Dataset_short.json").read_text())
    for key in ("checks_once", "checks_range", "checks_periodic", "type", "number"):
        assert plan[key] == given[key]
    assert plan["output_blocks"] == ["", " Week 1 (January 1st - January 7th): Snow.\n", " Week 2 (8th): her birthday"]
    assert plan["word_count"] == 15


def test_rows_of_something_else(tmp_path):
    with pytest.raises(ValueError, match="Judges are known of longmemeval and longgenbench_plans"):
        export_predictions([], tmp_path / "x", "longbench")
    with pytest.raises(ValueError, match="no rows of longmemeval: each has prediction, question_id"):
        export_predictions([{"sample": "0", "prediction": ""}], tmp_path / "x", "longmemeval")
    assert not list(tmp_path.iterdir())
