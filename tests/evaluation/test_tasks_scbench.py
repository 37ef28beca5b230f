"""Conversations about one context: every turn's question is where it should be, and all share what is compressed."""

import json
import pathlib
import re

import pytest

import kvjax
from kvjax.evaluation import Settings, make_cases, parse_policies
from kvjax.evaluation.metrics import METRICS
from kvjax.evaluation.tasks import make_task, make_tasks
from tests.evaluation.letters import MODEL, prompt, read

DATA = str(pathlib.Path(__file__).parents[1] / "data" / "tasks" / "scbench")
MADE = ("scbench_kv", "scbench_vt", "scbench_prefix_suffix", "scbench_many_shot")


@pytest.mark.parametrize("name", MADE)
@pytest.mark.parametrize("mode", ["multi_turn", "multi_request"])
def test_conversations_fit_and_share_what_is_compressed(name, mode):
    model = kvjax.load("tiny")

    def made(**more):
        return make_task(name, context=1800, count=2, turns=3, mode=mode, **more).samples(model)

    samples = made()
    assert samples == made() and samples != made(seed=1) and len(samples) == 6
    assert make_task(name, mode=mode).name == name + {"multi_turn": "", "multi_request": "_requests"}[mode]
    longest = [
        max(len(s.context_ids) + len(s.question_ids) + s.max_new_tokens for s in samples[i : i + 3]) for i in (0, 3)
    ]
    assert all(1550 < length <= 1800 for length in longest)
    for protocol in ("aware", "agnostic"):
        settings = Settings(policies=parse_policies("full"), protocol=protocol)
        cases = make_cases(make_task(name, mode=mode), samples, settings)
        assert len({case.prompt for case in cases}) == 2
        assert all(case.prompt + case.question == case.sample.context_ids + case.sample.question_ids for case in cases)
        first = len(samples[0].question_ids) - 1 if (protocol, mode) == ("aware", "multi_turn") else 0
        assert len(cases[0].prompt) == len(samples[0].context_ids) + first


@pytest.mark.parametrize("name", MADE)
def test_turns_have_the_earlier_answers_before_them(name):
    task = make_task(name, context=5000, count=1, turns=4)
    samples = task.samples(MODEL)
    for before, after in zip(samples, samples[1:], strict=False):
        assert (
            after.context_ids == before.context_ids and after.early == before.early == len(samples[0].question_ids) - 1
        )
        assert read(after.question_ids).startswith(read(before.question_ids) + read(before.answers[0]) + "\n\n")
    alone = make_task(name, context=5000, count=1, turns=4, mode="multi_request").samples(MODEL)
    assert all(sample.early == 0 and len(sample.question_ids) < 250 for sample in alone)
    for sample in (*samples, *alone):
        text = read(sample.answers[0])
        assert METRICS[task.metric](text, sample.references, sample.info) == 1.0
        assert METRICS[task.metric]("?", sample.references, sample.info) == 0.0
    assert [sample.info["turn"] for sample in samples] == [1, 2, 3, 4]


