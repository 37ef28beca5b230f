"""What things are hidden in: an essay's sentences, or one line again and again (as in RULER, arXiv 2404.06654)."""

import functools
import json
import pathlib
import random
import re
from collections.abc import Sequence

from kvjax.evaluation.tasks.base import library_text

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
DEPTHS = [round(100 * i / 39) for i in range(40)]  # Per cent; where RULER puts needles into an essay.
SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


def check_haystack(path: str | None) -> None:
    """Raises ValueError if the file of an essay cannot be read."""
    if path is not None:
        essay(path)


@functools.cache
def essay(path: str | None) -> str:
    """The text of a file, or Python's manual; every run of white space is one space.

    A file that ends with .json is in the format of RULER's PaulGrahamEssays.json: {"text": ...}.

    Raises:
      ValueError: The file cannot be read, or is empty.
    """
    if path is None:
        text = library_text()
    else:
        try:
            text = pathlib.Path(path).read_text(encoding="utf-8")
            text = str(json.loads(text)["text"]) if path.endswith(".json") else text
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"Cannot read the haystack {path}: {error!r}.") from None
    text = " ".join(text.split())
    if not text:
        raise ValueError(f"The haystack {path} is empty.")
    return text


@functools.cache
def _words(path: str | None) -> list[str]:
    return essay(path).split(" ")


def in_essay(chance: random.Random, path: str | None, number: int, needles: Sequence[str]) -> tuple[str, list[float]]:
    """The essay's first words, over again where it is too short, with needles between its sentences in the given order.

    RULER cuts sentences with NLTK; here they end with ".", "!" or "?" and white space.

    Args:
      number: Words of the essay.

    Returns:
      The text, and how far into it each needle begins (0 to 1).
    """
    words = _words(path)
    text = " ".join((words * -(-number // len(words)))[:number])
    sentences = SENTENCE_END.split(text)
    places = sorted(int(len(sentences) * depth / 100) for depth in chance.sample(DEPTHS, len(needles)))
    return _joined(sentences, places, needles, " ")


def in_lines(chance: random.Random, lines: Sequence[str], needles: Sequence[str]) -> tuple[str, list[float]]:
    """Lines with needles between them at random places, at most one between two lines.

    Returns:
      As `in_essay`.
    """
    return _joined(lines, sorted(chance.sample(range(len(lines)), len(needles))), needles, "\n")


def _joined(pieces: Sequence[str], places: Sequence[int], needles: Sequence[str], gap: str) -> tuple[str, list[float]]:
    """Needle i stands before piece places[i]; places ascend."""
    parts: list[str] = []
    begins: list[int] = []
    written, last = 0, 0

    def put(texts: Sequence[str]) -> int:
        parts.extend(texts)
        return sum(map(len, texts)) + len(gap) * len(texts)

    for place, needle in zip(places, needles, strict=True):
        written += put(pieces[last:place])
        begins.append(written)
        written += put([needle])
        last = place
    put(pieces[last:])
    text = gap.join(parts)
    return text, [round(begin / max(len(text), 1), 4) for begin in begins]
