"""Metrics against values computed by hand, and against those of the packages and scripts of the benchmarks."""

import importlib.util

import pytest

from kvjax.evaluation.metrics import METRICS, aggregate, by_words, effective_length, exact_match, scores
from kvjax.evaluation.rouge import rouge_l, rouge_l_sum, rouge_lcs, rouge_n

NONE = {}
CLASSES = {"all_classes": ["Abbreviation", "Expression abbreviated", "abbreviated", "Animal", "Expression"]}

# Prediction, reference, F of rouge-l of rouge 1.0.1; rouge1, rouge2, rougeL, rougeLsum of rouge-score 0.1.2.
ROUGE = [
    ("the cat sat on the mat", "the cat is on the mat", 0.799999995, 0.8333333333, 0.6, 0.8333333333, 0.8333333333),
    (
        "A big dog. It ran home. The dog is big.",
        "The big dog ran. It is home now.",
        0.874999995,
        0.7777777778,
        0.125,
        0.4444444444,
        0.4444444444,
    ),
    ("one two three. four five", "five four. three two one.", 0.399999995, 1.0, 0.0, 0.2, 0.2),
    (
        "Hello, world! It's 5 p.m. now",
        "hello world it is 5 pm",
        0.1538461489,
        0.5714285714,
        0.3333333333,
        0.5714285714,
        0.5714285714,
    ),
    ("nothing in common", "quite different words", 0.0, 0.0, 0.0, 0.0, 0.0),
    ("same same same", "same", 0.999999995, 0.5, 0.0, 0.5, 0.5),
    (
        "The report says costs rose.\nThe board met twice.\nNo vote was held.",
        "The board met two times.\nCosts rose, the report says.",
        0.4545454496,
        0.6956521739,
        0.5714285714,
        0.347826087,
        0.5217391304,
    ),
]


@pytest.mark.parametrize(("text", "reference", "of_rouge", "one", "two", "longest", "lines"), ROUGE)
def test_rouge_is_what_the_packages_say(text, reference, of_rouge, one, two, longest, lines):
    assert rouge_l(text, reference) == pytest.approx(of_rouge, abs=1e-9)
    assert rouge_n(text, reference, 1) == pytest.approx(one, abs=1e-9)
    assert rouge_n(text, reference, 2) == pytest.approx(two, abs=1e-9)
    assert rouge_lcs(text, reference) == pytest.approx(longest, abs=1e-9)
    assert rouge_l_sum(text, reference) == pytest.approx(lines, abs=1e-9)
    assert METRICS["rouge_geometric"](text, (reference,), NONE) == pytest.approx((one * two * longest) ** (1 / 3))


def test_rouge_of_a_data_set_is_that_of_scrolls():
    # The example in scrolls.py's docstring, and what it says of it.
    samples = [
        ("exact match example", ("exact match example",)),
        ("hello there", ("hello", "hi there")),
        ("general kenobi", ("commander kenobi",)),
    ]
    rows = [scores("rouge_geometric", text, references, NONE) for text, references in samples]
    means = [sum(row[key] for row in rows) / 3 for key in ("rouge1", "rouge2", "rougeL")]
    assert means == pytest.approx([0.722222, 0.333333, 0.722222], abs=1e-6)
    assert aggregate("rouge_geometric", rows) == pytest.approx(0.558136, abs=1e-6)
    assert [row["score"] for row in rows] == [1.0, 0.0, 0.0]


def test_every_rouge_has_its_own_best_reference():
    found = scores("rouge_geometric", "a b c d", ("a b", "d c b a"), NONE)
    assert (found["rouge1"], found["rouge2"], found["rougeL"]) == (1.0, 0.5, pytest.approx(2 / 3))
    assert found["score"] == pytest.approx((0.5 * 2 / 3) ** (1 / 3))


def test_other_metrics_aggregate_to_their_mean():
    rows = [scores("text_match", text, ("a",), NONE) for text in "abac"]
    assert rows[0] == {"score": 1.0} and aggregate("text_match", rows) == 0.5


