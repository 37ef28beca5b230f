"""RULER's tasks: the published words, as long as asked and no longer, answers where they should be and scored right."""

import collections
import json
import re

import pytest

import kvjax
from kvjax.evaluation.metrics import METRICS
from kvjax.evaluation.tasks import TASKS, make_task, make_tasks
from kvjax.evaluation.tasks.haystack import NOISE
from kvjax.evaluation.tasks.ruler_words import zeta
from kvjax.evaluation.tasks.vocabulary import compounds, singles
from tests.evaluation.letters import MODEL, prompt, read

GENERATED = [name for name, entry in TASKS.items() if entry.group == "ruler" and not name.startswith("qa")]
NEEDLES = [name for name in GENERATED if name.startswith("niah")]


@pytest.fixture(scope="module")
def tiny():
    return kvjax.load("tiny")


def test_there_are_thirteen():
    assert sum(entry.group == "ruler" for entry in TASKS.values()) == 13


@pytest.mark.parametrize("name", GENERATED)
def test_they_fill_the_length_and_follow_the_seed(tiny, name):
    def made(**more):
        return make_task(name, count=2, context=1200, **more).samples(tiny)

    samples = made()
    assert samples == made() and samples != made(seed=1)
    for sample in samples:
        total = len(sample.context_ids) + len(sample.question_ids) + sample.max_new_tokens
        assert 1200 - 80 < total <= 1200
    with pytest.raises(ValueError, match="has no room for the task: it takes"):
        make_task(name, context=150).samples(tiny)


@pytest.mark.parametrize("name", GENERATED)
def test_gold_answers_are_right_and_others_wrong(name):
    task = make_task(name, count=2, context=6000)
    for sample in task.samples(MODEL):
        (answer,) = sample.answers
        score = METRICS[task.metric]
        assert score(read(answer), sample.references, sample.info) == 1.0
        assert score("nothing of this", sample.references, sample.info) == 0.0
        assert score(sample.references[0], sample.references, sample.info) == 1 / len(sample.references)


@pytest.mark.parametrize("name", NEEDLES)
def test_needles_lie_at_their_depth(name):
    for sample in make_task(name, count=4, context=8000).samples(MODEL):
        text = read(sample.context_ids)
        introduction = text.index("afterwards.\n") + len("afterwards.\n")
        depths = [sample.info["depth"]] if "depth" in sample.info else sample.info["depths"]
        for reference, depth in zip(sample.references, depths, strict=True):
            assert text.count(f" is: {reference}.") == 1
            begin = text.rindex("One of the special", 0, text.index(f" is: {reference}."))
            assert abs((begin - introduction) / (len(text) - introduction) - depth) < 1e-3


def test_needles_have_the_published_number():
    def of(name):
        (sample,) = make_task(name, count=1, context=6000).samples(MODEL)
        return sample, re.findall(r"One of the special magic \w+ for (\S+) is: (\S+)\.", read(sample.context_ids))

    for name, keys, values, asked in [
        ("niah_single_1", 1, 1, 1),
        ("niah_single_3", 1, 1, 1),
        ("niah_multikey_1", 4, 4, 1),
        ("niah_multivalue", 1, 4, 4),
        ("niah_multiquery", 4, 4, 4),
    ]:
        sample, needles = of(name)
        assert (len({key for key, _ in needles}), len(needles), len(sample.references)) == (keys, values, asked)
    for name in ("niah_multikey_2", "niah_multikey_3"):
        sample, needles = of(name)
        assert len(needles) > 30 and len({key for key, _ in needles}) == len(needles)
        assert read(sample.context_ids).count("\n") == len(needles)
    assert re.fullmatch("[0-9a-f-]{36}", needles[0][0]) and re.fullmatch("[0-9a-f-]{36}", needles[0][1])


def test_needles_read_as_published():
    (one,) = make_task("niah_single_1", count=1, context=950).samples(MODEL)
    key, value = re.search(r"numbers for (\S+) is: (\d{7})\.", prompt(one)).groups()
    lines = [NOISE] * prompt(one).count(NOISE)
    lines.insert(round(one.info["depth"] * len("\n".join(lines)) / len(NOISE)), "")
    lines[lines.index("")] = f"One of the special magic numbers for {key} is: {value}."
    assert prompt(one) == (
        "A special magic number is hidden within the following text. Make sure to memorize it. I will quiz you about "
        "the number afterwards.\n" + "\n".join(lines) + "\n"
        f"What is the special magic number for {key} mentioned in the provided text?"
        f" The special magic number for {key} mentioned in the provided text is"
    )
    assert one.max_new_tokens == 128 and read(one.answers[0]) == f" {value}" and one.references == (value,)
    (four,) = make_task("niah_multiquery", count=1, context=2000).samples(MODEL)
    assert prompt(four).startswith(
        "Some special magic numbers are hidden within the following text. Make sure to memorize it. I will quiz you "
        "about the numbers afterwards.\n"
    )
    assert re.search(
        r"\nWhat are all the special magic numbers for (\S+, \S+, \S+, and \S+) mentioned in the provided text\?"
        r" The special magic numbers for \1 mentioned in the provided text are$",
        prompt(four),
    )


