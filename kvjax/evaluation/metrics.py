"""How a written answer is scored: as the benchmark does that the task is from, with its quirks.

A metric is a function of what was written, the references and the sample's info; it returns 0 (wrong) to 1 (right).
"""

import collections
import difflib
import functools
import math
import re
import statistics
import string
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from kvjax.evaluation.rouge import rouge_l, rouge_l_sum, rouge_lcs, rouge_n

Metric = Callable[[str, tuple[str, ...], Mapping[str, Any]], float]
CHINESE_PUNCTUATION = (
    "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝"
    "～｟｠｢｣､、〃》「」『』【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏."
)
LETTERS = "ABCD"
ROUGES = {"rouge1": functools.partial(rouge_n, n=1), "rouge2": functools.partial(rouge_n, n=2), "rougeL": rouge_lcs}


def best(score: Callable[[str, str], float]) -> Metric:
    """The best of the references counts."""
    return lambda prediction, references, info: float(max(score(prediction, text) for text in references))


def first_line(metric: Metric) -> Metric:
    """Of what was written up to the first line break that follows anything else."""
    return lambda prediction, references, info: metric(prediction.lstrip("\n").split("\n")[0], references, info)


# Whether it is there


def string_match_all(prediction: str, references: tuple[str, ...], info: Mapping[str, Any]) -> float:
    """Share of the references that were written, in any case (RULER)."""
    text = _printable(prediction).lower()
    return sum(reference.lower() in text for reference in references) / len(references)


def string_match_part(prediction: str, references: tuple[str, ...], info: Mapping[str, Any]) -> float:
    """Whether any reference was written, in any case (RULER's questions)."""
    text = _printable(prediction).lower()
    return float(any(reference.lower() in text for reference in references))


def _printable(text: str) -> str:
    return re.sub(r"[\x00-\x1f]", "\n", text.strip()).strip()


def contains(prediction: str, references: tuple[str, ...], info: Mapping[str, Any]) -> float:
    """Whether any reference was written, to the letter (SCBench's key-value tasks)."""
    return float(any(reference in prediction for reference in references))


def word(prediction: str, references: tuple[str, ...], info: Mapping[str, Any]) -> float:
    """Whether any reference is one of the words that were written (InfiniteBench's key-value retrieval)."""
    return float(any(reference in _words(prediction) for reference in references))


def word_in_capitals(prediction: str, references: tuple[str, ...], info: Mapping[str, Any]) -> float:
    """Whether the first reference is one of the words that were written, in capitals (InfiniteBench's dialogues)."""
    return float(references[0] in _words(prediction.upper()))


def _words(text: str) -> list[str]:
    return re.sub(r"[\n:\"'.,?!{}]", " ", text).split()


def text_match(prediction: str, references: tuple[str, ...], info: Mapping[str, Any]) -> float:
    """Whether what was written is a reference, but for white space around it."""
    return float(prediction.strip() in {reference.strip() for reference in references})


def first_integer(prediction: str, references: tuple[str, ...], info: Mapping[str, Any]) -> float:
    """Whether the first digits that were written are the first reference (InfiniteBench's pass keys)."""
    found = re.search(r"[0-9]+", prediction)
    return float((found.group() if found else "") == references[0])


def first_number(prediction: str, references: tuple[str, ...], info: Mapping[str, Any]) -> float:
    """Whether the first number that was written is the first reference; of integers only what is before the point."""
    found = re.search(r"\d+\.\d+|\d+", prediction)
    if not found:
        return 0.0
    wanted = references[0]
    return float(float(found.group()) == float(wanted) if "." in wanted else int(float(found.group())) == int(wanted))


def last_integer(prediction: str, references: tuple[str, ...], info: Mapping[str, Any]) -> float:
    """Whether the last word that was written is the first reference, an integer (InfiniteBench's Code.Run)."""
    found = re.sub(r"[\n.`'\":]", " ", prediction).split()
    try:
        return float(int(found[-1]) == int(references[0]))
    except (IndexError, ValueError):
        return 0.0


def numbers_from_the_start(prediction: str, references: tuple[str, ...], info: Mapping[str, Any]) -> float:
    """Share of the references, numbers in order, that were written before the first mistake (Math.Calc)."""
    written = [int(digits) for digits in re.findall(r"[0-9]+", prediction)]
    right = 0
    for wanted, number in zip(references, written, strict=False):
        if int(wanted) != number:
            break
        right += 1
    return right / len(references)


# Choices


