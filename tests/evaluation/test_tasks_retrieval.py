"""Needles in many shapes, pass keys, key-value pairs and passages: where they should be, and scored right."""

import json
import re

import pytest

import kvjax
from kvjax.evaluation.metrics import METRICS
from kvjax.evaluation.tasks import Needle, groups, make_task
from kvjax.evaluation.tasks.haystack import NOISE
from tests import tiny
from tests.evaluation.letters import MODEL, prompt, read

NAMES = groups()["retrieval"]


@pytest.mark.parametrize("name", NAMES)
def test_samples_fit_and_follow_the_seed(name):
    model = kvjax.load("tiny")

    def made(**more):
        return make_task(name, context=1200, count=3, **more).samples(model)

    samples = made()
    assert samples == made() and samples != made(seed=1)
    assert len({sample.id for sample in samples}) == len(samples) >= 3
    for sample in samples:
        # Needles and passages fill the context to the token, the others as far as whole lines go.
        exact = name.startswith(("needle", "copy"))
        whole = len(sample.context_ids) + len(sample.question_ids) + sample.max_new_tokens
        assert len(sample.context_ids) == 1200 if exact else 1100 < whole <= 1200


@pytest.mark.parametrize("name", ["needle_multivalue", "needle_multiquery", "passkey", "kv"])
def test_gold_answers_are_right(name):
    task = make_task(name, context=3000, count=3)
    for sample in task.samples(MODEL):
        text, score = read(sample.context_ids), METRICS[task.metric]
        assert all(reference in text for reference in sample.references)
        assert score(read(sample.answers[0]), sample.references, {}) == 1.0
        assert score("no", sample.references, {}) == 0.0


@pytest.mark.parametrize(("name", "context"), [("passkey", 4000), ("kv", 6000), ("needle", 3000), ("copy", 3000)])
def test_depths_are_where_they_should_be(name, context):
    samples = make_task(name, context=context, count=2, depths=[0, 0.3, 1.0]).samples(MODEL)
    assert [sample.info["depth"] for sample in samples] == [0, 0, 0.3, 0.3, 1.0, 1.0]
    for sample in samples:
        text = read(sample.context_ids)
        wanted = read(sample.answers[0]).strip(' "')
        at = text.rindex(read(sample.question_ids)) if name == "copy" else text.index(wanted)
        assert abs(at / len(text) - sample.info["depth"]) < 0.1
    for sample in make_task(name, context=context, count=4).samples(MODEL)[1:2]:
        assert sample.info["depth"] == 0.375


def test_one_of_several_needles_at_a_depth():
    for sample in Needle(context=2000, count=1, needles=4, depths=(0.1, 0.9)).samples(MODEL):
        text = read(sample.context_ids)
        numbers = re.findall(r"numbers for (\w+) is: (\d{7})\.", text)
        assert len(numbers) == 4 and sample.info["answer"] in dict(numbers).values() and len(text) == 1999
        order = [number for _, number in numbers].index(sample.info["answer"])
        assert order == {0.1: 0, 0.9: 3}[sample.info["depth"]]
    with pytest.raises(ValueError, match="from 0"):
        Needle(depths=(1.5,))


def test_all_numbers_of_a_city_and_of_several():
    for name, cities, numbers in (("needle_multivalue", 1, 4), ("needle_multiquery", 4, 4)):
        for sample in make_task(name, context=2500, count=3).samples(MODEL):
            hidden = re.findall(r"numbers for (\w+) is: (\d{7})\.", read(sample.context_ids))
            asked = re.search(r"numbers for (.+) mentioned in the provided text are:$", read(sample.question_ids))
            names = re.split(", | and ", asked.group(1))
            assert len(names) == cities and len(hidden) == numbers == len(sample.references)
            assert {number for city, number in hidden if city in names} == set(sample.references)


def test_the_pass_key_is_asked_as_published():
    (sample,) = make_task("passkey", context=600, count=1, depths=[0.5]).samples(MODEL)
    key = sample.references[0]
    lines = [NOISE] * prompt(sample).count(NOISE)
    lines.insert(len(lines) // 2, f"The pass key is {key}. Remember it. {key} is the pass key.")
    assert prompt(sample) == (
        "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. I will quiz you "
        "about the important information.\n\n" + "\n".join(lines) + "\n\nWhat is the pass key?\n\nThe pass key is"
    )


def test_values_are_asked_as_published():
    (sample,) = make_task("kv", context=900, count=1).samples(MODEL)
    text = read(sample.context_ids)
    beginning = "Extract the value corresponding to the specified key in the JSON object below.\n\nJSON data:\n"
    assert text.startswith(beginning)
    records = json.loads(text.removeprefix(beginning))
    key = re.fullmatch(r'\n\nKey: "(.+)"\nCorresponding value:', read(sample.question_ids)).group(1)
    assert records[key] == sample.references[0] and len(records) == sample.info["pairs"] > 4
    assert list(records)[sample.info["pair"]] == key
    first, second = list(records.items())[:2]
    assert text.removeprefix(beginning).startswith(f'{{"{first[0]}": "{first[1]}",\n "{second[0]}": "{second[1]}"')


def test_passages_come_once_and_go_on_as_they_did():
    bare = kvjax.Model({}, tiny.CONFIG)
    for model, name in ((MODEL, "copy"), (MODEL, "copy_tokens"), (bare, "copy_tokens")):
        for sample in make_task(name, context=500, count=3, lead=20, span=10).samples(model):
            ids, lead, (answer,) = sample.context_ids, sample.question_ids, sample.answers
            found = [i for i in range(len(ids)) if ids[i : i + 20] == lead]
            assert len(ids) == 500 and len(found) == 1 and ids[found[0] + 20 : found[0] + 30] == answer
            assert not set(answer) & {*model.config.eos_ids}
    with pytest.raises(ValueError, match="context must be at least 31"):
        make_task("copy", context=30, lead=20, span=10)
    with pytest.raises(ValueError, match="make lead longer"):
        make_task("copy", context=5000, count=1, lead=1).samples(MODEL)