def test_an_essay_of_your_own(tmp_path):
    path = tmp_path / "essay.txt"
    path.write_text("One thing.\nAnother   thing! " * 3)
    (sample,) = make_task("niah_single_2", count=1, context=1500, haystack=str(path)).samples(MODEL)
    text = read(sample.context_ids)
    assert "One thing. Another thing! One thing." in text and text.count("thing") > 20
    with pytest.raises(ValueError, match="Cannot read the haystack"):
        make_task("niah_single_2", haystack=str(tmp_path / "none.txt"))


def test_an_essay_in_rulers_format(tmp_path):
    plain, essays = tmp_path / "essay.txt", tmp_path / "PaulGrahamEssays.json"
    plain.write_text("One thing.\nAnother {thing}! " * 3)
    essays.write_text(json.dumps({"text": plain.read_text()}))
    tasks = [make_task("niah_single_2", count=1, context=1500, haystack=str(path)) for path in (plain, essays)]
    assert tasks[0].samples(MODEL) == tasks[1].samples(MODEL)
    for i, wrong in enumerate(('["text"]', '{"essay": ""}', "{")):
        (tmp_path / f"{i}.json").write_text(wrong)
        with pytest.raises(ValueError, match="Cannot read the haystack"):
            make_task("niah_single_2", haystack=str(tmp_path / f"{i}.json"))


@pytest.mark.parametrize(("chains", "hops"), [(1, 4), (3, 2)])
def test_variables_are_chained(chains, hops):
    (sample,) = make_task("vt", count=1, context=6000, chains=chains, hops=hops).samples(MODEL)
    assert make_task("vt", chains=chains, hops=hops).name == {1: "vt", 3: "vt_3_2"}[chains]
    solved, text = read(sample.context_ids).split("\n\nMemorize and track")
    assignments = dict(re.findall(r"VAR (\w{5}) = (?:VAR )?(\w+)", text))
    assert len(assignments) == chains * (hops + 1) and text.count(NOISE) > 10
    value = re.search(r"assigned the value (\d+) in the text above\. Answer:", read(sample.question_ids)).group(1)

    def follow(name):
        return follow(assignments[name]) if name in assignments else name

    assert {name for name in assignments if follow(name) == value} == set(sample.references)
    places = [text.index(f"VAR {name} =") for name in sample.references]
    assert places == sorted(places)
    assert read(sample.question_ids).endswith(f" {hops + 1} variables are assigned the value {value}, they are: ")
    assert read(sample.answers[0]) == " ".join(sample.references)
    # The solved example is solved.
    value = re.search(r"value (\d+) in", solved).group(1)
    assert re.search(r"they are:  ([A-Z ]+)$", solved).group(1).split()[0] in solved.split(f" = {value}")[0]


@pytest.mark.parametrize(("context", "often"), [(3000, (6, 1)), (12_000, (30, 3))])
def test_common_words_are_common(context, often):
    (sample,) = make_task("cwe", count=1, context=context).samples(MODEL)
    solved, asked = read(sample.context_ids).removeprefix("Below").split("Below is a numbered list of words.")
    numbers, words = zip(*re.findall(r"(\d+)\. (\w+)", asked.split("\n")[1]), strict=True)
    assert [int(number) for number in numbers] == list(range(1, len(words) + 1))
    counts = collections.Counter(words)
    assert {word for word, n in counts.items() if n == often[0]} == set(sample.references)
    assert set(counts.values()) == set(often) and len(sample.references) == 10
    assert read(sample.question_ids) == (
        "\nQuestion: What are the 10 most common words in the above list?"
        " Answer: The top 10 words that appear most often in the list are:"
    )
    example = collections.Counter(re.findall(r"\d+\. (\w+)", solved.split("\n")[1]))
    gold = re.findall(r"\d+\. (\w+)", solved.split("are: ")[1])
    assert [word for word, _ in example.most_common(10)].sort() == gold.sort() and len(gold) == 10