def choice(prediction: str, references: tuple[str, ...], info: Mapping[str, Any]) -> float:
    """Whether the letter that was chosen is among the references: the right option and its letter (InfiniteBench)."""
    text = prediction.strip()
    if not text:
        return 0.0
    if text[0] in LETTERS:
        return float(text[0] in references)
    if text in references:
        return 1.0
    text = re.sub(" +", " ", re.sub(r"[\n\"'.,?!{}]", " ", text))
    for before in ("answer is:", "answer:", "answer is", "option is"):
        at = text.find(before)
        if at >= 0:
            return float(any(text[at + len(before) + 1 :].startswith(reference) for reference in references))
    # As there, a word is a letter if it is a part of "ABCD".
    chosen = next((part for part in text.split() if part in LETTERS), None)
    return float(chosen is not None and chosen in references)


def code_choice(prediction: str, references: tuple[str, ...], info: Mapping[str, Any]) -> float:
    """Whether the right function, or its letter, was named (InfiniteBench's Code.Debug): references are these two."""
    name, letter = references
    text = prediction.strip()
    if text[:2] in (f"{letter}.", f"{letter}:"):
        return 1.0
    for mark in ("\n", "`", "'", '"', "-", "*", "Option", "option"):
        text = text.replace(mark, " ")
    text = re.sub(" +", " ", text)
    for before in ("answer is:", "is:", "answer:", "correct option is:"):
        at = text.find(before)
        if at >= 0:
            return float(text[at + len(before) + 1 :].startswith((letter, name)))
    return 0.0


def first_letter(prediction: str, references: tuple[str, ...], info: Mapping[str, Any]) -> float:
    """Whether the first letter A to D that stands alone is that of a reference, such as "(B) A cat"."""

    def chosen(text: str) -> str | None:
        found = re.search(r"\b[A-D]\b", text)
        return found.group() if found else None

    letter = chosen(prediction)
    return float(letter is not None and letter in map(chosen, references))


def classification(prediction: str, references: tuple[str, ...], info: Mapping[str, Any]) -> float:
    """Whether the right one of `info["all_classes"]` was named, divided by how many were (LongBench)."""

    def score(text: str, wanted: str) -> float:
        named = [name for name in info["all_classes"] if name in text]
        # Names that are part of the right one do not count against it; of two in a row the second stays, as there.
        i = 0
        while i < len(named):
            if named[i] in wanted and named[i] != wanted:
                del named[i]
            i += 1
        return 1 / len(named) if wanted in named else 0.0

    return best(score)(prediction, references, info)


# Shares of words and numbers


def f1(written: Sequence[str], wanted: Sequence[str]) -> float:
    """Of two bags of words."""
    common = (collections.Counter(written) & collections.Counter(wanted)).total()
    if not common:
        return 0.0
    precision, recall = common / len(written), common / len(wanted)
    return 2 * precision * recall / (precision + recall)


def normal_words(text: str) -> list[str]:
    """In lower case, without punctuation and articles (SQuAD)."""
    text = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def qa_f1(prediction: str, reference: str) -> float:
    """F1 of the bags of normal words."""
    return f1(normal_words(prediction), normal_words(reference))


def exact_match(prediction: str, reference: str) -> float:
    """Whether normal words are the same (SQuAD)."""
    return float(normal_words(prediction) == normal_words(reference))


def qa_f1_characters(prediction: str, reference: str) -> float:
    """F1 of the bags of characters but punctuation and white space (InfiniteBench's Chinese questions)."""
    return f1(*(_normal_chinese(text) for text in (prediction, reference)))


def _normal_chinese(text: str) -> str:
    return "".join(c for c in text.lower() if c not in string.punctuation + CHINESE_PUNCTUATION and not c.isspace())


def qa_f1_zh(prediction: str, reference: str) -> float:
    """F1 of the bags of Chinese words (LongBench); needs the package jieba."""
    written, wanted = ([_normal_chinese(part) for part in chinese_words(text)] for text in (prediction, reference))
    return f1([part for part in written if part], [part for part in wanted if part])


def rouge_zh(prediction: str, reference: str) -> float:
    """`rouge_l` of Chinese words (LongBench); needs the package jieba."""
    return rouge_l(" ".join(chinese_words(prediction)), " ".join(chinese_words(reference)))


class MissingPackage(ValueError):
    """A metric needs a package that is not installed."""


def chinese_words(text: str) -> list[str]:
    """Cut by jieba.

    Raises:
      MissingPackage: It is not installed.
    """
    try:
        import jieba  # type: ignore[import-not-found]
    except ImportError:
        raise MissingPackage("Chinese answers are cut into words by the package jieba: pip install jieba.") from None
    jieba.setLogLevel("WARNING")  # Or it tells about the dictionary that it loads.
    return list(jieba.cut(text, cut_all=False))


