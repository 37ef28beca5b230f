"""Samples are what they say: lengths, needles, the same for the same seed; files are read, or refused by line."""

import json
import pathlib
import runpy

import pytest

import kvjax
from kvjax.evaluation import make_task
from kvjax.evaluation.metrics import METRICS
from kvjax.evaluation.tasks import (
    TASKS,
    Needle,
    Perplexity,
    groups,
    library_text,
    make_tasks,
    read_json_lines,
    split_answers,
)
from tests.evaluation.letters import MODEL


@pytest.fixture(scope="module")
def model():
    return MODEL


@pytest.mark.parametrize("needles", [1, 3])
def test_needles_lie_where_they_should(model, needles):
    task = Needle(context=1500, count=4, needles=needles)
    samples = task.samples(model)
    assert len(samples) == 4 * needles
    depths = []
    for sample in samples:
        assert len(sample.context_ids) == 1500
        text = "".join(map(chr, sample.context_ids[1:]))
        number = sample.info["answer"]
        assert text.count("special magic number") == needles and text.count(number) == 1
        assert sample.question_ids[-1] == ord(" ")
        (answer,) = sample.answers
        assert "".join(map(chr, answer)) == number and len(number) == 7
        depths.append(sample.info["depth"])
        assert abs(text.index(number) / len(text) - sample.info["depth"]) < 0.2
    assert min(depths) < 0.2 and max(depths) > 0.8
    assert len({len(sample.question_ids) for sample in samples}) == 1


def test_samples_follow_the_seed(model):
    def made(seed):
        return Needle(context=600, count=2, seed=seed).samples(model)

    assert made(0) == made(0) != made(1)


def test_perplexity_goes_on_where_the_context_ends(model):
    for sample in Perplexity(context=100, count=3, continuation=20).samples(model):
        (answer,) = sample.answers
        text = "".join(map(chr, sample.context_ids[1:] + sample.question_ids + answer))
        assert text in library_text() and len(sample.context_ids) == 100 and len(answer) == 19


def test_an_answer_begins_where_its_tokens_do(model):
    question, answers = split_answers(model.tokenizer, "Where? ", ["here", "there"])
    assert "".join(map(chr, question)) == "Where? " and ["".join(map(chr, a)) for a in answers] == ["here", "there"]


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"name": "needl"}, "no task 'needl'.*; did you mean needle?"),
        ({"name": "rular"}, "did you mean ruler?"),
        ({"name": "ruler"}, "ruler is a group of tasks: niah_single_1, "),
        ({"name": "needle", "count": 0}, "samples must be at least 1"),
        ({"name": "needle", "needles": 99}, "cities"),
        (
            {"name": "ppl", "needles": 2},
            "needles: no parameter of the task ppl. It has context, count, continuation, seed",
        ),
        ({"name": "vt", "hop": 2}, "hop: no parameter of the task vt; did you mean hops?"),
        ({"name": "ppl", "context": 0}, "context must be at least"),
    ],
)
def test_bad_tasks(parameters, message):
    with pytest.raises(ValueError, match=message):
        make_task(**parameters)


def test_none_stands_for_the_default():
    assert make_task("needle", context=None, count=None, needles=None, seed=0) == Needle()
    assert make_task("ppl", context=50, needles=None) == Perplexity(context=50)


def test_groups():
    for name, entry in TASKS.items():
        assert name in groups()[entry.group] and entry.about and "count" in entry.parameters
    tasks = make_tasks("text", context=60, continuation=10)
    assert Perplexity(context=60, continuation=10) in tasks
    assert make_tasks("needle", context=99) == (Needle(context=99),)
    with pytest.raises(ValueError, match="hop: no parameter of any task of text"):
        make_tasks("text", hop=3)
    with pytest.raises(
        ValueError, match="qa_1 and qa_2 of ruler need path: give it, or name those that do not: niah_single_1,"
    ):
        make_tasks("ruler")


def test_a_context_too_short_for_its_needles(model):
    with pytest.raises(ValueError, match="no room"):
        Needle(context=40).samples(model)


def test_text_without_a_tokenizer(model):
    with pytest.raises(ValueError, match="no tokenizer"):
        Needle().samples(kvjax.Model({}, model.config))


IDS = {"context_ids": [1, 2, 3], "question_ids": [4], "answer_ids": [5, 6]}


def test_rows_of_ids_and_of_text(model, tmp_path):
    path = tmp_path / "rows.jsonl"
    text = {"id": "t", "context": "abc", "question": "d?", "answers": ["e", "f"]}
    path.write_text("\n".join([json.dumps(IDS), "", json.dumps(text), json.dumps(IDS | {"answer_ids": [[5], [6, 7]]})]))
    ids, text, several = make_task(str(path)).samples(model)
    assert (ids.context_ids, ids.question_ids, ids.answers) == ((1, 2, 3), (4,), ((5, 6),))
    assert several.answers == ((5,), (6, 7)) and [s.id for s in (ids, text, several)] == ["1", "t", "4"]
    assert text.context_ids == (1, *map(ord, "abc")) and text.question_ids == (ord("d"), ord("?"))
    assert text.answers == ((ord(" "), ord("e")), (ord(" "), ord("f")))
    assert len(make_task(str(path), count=2).samples(model)) == 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", ":2: not valid JSON"),
        ("[1]", ":2: a row is an object"),
        ('{"context": "a", "question": "b"}', ":2: answers missing"),
        ('{"context": "", "question": "b", "answers": ["c"]}', ":2: context must be text, and not empty"),
        ('{"context": "a", "question": "b", "answers": []}', ":2: answers must be text or a list"),
        (
            '{"context_ids": [1.5], "question_ids": [1], "answer_ids": [1]}',
            ":2: context_ids must be a list of token ids",
        ),
        ('{"id": 1, "context_ids": [1], "question_ids": [1], "answer_ids": [1]}', ":2: id '1' is the id of line 1"),
    ],
)
def test_bad_rows_are_named_by_line(tmp_path, line, message):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(IDS) + "\n" + line)
    with pytest.raises(ValueError, match=message):
        read_json_lines(str(path))


def test_ids_beyond_the_vocabulary(model, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(IDS | {"answer_ids": [10**6]}))
    with pytest.raises(ValueError, match=":1: token id 1000000 is out of range"):
        make_task(str(path)).samples(model)


def test_the_page_of_tasks_is_up_to_date():
    root = pathlib.Path(__file__).parents[2]
    page = runpy.run_path(str(root / "scripts" / "make_task_table.py"))["page"]
    assert (root / "docs" / "tasks.md").read_text() == page(), "run python scripts/make_task_table.py"


def test_metrics_are_known():
    for entry in TASKS.values():
        assert entry.metric in METRICS or entry.metric in ("exact", "perplexity", "drift", "judge")