def test_what_is_asked_for_is_in_the_context():
    for sample in make_task("scbench_kv", context=5000, count=1).samples(MODEL):
        text = read(sample.context_ids)
        records = json.loads(text[text.index("{") :])
        key = re.findall(r'Key: "(.+)"', read(sample.question_ids))[-1]
        assert records[key] == sample.references[0]
        assert abs(list(records).index(key) / (len(records) - 1) - sample.info["depth"]) < 1e-3
    for sample in make_task("scbench_prefix_suffix", context=5000, count=1).samples(MODEL):
        strings = read(sample.context_ids).split("suffix.\n\n")[1].split("\n")
        asked = re.findall(r'Prefix: "(.+)"\nSuffix: "(.+)"', read(sample.question_ids))[-1]
        found = [text for text in strings if text.startswith(asked[0]) and text.endswith(asked[1])]
        assert found == [sample.references[0]]
        assert sum(text.startswith(asked[0]) for text in strings) > 1
    for sample in make_task("scbench_vt", context=5000, count=1, turns=3).samples(MODEL):
        assigned = dict(re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", read(sample.context_ids)))
        value = re.findall(r"assigned the value (\d+) in", read(sample.question_ids))[-1]
        assert assigned[sample.references[0]] == value and len(assigned) == 9
        assert [assigned[name] for name in sample.references[1:]] == list(sample.references[:-1])
    for sample in make_task("scbench_many_shot", context=5000, count=1).samples(MODEL):
        shots = dict(re.findall(r"Thing: (\w+ \w+)\nClass: (\w+)", read(sample.context_ids)))
        thing = re.findall(r"Thing: (\w+ \w+)\nClass:$", read(sample.question_ids))[0]
        alike = {label for other, label in shots.items() if other.split()[0] == thing.split()[0]}
        assert thing not in shots and alike == set(sample.references)


def test_files_read_as_published():
    one, two = make_task("scbench_kv", path=DATA).samples(MODEL)
    assert prompt(one) == (
        "Extract the value corresponding to the specified key in the JSON object below.\n\nJSON data:\n"
        '{"a": "1x", "b": "2y"}\n\n\nKey: "b"\nThe value associated with the specified key is: '
    )
    assert prompt(two) == prompt(one) + '2y\n\n\nKey: "a"\nThe value associated with the specified key is: '
    assert (one.references, two.references, one.max_new_tokens) == (("2y",), ("1x",), 150)
    one, two = make_task("scbench_choice_eng", path=DATA).samples(MODEL)
    assert prompt(one).endswith(
        "\n\nQuestion: What is Bob?\nA. dog\nB. cat\nC. fish\nD. bird\n\nThe the correct answer is"
    )
    assert prompt(two).endswith(
        "The the correct answer is cat\n\nQuestion: Who is a cat?\nA. Bob\nB. Ann\nC. Jim\nD. Sue\n\n"
        "The letter of the correct answer is"
    )
    assert one.references == ("cat", "B") and [read(answer) for answer in one.answers] == [" B", " cat"]
    one, two = make_task("scbench_mf", path=DATA).samples(MODEL)
    assert prompt(one).startswith("What is the largest number of the list?\n\n[3, 9, 5]\n\nYou should")
    assert "is: 9\n\nWhat is the smallest number of the list?\n\nYou should" in prompt(two)
    (one,) = make_task("scbench_vt", path=DATA).samples(MODEL)
    assert one.references == ("AB", "CD") and read(one.answers[0]) == " AB, CD"
    task = make_task("scbench_summary_with_needles", path=DATA)
    one, two = task.samples(MODEL)
    assert (one.max_new_tokens, two.max_new_tokens, task.metric) == (800, 15, "by_turn")
    assert METRICS["by_turn"]("55", two.references, two.info) == 1.0
    alone = make_task("scbench_mf", path=DATA, mode="multi_request").samples(MODEL)
    assert read(alone[1].question_ids).startswith("\n\nWhat is the smallest number") and alone[1].early == 0


def test_long_contexts_of_files_lose_their_middle():
    whole = make_task("scbench_choice_eng", path=DATA).samples(MODEL)
    cut = make_task("scbench_choice_eng", path=DATA, context=550).samples(MODEL)
    assert max(len(s.context_ids) + len(s.question_ids) + s.max_new_tokens for s in cut) in (549, 550)
    assert cut[0].context_ids == cut[1].context_ids and cut[1].question_ids == whole[1].question_ids
    assert read(cut[0].context_ids).startswith("Read the book") and read(cut[0].context_ids).endswith("is a cat. ")


def test_mistakes_are_named(tmp_path):
    with pytest.raises(ValueError, match="scbench_mf needs path"):
        make_task("scbench_mf")
    with pytest.raises(ValueError, match="The mode is"):
        make_task("scbench_kv", mode="scdq")
    with pytest.raises(ValueError, match="no scbench_kv.jsonl or kv.jsonl at"):
        make_tasks("scbench", path=str(tmp_path))
    (tmp_path / "kv.jsonl").write_text('{"context": "c", "multi_turns": [{"input": "?"}]}\n')
    with pytest.raises(ValueError, match="row 1 is not as SCBench publishes kv"):
        make_task("scbench_kv", path=str(tmp_path))
    with pytest.raises(ValueError, match="have no room for scbench_kv: it takes"):
        make_task("scbench_kv", context=200, count=1).samples(MODEL)