def share_of_numbers(prediction: str, wanted: str) -> float:
    """How many of the numbers that were written are the right one (LongBench's counts and retrieval)."""
    numbers = re.findall(r"\d+", prediction)
    return numbers.count(wanted) / len(numbers) if numbers else 0.0


def retrieval(prediction: str, reference: str) -> float:
    """The share of numbers that are the paragraph's of the reference: "Paragraph 7"."""
    return share_of_numbers(prediction, re.findall(r"Paragraph (\d+)", reference)[0])


def retrieval_zh(prediction: str, reference: str) -> float:
    """The same of "段落7"."""
    return share_of_numbers(prediction, re.findall(r"段落(\d+)", reference)[0])


def code_similarity(prediction: str, reference: str) -> float:
    """Likeness of the first line of code to the reference, in whole per cent (LongBench).

    Lines with a backquote, "#" or "//" are passed over. Likeness is difflib's, which fuzzywuzzy's `ratio` is unless
    python-Levenshtein is installed too.
    """
    lines = prediction.lstrip("\n").split("\n")
    line = next((line for line in lines if not any(mark in line for mark in ("`", "#", "//"))), "")
    if line == reference:
        return 1.0
    if not line or not reference:
        return 0.0
    return int(round(100 * difflib.SequenceMatcher(None, line, reference).ratio())) / 100


def rouge_parts(prediction: str, references: tuple[str, ...], info: Mapping[str, Any]) -> dict[str, float]:
    """F1 of ROUGE-1, 2 and L without stemming, each for the reference that is best for it (SCROLLS' scrolls.py)."""
    return {name: max(rouge(prediction, text) for text in references) for name, rouge in ROUGES.items()}


def rouge_geometric(prediction: str, references: tuple[str, ...], info: Mapping[str, Any]) -> float:
    """Geometric mean of a sample's `rouge_parts`. SCROLLS takes it of the data set's means only: see `aggregate`."""
    return _geometric(rouge_parts(prediction, references, info))


def _geometric(parts: Mapping[str, float]) -> float:
    return math.prod(parts.values()) ** (1 / len(parts))


def percentage_similarity(prediction: str, reference: str) -> float:
    """2 ** (-10 * distance) of the first percentage to the reference's (ZeroSCROLLS' SpaceDigest)."""
    found = [re.search(r"\d+(?:\.\d+)?", text) for text in (prediction, reference)]
    if not found[0] or not found[1]:
        return 0.0
    return 2.0 ** (-10 * abs(float(found[0].group()) - float(found[1].group())) / 100)


def concordance(prediction: str, reference: str) -> float:
    """Share of pairs of the reference's numbers that were written in its order (ZeroSCROLLS' BookSumSort).

    0 unless what was written is a permutation of them.
    """
    written, wanted = ([int(n) for n in re.findall(r"\d+", text)] for text in (prediction, reference))
    if sorted(written) != sorted(wanted) or len(set(wanted)) != len(wanted):
        return 0.0
    if len(wanted) < 2:
        return 1.0
    place = {number: i for i, number in enumerate(written)}
    pairs = [(a, b) for i, a in enumerate(wanted) for b in wanted[i + 1 :]]
    return sum(place[a] < place[b] for a, b in pairs) / len(pairs)


def by_turn(prediction: str, references: tuple[str, ...], info: Mapping[str, Any]) -> float:
    """By `info["metric"]`, where the turns of a conversation ask for different things (SCBench)."""
    return METRICS[info["metric"]](prediction, references, info)


# Many answers in one text


def numbered_numbers(prediction: str, references: tuple[str, ...], info: Mapping[str, Any]) -> float:
    """Share of the references whose last number is that of the answer in the same place (LongGenBench's GSM8K).

    As there, commas are taken out of what was written alone: of a reference "1,502" the number is 502.
    """
    return _by_place(prediction.replace(",", ""), references, lambda text: _last(r"\d*\.?\d+", text))


def numbered_letters(prediction: str, references: tuple[str, ...], info: Mapping[str, Any]) -> float:
    """Share of the references whose last A, B, C or D is that of the answer in the same place (LongGenBench's MMLU)."""
    return _by_place(prediction, references, lambda text: _last("[A-D]", text))


def _last(pattern: str, text: str) -> str | None:
    found = re.findall(pattern, text)
    return found[-1] if found else None


def _by_place(prediction: str, references: tuple[str, ...], last: Callable[[str], str | None]) -> float:
    # As there, an answer is what stands between a colon that ends a line and an empty line; its number is not read.
    text = "\n".join(prediction.split("Answer_"))
    answers = re.findall(r"(?<=:\n)(.*?)(?=\n\n|$)", text, re.DOTALL)
    pairs = zip(answers, references, strict=False)
    return sum(last(answer) is not None and last(answer) == last(reference) for answer, reference in pairs) / len(
        references
    )