def test_effective_length():
    def rows(length, *scores):
        names = ("niah_single_1", "vt", "vt")  # Tasks count alike, however many samples they have.
        return [{"length": length, "task": task, "score": s} for task, s in zip(names, scores, strict=True)]

    short, middle, long = rows(4096, 1.0, 1.0, 1.0), rows(8192, 1.0, 1.0, 0.424), rows(16384, 0.7, 1.0, 1.0)
    assert effective_length([*long, *middle, *short]) == 8192
    assert effective_length(short + long) == 4096 and effective_length(short + long, least=0.85) == 16384
    assert effective_length(long) is None
    with pytest.raises(ValueError, match="4096, 8192 have different tasks"):
        effective_length(short + middle[:1])


def test_scores_by_words():
    rows = [{"words": words, "score": score} for words, score in ((10, 1.0), (3999, 0.0), (4000, 0.25), (8000, 0.75))]
    assert by_words(rows) == {"0-4k": 0.5, "4-8k": 0.25, "8k+": 0.75}
    assert by_words(rows[3:]) == {"8k+": 0.75}


def test_rouge_of_nothing():
    for text, reference in (("", "word"), ("word", ""), (".", "word")):
        assert rouge_l(text, reference) == rouge_lcs(text, reference) == rouge_l_sum(text, reference) == 0.0


@pytest.mark.parametrize(  # What fuzzywuzzy 0.18 gives in LongBench's rule.
    ("text", "reference", "score"),
    [
        ("    return x + 1", "    return x + 1", 1.0),
        ("\n\n# a comment\nreturn x+1\nmore", "return x + 1", 0.91),
        ("for i in range(10):", "for j in range(len(x)):", 0.76),
        ("`a`", "a = b", 0.0),
        ("", "x", 0.0),
    ],
)
def test_code(text, reference, score):
    assert METRICS["code_similarity"](text, (reference,), NONE) == score


@pytest.mark.parametrize(  # LongBench's metrics.py.
    ("metric", "text", "reference", "score"),
    [
        ("qa_f1", "The Eiffel Tower, in Paris", "eiffel tower", 2 / 3 * 1.0),
        ("retrieval", "Paragraph 7 or Paragraph 3", "Paragraph 7", 0.5),
        ("retrieval_zh", "段落12", "段落12", 1.0),
        ("count", "There are 5, or 6, no 5", "5", 2 / 3),
        ("count", "many", "5", 0.0),
        ("classification", "Expression abbreviated", "Expression abbreviated", 0.5),
        ("classification", "Expression abbreviated", "Animal", 0.0),
        ("classification", "Animal or Abbreviation", "Animal", 0.5),
        ("classification", "none", "Animal", 0.0),
        ("classification", "Animal", "Animal", 1.0),
        ("classification_first_line", "\nAnimal\nAbbreviation", "Animal", 1.0),
        ("qa_f1_first_line", "\nParis\nLondon", "Paris", 1.0),
        ("rouge_l_first_line", "he left\nshe stayed", "he left", 1 - 5e-9),
    ],
)
def test_longbench(metric, text, reference, score):
    assert METRICS[metric](text, (reference,), CLASSES) == pytest.approx(score, abs=1e-9)


@pytest.mark.skipif(importlib.util.find_spec("jieba") is None, reason="jieba cuts Chinese text and is not installed")
def test_chinese_words():
    assert METRICS["qa_f1_zh"]("北京是中国的首都。", ("中国首都是北京",), NONE) == pytest.approx(8 / 9)
    assert METRICS["rouge_zh"]("北京是中国的首都。", ("中国首都是北京",), NONE) == pytest.approx(0.3999999952, abs=1e-9)


