"""Benchmarks from small files in their published formats: the published prompts, and gold answers that are right."""

import json
import pathlib
import sys

import pytest

from kvjax.evaluation.grid import make_grid
from kvjax.evaluation.metrics import METRICS
from kvjax.evaluation.tasks import make_task, make_tasks
from kvjax.evaluation.tasks.published import cut_middle, prompts
from tests.evaluation.letters import MODEL, prompt, read

FILES = pathlib.Path(__file__).parents[1] / "data" / "tasks"
DATA = str(FILES / "longbench")


def gold(task, sample):
    """What the first answer scores."""
    return METRICS[task.metric](read(sample.answers[0]), sample.references, sample.info)


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
    with pytest.raises(ValueError, match="no qasper.jsonl at"):
        make_task("longbench_qasper", path=str(tmp_path))
    (tmp_path / "qasper.jsonl").write_text('{"input": "?", "context": "c"}\n')
    with pytest.raises(ValueError, match="row 1 has no answers and no all_classes"):
        make_task("longbench_qasper", path=str(tmp_path))
    with pytest.raises(ValueError, match="has no room"):
        make_task("longbench_qasper", path=DATA, context=100)


def test_chinese_words_need_a_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "jieba", None)
    with pytest.raises(ValueError, match="pip install jieba"):
        make_task("longbench_dureader", path=DATA)


def test_a_group_takes_what_is_there(tmp_path, monkeypatch):
    for name in ("qasper", "dureader"):
        (tmp_path / f"{name}.jsonl").write_text((FILES / "longbench" / "qasper.jsonl").read_text())
    monkeypatch.setitem(sys.modules, "jieba", None)
    with pytest.warns(UserWarning, match="Left out of longbench:") as warned:
        (task,) = make_tasks("longbench", path=str(tmp_path), count=1)
    assert task == make_task("longbench_qasper", path=str(tmp_path), count=1)
    entry = {"task": "longbench", "path": str(tmp_path), "count": 1}
    with pytest.warns(UserWarning, match="Left out of longbench:"):
        assert make_grid({"model": "tiny", "policies": ["full"], "tasks": [entry]}, "grid").tasks == (task,)
    lines = str(warned[0].message).splitlines()[1:]
    assert len(warned) == 1 and len(lines) == 20
    assert "  longbench_dureader: Chinese answers are cut into words by the package jieba: pip install jieba." in lines
    assert any(line.startswith("  longbench_trec: There is no trec.jsonl") for line in lines)
    (tmp_path / "trec.jsonl").write_text("{}")  # One that is there and cannot be read is refused.
    with pytest.raises(ValueError, match="trec.jsonl: row 1 has no input"):
        make_tasks("longbench", path=str(tmp_path))
    for file in tmp_path.iterdir():
        file.unlink()
    with pytest.raises(ValueError, match="No task of longbench can be made:\n  longbench_narrativeqa: There is no"):
        make_tasks("longbench", path=str(tmp_path))


def test_a_file_is_part_of_what_is_resolved():
    resolved = make_task("longbench_qasper", path=DATA, count=1).resolved()
    assert resolved["path"] == "qasper.jsonl" and len(resolved["sha256"]) == 12 and resolved["tokens"] == 128


@pytest.mark.parametrize("name", prompts("infinitebench"))
def test_infinitebench(name):
    task = make_task(f"infinitebench_{name}", path=str(FILES / "infinitebench"))
    (sample,) = task.samples(MODEL)
    assert gold(task, sample) == 1.0 and METRICS[task.metric]("?", sample.references, sample.info) == 0.0
    assert sample.max_new_tokens == prompts("infinitebench")[name]["tokens"]
    assert "{" not in prompt(sample).replace('{"ab-1"', "").replace("{there}", "")


def test_infinitebench_reads_as_published():
    def asked(name):
        return prompt(make_task(f"infinitebench_{name}", path=str(FILES / "infinitebench")).samples(MODEL)[0])

    assert asked("passkey") == (
        "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. I will quiz you "
        "about the important information.\n\nThe grass is green.\nThe pass key is 71432. Remember it. 71432 is the "
        "pass key.\n\n\nWhat is the pass key?\n\nThe pass key is"
    )
    assert asked("code_run") == (
        "There is a function called func_1 in the following Python code.\n\ndef func_1(x):\n    return x - 4\n\n"
        "Please compute the exact value of func_1(-3). The value of func_1(-3) is"
    )
    assert asked("math_find").startswith("What is the largest number in the following list?\n\n[3, 9, 5]\n\nYou should")
    assert asked("longbook_choice_eng").endswith(
        "Question: What is Bob?\nA. dog\nB. cat\nC. fish\nD. bird\n\nThe letter of the correct answer is"
    )


def test_zeroscrolls_cuts_documents_at_their_end():
    folder = str(FILES / "zeroscrolls")
    (whole,) = make_task("zeroscrolls_gov_report", path=folder).samples(MODEL)
    (cut,) = make_task("zeroscrolls_gov_report", path=folder, context=300, tokens=50).samples(MODEL)
    assert len(cut.context_ids) + len(cut.question_ids) == 250 and cut.question_ids == whole.question_ids
    note = "... [The rest of the story is omitted]\n\n"
    assert read(cut.context_ids).endswith(note)
    assert read(whole.context_ids).startswith(read(cut.context_ids).removesuffix(note))
    with pytest.raises(ValueError, match="published without answers"):
        make_task("zeroscrolls_musique", path=folder)
    with pytest.raises(ValueError, match="no room for the question"):
        make_task("zeroscrolls_gov_report", path=folder, context=60, tokens=20).samples(MODEL)


