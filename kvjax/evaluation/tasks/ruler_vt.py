"""RULER's variable tracking (arXiv 2404.06654, scripts/data/synthetic/variable_tracking.py)."""

import dataclasses
import random
import string
from typing import Any

from kvjax.checkpoints import Tokenizer
from kvjax.evaluation.tasks.base import Metric, Sample, check_number, tokenizer_of
from kvjax.evaluation.tasks.fit import Prompt, fitted, most
from kvjax.evaluation.tasks.haystack import NOISE
from kvjax.model import Model

INTRODUCTION = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
QUESTION = (
    "\nQuestion: Find all variables that are assigned the value {value} in the text above."
    " Answer: According to the chain(s) of variable assignment in the text above, {number} variables are assigned the "
    "value {value}, they are: "
)
EXAMPLE_TOKENS = 500  # Of the solved example that comes first, at most.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tracking:
    """Chains of assignments hidden in noise; all variables that hold the first chain's value are to be written.

    A solved example of up to 500 tokens comes first, with names of three letters where the question has five. In
    short contexts it is as short as it can be, so that the question has room (RULER's own is as long at any length).

    Attributes:
      chains: Of which one is asked for.
      hops: Assignments per chain after the first.
      context: Tokens of the whole: prompt and the answer's `tokens`, as RULER counts.
      count: Number of samples; RULER takes 500.
      seed: Of names, values and places.
      tokens: Written at most.
    """

    chains: int = 1
    hops: int = 4
    context: int = 4096
    count: int = 20
    seed: int = 0
    tokens: int = 30
    group: str = dataclasses.field(default="ruler", init=False)
    metric: Metric = dataclasses.field(default="string_match_all", init=False)

    def __post_init__(self):
        for name in ("chains", "hops", "context", "tokens"):
            check_number(name, getattr(self, name), 1)
        check_number("samples", self.count, 1)

    @property
    def name(self) -> str:
        """RULER's own, or one that says what is different: "vt_2_6" has 2 chains of 6 hops."""
        return "vt" if (self.chains, self.hops) == (1, 4) else f"vt_{self.chains}_{self.hops}"

    @property
    def length(self) -> int | None:
        return self.context

    def resolved(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"name": self.name}

    def samples(self, model: Model) -> list[Sample]:
        tokenizer = tokenizer_of(model, self.name)
        example = self._example_lines(tokenizer)
        return [
            fitted(
                tokenizer,
                lambda n, i=i: self._prompt(i, n, example),
                str(i),
                self.context,
                self.hops + 1,
                self.tokens,
            )
            for i in range(self.count)
        ]

    def _example_lines(self, tokenizer: Tokenizer) -> int:
        """Lines of noise in the solved example."""
        room = min(EXAMPLE_TOKENS, self.context // 3)

        def cost(lines: int) -> int:
            return len(tokenizer.encode(self._example(random.Random(self.seed), lines)))

        return most(cost, room, self.hops + 1) or self.hops + 1

    def _example(self, chance: random.Random, lines: int) -> str:
        context, question, names, _ = problem(chance, lines, self.chains, self.hops, letters=3)
        return f"{context}{question} {' '.join(names)}\n\n"

    def _prompt(self, i: int, lines: int, example: int) -> Prompt:
        chance = random.Random(f"{self.name}/{self.seed}/{i}")
        solved = self._example(chance, example)
        context, question, names, depths = problem(chance, lines, self.chains, self.hops)
        return Prompt(
            context=solved + context,
            question=question,
            answers=(" ".join(names),),
            references=tuple(names),
            info={"depths": depths},
        )


def problem(
    chance: random.Random, lines: int, chains: int, hops: int, letters: int = 5
) -> tuple[str, str, list[str], list[float]]:
    """Text, question, the names that answer it, and how far into the text each assignment stands (0 to 1)."""
    text, chained, values = assignments(chance, lines, chains, hops, letters)
    depths = [round(text.index(f"VAR {name} =") / len(text), 4) for name in chained[0]]
    return INTRODUCTION + text, QUESTION.format(value=values[0], number=hops + 1), chained[0], depths


def assignments(
    chance: random.Random, lines: int, chains: int, hops: int, letters: int = 5
) -> tuple[str, list[list[str]], list[str]]:
    """Lines of noise with assignments between them, the names of each chain in order, and each chain's value."""
    names = _names(chance, chains * (hops + 1), letters)
    chained = [names[i : i + hops + 1] for i in range(0, len(names), hops + 1)]
    values = [str(value) for value in chance.sample(range(10_000, 99_999), chains)]
    sentences = [NOISE] * lines
    for chain, value in zip(chained, values, strict=True):
        hidden = [f"VAR {chain[0]} = {value}"]
        hidden += [f"VAR {new} = VAR {old} " for old, new in zip(chain, chain[1:], strict=False)]
        places = sorted(chance.sample(range(len(sentences)), len(hidden)))
        for j, (place, assignment) in enumerate(zip(places, hidden, strict=True)):
            sentences.insert(place + j, assignment)
    return "\n".join(sentences), chained, values


def _names(chance: random.Random, number: int, letters: int) -> list[str]:
    names: dict[str, None] = {}
    while len(names) < number:
        names["".join(chance.choices(string.ascii_uppercase, k=letters))] = None
    return list(names)