def completion_rate(prediction: str, references: tuple[str, ...], info: Mapping[str, Any]) -> float:
    """Share of the units 1 to `info["units"]`, each called `info["unit"]`, that were written (arXiv 2409.02076).

    A text ends each at "#*#"; the first unit's heading, `info["heading"]`, was part of the prompt.
    """
    blocks = (info["heading"] + prediction).split("#*#")
    found = {int(match.group(1)) for block in blocks if (match := re.search(rf"{info['unit']} (\d+)", block))}
    return len(found & set(range(1, info["units"] + 1))) / info["units"]


def _all(*metrics: Metric) -> dict[str, Metric]:
    return {metric.__name__: metric for metric in metrics}


def _best_of(scores: Iterable[Callable[[str, str], float]]) -> dict[str, Metric]:
    return {score.__name__: best(score) for score in scores}


OF_CHINESE_WORDS = ("qa_f1_zh", "rouge_zh")
METRICS: dict[str, Metric] = {
    **_all(string_match_all, string_match_part, contains, word, word_in_capitals, text_match),
    **_all(first_integer, first_number, last_integer, numbers_from_the_start),
    **_all(choice, code_choice, first_letter, classification, by_turn, rouge_geometric),
    **_all(numbered_numbers, numbered_letters, completion_rate),
    **_best_of((qa_f1, exact_match, qa_f1_characters, qa_f1_zh, rouge_zh, rouge_l, rouge_l_sum)),
    **_best_of((retrieval, retrieval_zh, code_similarity, percentage_similarity, concordance)),
    "count": best(share_of_numbers),
    "classification_first_line": first_line(classification),
    "qa_f1_first_line": first_line(best(qa_f1)),
    "rouge_l_first_line": first_line(best(rouge_l)),
}


def scores(metric: str, prediction: str, references: tuple[str, ...], info: Mapping[str, Any]) -> dict[str, float]:
    """A row's `score`; of "rouge_geometric" also the three parts that `aggregate` takes the means of.

    "judge" stands for a judge that is not run here: there is no score.
    """
    if metric == "judge":
        return {}
    if metric == "rouge_geometric":
        parts = rouge_parts(prediction, references, info)
        return {"score": _geometric(parts)} | parts
    return {"score": METRICS[metric](prediction, references, info)}


# Over many samples


def aggregate(metric: str, rows: Sequence[Mapping[str, Any]]) -> float:
    """What a benchmark publishes of a data set, from 0 to 1.

    That is the mean of scores, but for ROUGE in SCROLLS and ZeroSCROLLS: the geometric mean of the means of ROUGE-1, 2
    and L, which is at least as large as the mean of the samples' geometric means.

    Args:
      metric: In `METRICS`.
      rows: Of one policy and one task.
    """

    def mean(key: str) -> float:
        return statistics.fmean(row[key] for row in rows)

    return _geometric({key: mean(key) for key in ROUGES}) if metric == "rouge_geometric" else mean("score")


def effective_length(rows: Sequence[Mapping[str, Any]], least: float = 0.856) -> int | None:
    """RULER's effective length: the largest at which the mean over tasks is good enough (arXiv 2404.06654).

    Args:
      rows: Of one policy and one protocol, of the same tasks at every length.
      least: What is good enough; default: what Llama-2-7B scores at 4K, as in the paper.

    Returns:
      Tokens; None if no length is good enough.

    Raises:
      ValueError: Lengths have different tasks.
    """
    by_length: dict[int, dict[str, list[float]]] = {}
    for row in rows:
        by_length.setdefault(row["length"], {}).setdefault(row["task"], []).append(row["score"])
    if len({frozenset(tasks) for tasks in by_length.values()}) > 1:
        lengths = ", ".join(map(str, sorted(by_length)))
        raise ValueError(f"The lengths {lengths} have different tasks: give rows of the same tasks.")
    means = {length: statistics.fmean(map(statistics.fmean, tasks.values())) for length, tasks in by_length.items()}
    return max((length for length, mean in means.items() if mean >= least), default=None)


def by_words(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """LongBench-E's three scores of a task: the mean of rows whose text has under 4,000 words, under 8,000, and more.

    Args:
      rows: Of one policy and one task. A row's `words` are the benchmark's own count.

    Returns:
      "0-4k", "4-8k" and "8k+", as far as there are rows.
    """

    def band(words: int) -> str:
        return "0-4k" if words < 4000 else "4-8k" if words < 8000 else "8k+"

    bands = {name: [row["score"] for row in rows if band(row["words"]) == name] for name in ("0-4k", "4-8k", "8k+")}
    return {name: statistics.fmean(found) for name, found in bands.items() if found}
