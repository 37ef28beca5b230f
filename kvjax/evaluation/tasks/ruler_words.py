"""RULER's common and frequent words (arXiv 2404.06654, common_words_extraction.py and freq_words_extraction.py)."""

import dataclasses
import math
import random
import string
from typing import Any

from kvjax.evaluation.tasks.base import Metric, Sample, check_number, tokenizer_of
from kvjax.evaluation.tasks.fit import Prompt, fitted
from kvjax.evaluation.tasks.vocabulary import compounds, singles
from kvjax.model import Model

COMMON = (
    "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that "
    "appear most often.\n"
)
COMMON_QUESTION = (
    "\nQuestion: What are the 10 most common words in the above list?"
    " Answer: The top 10 words that appear most often in the list are:"
)
FREQUENT = (
    "Read the following coded text and track the frequency of each coded word. Find the three most frequently "
    "appeared coded words. "
)
FREQUENT_QUESTION = (
    "\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the three most frequently "
    "appeared words in the above coded text?"
    " Answer: According to the coded text above, the three most frequently appeared words are:"
)
TOP = 10
SPARE = 10  # Other words, without which frequencies would say little.
LETTERS = 6


@dataclasses.dataclass(frozen=True, kw_only=True)
class CommonWords:
    """A numbered list in which ten words are more frequent than the others; a solved example comes first.

    Words come from a list of 330, or are compounds such as "amberfalcon" where more are needed (RULER takes them from
    the package wonderwords and from a list of English words). As in RULER, below 4096 tokens words come 6 times and
    once whatever is asked for, and the example is smaller. So it is too where a tokenizer needs more tokens than there
    are for this, and where they are too few again there is no example.

    Attributes:
      frequent: How often each of the ten comes.
      rare: How often each other word comes.
      context: Tokens of the whole: prompt and the answer's `tokens`, as RULER counts.
      count: Number of samples; RULER takes 500.
      seed: Of words and their order.
      tokens: Written at most.
    """

    frequent: int = 30
    rare: int = 3
    context: int = 4096
    count: int = 20
    seed: int = 0
    tokens: int = 120
    name: str = dataclasses.field(default="cwe", init=False)
    group: str = dataclasses.field(default="ruler", init=False)
    metric: Metric = dataclasses.field(default="string_match_all", init=False)

    def __post_init__(self):
        for name in ("frequent", "rare", "context", "tokens"):
            check_number(name, getattr(self, name), 1)
        check_number("samples", self.count, 1)
        if self.frequent <= self.rare:
            raise ValueError(f"frequent={self.frequent} must be more than rare={self.rare}.")

    @property
    def length(self) -> int | None:
        return self.context

    def resolved(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def samples(self, model: Model) -> list[Sample]:
        tokenizer = tokenizer_of(model, self.name)

        def fits(setting: "Setting") -> bool:
            prompt = self._prompt(0, TOP + SPARE, setting)
            return len(tokenizer.encode(prompt.context + prompt.question)) + self.tokens <= self.context

        usual = Setting((40, 10, 3), self.frequent, self.rare)
        settings = [*([usual] if self.context >= 4096 else []), Setting((20, 3, 1), 6, 1)]
        last = Setting(None, 6, 1)
        setting = next(filter(fits, settings), last)
        return [
            fitted(tokenizer, lambda n, i=i: self._prompt(i, n, setting), str(i), self.context, TOP + 1, self.tokens)
            for i in range(self.count)
        ]

    def _prompt(self, i: int, number: int, setting: "Setting") -> Prompt:
        chance = random.Random(f"{self.name}/{self.seed}/{i}")
        solved = ""
        if setting.example:
            words, common = _list(chance, *setting.example)
            solved = f"{COMMON}{words}{COMMON_QUESTION} {_numbered(common)}\n"
        words, common = _list(chance, number, setting.frequent, setting.rare)
        return Prompt(
            context=f"{solved}{COMMON}{words}",
            question=COMMON_QUESTION,
            answers=(_numbered(common),),
            references=tuple(common),
            info={"frequent": setting.frequent, "rare": setting.rare},
        )


@dataclasses.dataclass(frozen=True)
class Setting:
    """How often words come: in the solved example (different words, frequent, rare), and in the question."""

    example: tuple[int, int, int] | None
    frequent: int
    rare: int


def _list(chance: random.Random, number: int, frequent: int, rare: int) -> tuple[str, list[str]]:
    """The numbered list of so many different words, and the ten frequent ones."""
    known = singles()
    words = chance.sample(known, number) if number <= len(known) else compounds(chance, number, "")
    written = words[:TOP] * frequent + words[TOP:] * rare
    chance.shuffle(written)
    return _numbered(written), words[:TOP]


def _numbered(words: list[str]) -> str:
    return " ".join(f"{i}. {word}" for i, word in enumerate(words, 1))


@dataclasses.dataclass(frozen=True, kw_only=True)
class FrequentWords:
    """A text of coded words whose frequencies follow a zeta distribution; the most frequent one, "...", is noise.

    Attributes:
      alpha: Exponent: the word of rank k comes in proportion to k ** -alpha.
      context: Tokens of the whole: prompt and the answer's `tokens`, as RULER counts.
      count: Number of samples; RULER takes 500.
      seed: Of words and their order.
      tokens: Written at most.
    """

    alpha: float = 2.0
    context: int = 4096
    count: int = 20
    seed: int = 0
    tokens: int = 50
    name: str = dataclasses.field(default="fwe", init=False)
    group: str = dataclasses.field(default="ruler", init=False)
    metric: Metric = dataclasses.field(default="string_match_all", init=False)

    def __post_init__(self):
        for name in ("context", "tokens"):
            check_number(name, getattr(self, name), 1)
        check_number("samples", self.count, 1)
        if self.alpha <= 1:
            raise ValueError(f"alpha must be above 1, got {self.alpha}.")

    @property
    def length(self) -> int | None:
        return self.context

    def resolved(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def samples(self, model: Model) -> list[Sample]:
        tokenizer = tokenizer_of(model, self.name)
        least = next(n for n in range(1, 10**9) if _distinct(self._counts(n)))
        return [
            fitted(tokenizer, lambda n, i=i: self._prompt(i, n), str(i), self.context, least, self.tokens)
            for i in range(self.count)
        ]

    def _counts(self, number: int) -> list[int]:
        """How often the word of each rank comes in a text of about so many words."""
        words = max((self.context - self.tokens) // 50, 5)
        scale = number / zeta(self.alpha)
        return [int(scale * rank**-self.alpha) for rank in range(1, words + 1)]

    def _prompt(self, i: int, number: int) -> Prompt:
        chance = random.Random(f"{self.name}/{self.seed}/{i}")
        counts = self._counts(number)
        different = {"...": None}
        while len(different) < len(counts):
            different["".join(chance.choices(string.ascii_lowercase, k=LETTERS))] = None
        words = list(different)
        written = [word for word, often in zip(words, counts, strict=True) for _ in range(often)]
        chance.shuffle(written)
        return Prompt(
            context=FREQUENT + " ".join(written),
            question=FREQUENT_QUESTION,
            answers=(", ".join(words[1:4]),),
            references=tuple(words[1:4]),
        )


def _distinct(counts: list[int]) -> bool:
    """Whether the second, third and fourth word can be told from each other and from the fifth."""
    return all(more > fewer for more, fewer in zip(counts[:4], counts[1:5], strict=True))


def zeta(alpha: float, terms: int = 1000) -> float:
    """Riemann's zeta function for alpha > 1: a sum, and the integral of what is left with its first corrections."""
    head = math.fsum(k**-alpha for k in range(1, terms))
    return head + terms ** (1 - alpha) / (alpha - 1) + terms**-alpha / 2 + alpha * terms ** (-alpha - 1) / 12
