"""RULER's needles in a haystack (arXiv 2404.06654, scripts/data/synthetic/niah.py)."""

import dataclasses
import random
from typing import Any, Literal

from kvjax.evaluation.tasks.base import Metric, Sample, check_number, digest, tokenizer_of
from kvjax.evaluation.tasks.fit import Prompt, fitted
from kvjax.evaluation.tasks.haystack import NOISE, check_haystack, essay, in_essay, in_lines
from kvjax.evaluation.tasks.vocabulary import compounds, identifier, number
from kvjax.model import Model

INTRODUCTION = (
    "Some special magic {kind} are hidden within the following text. Make sure to memorize it. I will quiz you about "
    "the {kind} afterwards.\n"
)
QUESTION = (
    "\nWhat are all the special magic {kind} for {query} mentioned in the provided text?"
    " The special magic {kind} for {query} mentioned in the provided text are"
)
NEEDLE = "One of the special magic {kind} for {key} is: {value}."


@dataclasses.dataclass(frozen=True, kw_only=True)
class Niah:
    """Values of keys, hidden in a haystack; all values of the keys in question are to be written.

    Paul Graham's essays, RULER's haystack, are not shipped: Python's manual stands in their place, or a text file of
    yours. Keys are compounds such as "amber-falcon" from a list of some 16,000 (RULER takes them from the package
    wonderwords), and no key comes twice. Needles are in random order at random depths.

    Attributes:
      name: Of the task.
      hay: Between which needles lie: "noise", "essay" or other needles.
      keys: What keys are: "words" or "uuids".
      kind: What values are: "numbers" (of seven digits) or "uuids".
      needles: Keys, of which all or some are asked for.
      values: Values per key.
      queries: Keys that are asked for at once.
      context: Tokens of the whole: prompt and the answer's `tokens`, as RULER counts.
      count: Number of samples; RULER takes 500.
      seed: Of keys, values and depths.
      haystack: Path of a text file, or of RULER's PaulGrahamEssays.json, in the place of Python's manual.
      tokens: Written at most.
    """

    name: str
    hay: Literal["noise", "essay", "needle"]
    keys: Literal["words", "uuids"] = "words"
    kind: Literal["numbers", "uuids"] = "numbers"
    needles: int = 1
    values: int = 1
    queries: int = 1
    context: int = 4096
    count: int = 20
    seed: int = 0
    haystack: str | None = None
    tokens: int = 128
    group: str = dataclasses.field(default="ruler", init=False)
    metric: Metric = dataclasses.field(default="string_match_all", init=False)

    def __post_init__(self):
        for name, least in (("context", 1), ("needles", 1), ("values", 1), ("queries", 1), ("tokens", 1)):
            check_number(name, getattr(self, name), least)
        check_number("samples", self.count, 1)
        if self.queries > self.needles:
            raise ValueError(f"{self.queries} keys cannot be asked for where there are {self.needles}.")
        if self.needles * self.values > 40:
            raise ValueError(f"There are 40 depths for needles, got {self.needles} keys of {self.values} values.")
        check_haystack(self.haystack)

    @property
    def length(self) -> int | None:
        return self.context

    def resolved(self) -> dict[str, Any]:
        text = {"haystack": digest(essay(self.haystack))} if self.hay == "essay" else {"haystack": None}
        return dataclasses.asdict(self) | text

    def samples(self, model: Model) -> list[Sample]:
        tokenizer = tokenizer_of(model, self.name)
        least = 1 if self.hay == "essay" else self.needles * self.values
        return [
            fitted(tokenizer, lambda n, i=i: self._prompt(i, n), str(i), self.context, least, self.tokens)
            for i in range(self.count)
        ]

    def _prompt(self, i: int, filling: int) -> Prompt:
        chance = random.Random(f"{self.name}/{self.seed}/{i}")
        distractors = filling if self.hay == "needle" else 0
        keys = self._keys(chance, self.needles + distractors)
        values = [[self._value(chance) for _ in range(self.values)] for _ in range(self.needles)]
        asked = chance.sample(range(self.needles), self.queries)
        hidden = [(key, value) for key, several in zip(keys, values, strict=False) for value in several]
        chance.shuffle(hidden)
        needles = [NEEDLE.format(kind=self.kind, key=key, value=value) for key, value in hidden]
        if self.hay == "essay":
            context, depths = in_essay(chance, self.haystack, filling, needles)
        elif self.hay == "noise":
            context, depths = in_lines(chance, [NOISE] * filling, needles)
        else:
            others = [NEEDLE.format(kind=self.kind, key=key, value=self._value(chance)) for key in keys[self.needles :]]
            context, depths = in_lines(chance, others, needles)
        where = dict(zip(hidden, depths, strict=True))
        references = [(keys[j], value) for j in asked for value in values[j]]
        introduction, question, kind = self._templates()
        query = _listed([keys[j] for j in asked])
        found = [where[pair] for pair in references]
        return Prompt(
            context=introduction.format(kind=kind) + context,
            question=question.format(kind=kind, query=query),
            answers=(", ".join(value for _, value in references),),
            references=tuple(value for _, value in references),
            info={"depth": found[0]} if len(found) == 1 else {"depths": found},
        )

    def _keys(self, chance: random.Random, how_many: int) -> list[str]:
        if self.keys == "words":
            return compounds(chance, how_many)
        return [identifier(chance) for _ in range(how_many)]

    def _value(self, chance: random.Random) -> str:
        return number(chance) if self.kind == "numbers" else identifier(chance)

    def _templates(self) -> tuple[str, str, str]:
        """In the singular where there is one answer; the needles stay in the plural."""
        if self.queries * self.values > 1:
            return INTRODUCTION, QUESTION, self.kind
        one = [text.replace("are all", "is").replace("are", "is") for text in (INTRODUCTION, QUESTION)]
        return one[0].replace("Some", "A"), one[1], self.kind[:-1]


def _listed(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])}, and {words[-1]}"