def test_frequent_words_are_frequent():
    (sample,) = make_task("fwe", count=1, context=6000).samples(MODEL)
    text = read(sample.context_ids).split("most frequently appeared coded words. ")[1]
    counts = collections.Counter(text.split(" ")).most_common(5)
    assert counts[0][0] == "..." and tuple(word for word, _ in counts[1:4]) == sample.references
    assert counts[3][1] > counts[4][1]
    ratios = [n / counts[0][1] for _, n in counts[1:4]]
    assert ratios == pytest.approx([1 / 4, 1 / 9, 1 / 16], rel=0.1)


def test_zeta():
    assert zeta(2.0) == pytest.approx(1.6449340668482264, rel=1e-12)
    assert zeta(1.5) == pytest.approx(2.612375348685488, rel=1e-9)


SQUAD = {
    "version": "v2.0",
    "data": [
        {
            "title": f"Article {a}",
            "paragraphs": [
                {
                    "context": f"Article {a}, paragraph {p}: the colour is {color}.",
                    "qas": [
                        {
                            "id": f"{a}{p}",
                            "question": f"Which colour has {a}-{p}?",
                            "is_impossible": False,
                            "answers": [{"text": color, "answer_start": 40}, {"text": f"the colour {color}"}],
                        },
                        {"id": f"{a}{p}x", "question": "Why?", "is_impossible": True, "answers": []},
                    ],
                }
                for p, color in enumerate(("red", "green", "blue"))
            ],
        }
        for a in range(20)
    ],
}
HOTPOT = [
    {
        "_id": str(i),
        "question": f"Who wrote book {i}?",
        "answer": f"Author {i}",
        "supporting_facts": [[f"Book {i}", 0], [f"Life {i}", 0]],
        "context": [[f"Book {i}", [f"Book {i} is old.", " It is long."]], [f"Life {i}", [f"Author {i} wrote it."]]],
    }
    for i in range(40)
]


def test_questions_about_documents(tmp_path):
    (tmp_path / "dev-v2.0.json").write_text(json.dumps(SQUAD))
    (tmp_path / "hotpotqa.json").write_text(json.dumps(HOTPOT))
    for name in ("qa_1", "qa_2"):
        samples = make_task(name, path=str(tmp_path), context=1200, count=3).samples(MODEL)
        assert samples == make_task(name, path=str(tmp_path), context=1200, count=3).samples(MODEL)
        for sample in samples:
            text = read(sample.context_ids)
            assert 1100 < len(prompt(sample)) + 32 < 1200
            documents = text.split("The following are given documents.\n\n")[1].split("\n\n")
            assert [d.split(":\n")[0] for d in documents] == [f"Document {i + 1}" for i in range(len(documents))]
            assert len({document.split(":\n")[1] for document in documents}) == len(documents)
            needed = [documents[i - 1] for i in sample.info["documents"]]
            assert any(reference in document for reference in sample.references for document in needed)
            assert METRICS["string_match_part"](read(sample.answers[-1]).upper(), sample.references, {}) == 1.0
    assert prompt(samples[0]).startswith(
        "Answer the question based on the given documents. Only give me the answer and do not output any other words."
        "\n\nThe following are given documents.\n\nDocument 1:\n"
    )
    assert prompt(samples[0]).endswith(
        "\n\nAnswer the question based on the given documents. Only give me the answer and do not output any other "
        "words.\n\nQuestion: Who wrote book 0? Answer:"
    )
    assert "Book 0\nBook 0 is old. It is long." in prompt(samples[0])
    assert len(make_tasks("ruler", path=str(tmp_path), count=1)) == 13


def test_files_of_questions_are_checked(tmp_path):
    with pytest.raises(ValueError, match="needs path"):
        make_task("qa_1")
    with pytest.raises(ValueError, match=r"no squad.json or dev-v2.0.json at"):
        make_task("qa_1", path=str(tmp_path))
    (tmp_path / "squad.json").write_text('{"rows": []}')
    with pytest.raises(ValueError, match="not in the published format of squad"):
        make_task("qa_1", path=str(tmp_path))


def test_no_word_is_part_of_another():
    words = singles()
    assert not [(a, b) for a in words for b in words if a != b and a in b]


def test_words_are_never_short_of():
    import random

    for number in (10, 9000, 60_000):
        assert len(set(compounds(random.Random(0), number))) == number
