"""Benchmarks from small files in their published formats: the published prompts, and gold answers that are right."""

import pathlib

import pytest

from kvjax.evaluation.metrics import METRICS
from kvjax.evaluation.tasks import TASKS, make_task
from kvjax.evaluation.tasks.published import cut_middle, prompts
from tests.evaluation.letters import MODEL, prompt, read

DATA = str(pathlib.Path(__file__).parents[1] / "data" / "tasks")


def gold(task, sample):
    """What the first answer scores."""
    return METRICS[task.metric](read(sample.answers[0]), sample.references, sample.info)


@pytest.mark.parametrize(
    ("name", "begin", "end", "tokens"),
    [
        (
            "longbench_qasper",
            "You are given a scientific article and a question. Answer the question as concisely as you can, using a "
            "single phrase or sentence if possible. If the question cannot be answered based on the information in the "
            'article, write "unanswerable". If the question is a yes/no question, answer "yes", "no", or '
            '"unanswerable". Do not provide any explanation.\n\nArticle: We train on {Europarl}. ',
            "Do not provide any explanation.\n\nQuestion: Which corpus is used?\n\nAnswer:",
            128,
        ),
        (
            "longbench_trec",
            "Please determine the type of the question below. Here are some examples of questions.\n\nQuestion: What",
            "Type: Individual\nQuestion: Who wrote Faust?\nType:",
            64,
        ),
        (
            "longbench_passage_retrieval_en",
            "Here are 30 paragraphs from Wikipedia, along with an abstract.",
            'The answer format must be like "Paragraph 1", "Paragraph 2", etc.\n\nThe answer is: ',
            32,
        ),
        (
            "longbench_lcc",
            "Please complete the code given below. \ndef add(a, b):\n",
            "(a, b):\nNext line of code:\n",
            64,
        ),
    ],
)
def test_longbench(name, begin, end, tokens):
    task = make_task(name, path=DATA)
    (sample,) = task.samples(MODEL)
    assert prompt(sample).startswith(begin) and prompt(sample).endswith(end)
    assert sample.max_new_tokens == tokens and task.length is None
    assert gold(task, sample) == pytest.approx(1.0, abs=1e-6)
    assert METRICS[task.metric]("?", sample.references, sample.info) < 0.2


def test_longbench_is_whole():
    names = [name for name, entry in TASKS.items() if entry.group == "longbench"]
    assert len(names) == 21 and all(TASKS[name].fixed["metric"] in METRICS for name in names)
    for name in prompts("longbench"):
        assert prompts("longbench")[name]["prompt"].count("{context}") == 1


def test_too_long_prompts_lose_their_middle():
    (whole,) = make_task("longbench_qasper", path=DATA).samples(MODEL)
    (cut,) = make_task("longbench_qasper", path=DATA, context=601, tokens=100).samples(MODEL)
    ids = whole.context_ids + whole.question_ids
    assert cut.context_ids + cut.question_ids == ids[:250] + ids[-250:]
    assert cut.context_ids[-10:] != whole.context_ids[-10:] and read(cut.question_ids).endswith("\n\nAnswer:")
    assert cut_middle((1, 2, 3, 4), (5, 6), 6) == ((1, 2, 3, 4), (5, 6))
    assert cut_middle((1, 2, 3, 4, 5), (6,), 4) == ((1, 2, 5), (6,))
    assert cut_middle((1, 2), (3, 4, 5, 6), 4) == ((1, 2), (5, 6))


def test_files_are_named_when_they_are_wrong(tmp_path):
    with pytest.raises(ValueError, match="needs path: answers a question about a scientific article"):
        make_task("longbench_qasper")
    with pytest.raises(ValueError, match="no qasper.jsonl or qasper_e.jsonl at"):
        make_task("longbench_qasper", path=str(tmp_path))
    (tmp_path / "qasper.jsonl").write_text('{"input": "?", "context": "c"}\n')
    with pytest.raises(ValueError, match="row 1 has no answers and no all_classes"):
        make_task("longbench_qasper", path=str(tmp_path))
    with pytest.raises(ValueError, match="has no room"):
        make_task("longbench_qasper", path=DATA, context=100)


def test_a_file_is_part_of_what_is_resolved():
    resolved = make_task("longbench_qasper", path=DATA, count=1).resolved()
    assert resolved["path"] == "qasper.jsonl" and len(resolved["sha256"]) == 12 and resolved["tokens"] == 128