@pytest.mark.parametrize(
    ("metric", "text", "references", "score"),
    [
        ("string_match_all", " Apple and\x07pear", ("apple", "PEAR", "plum", "fig"), 0.5),
        ("string_match_part", "it is a PEAR", ("apple", "pear"), 1.0),
        ("string_match_part", "it is", ("apple", "pear"), 0.0),
        ("contains", 'the value is "ab-1"', ("ab-1",), 1.0),
        ("contains", "AB-1", ("ab-1",), 0.0),
        ("word", '{"k": "ab-1"}', ("ab-1",), 1.0),
        ("word", "xab-1", ("ab-1",), 0.0),
        ("word_in_capitals", "I think: Bob.", ("BOB",), 1.0),
        ("word_in_capitals", "Bobby", ("BOB",), 0.0),
        ("text_match", " a b\n", ("a b",), 1.0),
        ("text_match", "a  b", ("a b",), 0.0),
        ("first_integer", "key 71432. Not 5", ("71432",), 1.0),
        ("first_integer", "5 or 71432", ("71432",), 0.0),
        ("first_integer", "no", ("71432",), 0.0),
        ("first_number", "It is 3.50", ("3.5",), 1.0),
        ("first_number", "12.9", ("12",), 1.0),
        ("first_number", "none", ("12",), 0.0),
        ("last_integer", "The value is: -7.", ("-7",), 1.0),
        ("last_integer", "seven", ("7",), 0.0),
        ("last_integer", "", ("7",), 0.0),
        ("numbers_from_the_start", "[1, 4, 9, 7]", ("1", "4", "8", "7"), 0.5),
        ("choice", "B. Because", ("Bob", "B"), 1.0),
        ("choice", "A", ("Bob", "B"), 0.0),
        ("choice", "Bob", ("Bob", "B"), 1.0),
        ("choice", "the answer is: B", ("Bob", "B"), 1.0),
        ("choice", "the answer is Cleo", ("Bob", "B"), 0.0),
        ("choice", "perhaps C or B", ("Bob", "B"), 0.0),
        ("choice", "", ("Bob", "B"), 0.0),
        ("code_choice", "B. run", ("run", "B"), 1.0),
        ("code_choice", "the correct option is: run", ("run", "B"), 1.0),
        ("code_choice", "the answer is: C", ("run", "B"), 0.0),
        ("code_choice", "run", ("run", "B"), 0.0),
        ("first_letter", "(C) since A", ("C",), 1.0),
        ("first_letter", "All", ("A",), 0.0),
        ("qa_f1_characters", "北京。", ("北京市",), 0.8),
        ("exact_match", "The  Cat!", ("a cat",), 1.0),
        ("percentage_similarity", "60%", ("70%",), 0.5),
        ("percentage_similarity", "most", ("70%",), 0.0),
        ("concordance", "2, 1, 3", ("1, 2, 3",), 2 / 3),
        ("concordance", "2, 1", ("1, 2, 3",), 0.0),
    ],
)
def test_by_hand(metric, text, references, score):
    assert METRICS[metric](text, references, NONE) == pytest.approx(score)


def test_the_best_reference_counts():
    assert METRICS["qa_f1"]("a red fox", ("blue whale", "red fox", "red"), NONE) == 1.0
    assert exact_match("red fox", "red") == 0.0


@pytest.mark.parametrize("name", [name for name in METRICS if "zh" not in name and name != "by_turn"])
def test_all_are_between_zero_and_one(name):
    references = {"code_choice": ("Paragraph 7", "B"), "retrieval": ("Paragraph 7",)}.get(name, ("7",))
    info = CLASSES | {"unit": "Week", "units": 3, "heading": "#*# Week 1:"}
    for text in ("", "7", "Paragraph 7", "B", "what? 5.5 and 7", "#*# Week 2 #*# Week 9"):
        assert 0.0 <= METRICS[name](text, references, info) <= 1.0


def test_by_turn():
    assert METRICS["by_turn"]("7", ("7",), {"metric": "first_integer"}) == 1.0