def test_longmemeval():
    task = make_task("longmemeval_oracle", path=str(FILES))
    first, second = task.samples(MODEL)
    assert prompt(first) == (
        "I will give you several history chats between you and a user. Please answer the question based on the "
        "relevant chat history.\n\n\nHistory Chats:\n\n"
        "\n### Session 1:\nSession Date: 2023/05/20 (Sat) 02:21\nSession Content:\n\n"
        '[{"role": "user", "content": "I drive a blue Volvo."}, {"role": "assistant", "content": "Nice {car}."}]\n'
        "\n### Session 2:\nSession Date: 2023/05/21 (Sun) 02:00\nSession Content:\n\n"
        '[{"role": "user", "content": "Hello again."}, {"role": "assistant", "content": "Hello!"}]\n'
        "\n\nCurrent Date: 2023/05/30 (Tue) 23:40\nQuestion: Which car do I drive?\nAnswer:"
    )
    assert second.references == ("1",) and first.info == {"type": "single-session-user", "question_id": "q1"}
    assert gold(task, first) == gold(task, second) == 1.0
    (only,) = make_task("longmemeval_oracle", path=str(FILES), count=1, context=300, tokens=100).samples(MODEL)
    assert only.question_ids == first.question_ids and len(only.context_ids + only.question_ids) == 200
    assert first.context_ids[: len(only.context_ids)] == only.context_ids


def test_longmemeval_for_its_judge():
    task = make_task("longmemeval_judged_oracle", path=str(FILES))
    samples = task.samples(MODEL)
    published = json.loads((FILES / "longmemeval_oracle.json").read_text())
    assert [sample.info["question_id"] for sample in samples] == [row["question_id"] for row in published]
    assert {"q2_abs", "q3"} <= {sample.info["question_id"] for sample in samples} and task.metric == "judge"


GSM8K = {"path": str(FILES / "longgenbench"), "examples": str(FILES / "longgenbench" / "LongGenBench_prompt.txt")}
MMLU = {"path": str(FILES / "longgenbench"), "examples": str(FILES / "longgenbench" / "LongGenBench_prompt.json")}


def test_many_answers_of_gsm8k():
    task = make_task("longgenbench_gsm8k", **GSM8K, questions=3)
    first, second = task.samples(MODEL)
    assert "Examples: \nQuestion_1: \nBob has" in read(first.context_ids)
    assert read(first.context_ids).endswith("Answer_2:\nThe answer is 4.\n\nFollowing Question: \n")
    assert (
        read(first.question_ids)
        == "".join(f"Question_{i + 2}:\nAnn has {i} pears and buys 2. How many?\n" for i in (1, 2, 3)) + "\n"
    )
    assert gold(task, first) == gold(task, second) == 1.0 and len(second.references) == 2
    score = METRICS[task.metric]
    assert score("Answer_6:\nSo 6.\n\nAnswer_7:\nThe answer is 1502.", second.references, {}) == 1.0
    assert score("Answer_6:\nThe answer is 7.\n\nAnswer_7:\n1,502", second.references, {}) == 0.5
    assert score("Answer_6:\n6", second.references, {}) == 0.5 and score("6", second.references, {}) == 0.0
    # The benchmark takes commas out of what was written, and not out of the reference.
    assert score("Answer_6:\n1,502", ("#### 1,502",), {}) == 0.0 and score("Answer_6:\n502", ("#### 1,502",), {}) == 1.0
    authors = make_task("longgenbench_gsm8k", **GSM8K)
    assert (authors.questions, authors.count) == (35, 20) and len(authors.samples(MODEL)) == 1
    assert len(make_task("longgenbench_gsm8k", **GSM8K, count=1).samples(MODEL)) == 1


def test_many_answers_of_mmlu(tmp_path):
    task = make_task("longgenbench_mmlu", **MMLU)
    (sample,) = task.samples(MODEL)
    assert task.questions == 20
    assert "questions about anatomy.\n\nExamples: \nQuestion_1:\nWhich is an organ?\n(A) Liver" in prompt(sample)
    assert read(sample.question_ids) == (
        "Question_2:\nWhere is the heart?\n(A) In the chest, left(B) Head(C) Foot(D) Hand\n\n"
        "Question_3:\nWhich is a bone?\n(A) Liver(B) Skin(C) Femur(D) Lung\n\n\n"
    )
    assert gold(task, sample) == 1.0 and sample.info == {"subject": "anatomy", "questions": 2}
    assert METRICS[task.metric]("Answer_2:\n(A)\n\nAnswer_3:\n(B)", sample.references, {}) == 0.5
    assert task.resolved()["sha256"] != make_task("longgenbench_mmlu", **MMLU, questions=1).resolved()["sha256"]
    with pytest.raises(ValueError, match="no SUBJECT_test.csv"):
        make_task("longgenbench_mmlu", **MMLU | {"path": str(tmp_path)})
    with pytest.raises(ValueError, match="Cannot read the examples"):
        make_task("longgenbench_mmlu", **MMLU | {"examples": str(tmp_path / "none.json")})


def test_plans():
    task = make_task("longgenbench_plans", path=str(FILES / "longgenbench"))
    (sample,) = task.samples(MODEL)
    assert prompt(sample).endswith("*** started ***\n#*# Week 1 (January 1st - January 7th):")
    assert sample.stop == ("*** finished",) and sample.max_new_tokens == 8000
    score = METRICS[task.metric]
    assert score(" Snow.\n#*# Week 2 (8th): rain\n#*# Week 4: sun #*# Week 9", (), sample.info) == 0.75
    assert score("".join(f"#*# Week {i}" for i in (2, 3, 4)), (), sample.info) == 1.0
