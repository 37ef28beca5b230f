"""Needles in a text: numbers that are hidden at known depths, one of which is asked for."""

import collections
import dataclasses
import random
from typing import Any

from kvjax.checkpoints import Tokenizer
from kvjax.evaluation.tasks.base import (
    Entry,
    Metric,
    Sample,
    bos,
    check_number,
    digest,
    library_ids,
    library_text,
    split_answers,
)
from kvjax.model import Model

CITIES = (
    "Paris London Tokyo Cairo Lima Oslo Rome Madrid Berlin Vienna Prague Athens Dublin Lisbon Warsaw Delhi Seoul "
    "Sydney Toronto Chicago Boston Denver Nairobi Lagos Havana Quito Hanoi Bangkok Manila Moscow Helsinki Geneva"
).split()
NEEDLE = "\nOne of the special magic numbers for {city} is: {number}.\n"
QUESTION = (
    "\nWhat is the special magic number for {city} mentioned in the provided text?\n"
    "The special magic number for {city} mentioned in the provided text is: "
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Needle:
    """Numbers of seven digits hidden in a text, one of which is asked for (as in RULER, arXiv 2404.06654).

    Depths are spread evenly over the context, and over the samples. All prompts are equally long.

    Attributes:
      context: Tokens of the context, needles and beginning-of-sequence token included.
      count: Number of contexts.
      needles: Numbers per context, each about another city; every one is asked for, in a sample of its own.
      seed: Of the text's place in the library, cities and numbers.
    """

    context: int = 2000
    count: int = 12
    needles: int = 1
    seed: int = 0
    name: str = dataclasses.field(default="needle", init=False)
    group: str = dataclasses.field(default="needle", init=False)
    metric: Metric = dataclasses.field(default="exact", init=False)

    def __post_init__(self):
        check_number("samples", self.count, 1)
        check_number("needles", self.needles, 1)
        check_number("context", self.context, 1)
        if self.needles > len(CITIES):
            raise ValueError(f"There are {len(CITIES)} cities for needles, got needles={self.needles}.")

    @property
    def length(self) -> int | None:
        return self.context

    def resolved(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "text": digest(library_text())}

    def samples(self, model: Model) -> list[Sample]:
        tokenizer, library = library_ids(model, self.name)
        cities = _equally_long(tokenizer, self.needles)
        return [sample for i in range(self.count) for sample in self._one_context(tokenizer, library, cities, i)]

    def _one_context(self, tokenizer: Tokenizer, library: list[int], cities: list[str], i: int) -> list[Sample]:
        chance = random.Random(f"needle/{self.seed}/{i}")
        chosen = chance.sample(cities, self.needles)
        numbers = [str(chance.randrange(10**6, 10**7)) for _ in chosen]
        depths = [(j + (i + 0.5) / self.count) / self.needles for j in range(self.needles)]
        needles = [
            tokenizer.encode(NEEDLE.format(city=city, number=number), add_bos=False)
            for city, number in zip(chosen, numbers, strict=True)
        ]
        first = bos(tokenizer)
        filling = self.context - len(first) - sum(map(len, needles))
        if filling < self.needles:
            raise ValueError(
                f"A context of {self.context} tokens has no room for {self.needles} needles of {len(needles[0])}."
            )
        start = chance.randrange(len(library))
        filler = [library[(start + n) % len(library)] for n in range(filling)]
        context: list[int] = [*first]
        for before, after, needle in zip([0.0, *depths], depths, needles, strict=False):
            context += filler[round(before * filling) : round(after * filling)] + needle
        context += filler[round(depths[-1] * filling) :]
        samples = []
        for city, number, depth in zip(chosen, numbers, depths, strict=True):
            question, answers = split_answers(tokenizer, QUESTION.format(city=city), [number])
            samples.append(
                Sample(
                    id=f"{i}-{city}",
                    context_ids=tuple(context),
                    question_ids=question,
                    answers=answers,
                    info={"depth": round(depth, 4), "answer": number},
                )
            )
        return samples


def _equally_long(tokenizer: Tokenizer, least: int) -> list[str]:
    """Cities with names of equally many tokens: prompts of one length compile once."""
    lengths = {city: len(tokenizer.encode(QUESTION.format(city=city), add_bos=False)) for city in CITIES}
    ((common, number),) = collections.Counter(lengths.values()).most_common(1)
    return [city for city in CITIES if lengths[city] == common] if number >= least else list(CITIES)


TASKS = {"needle": Entry(kind=Needle, group="needle", about="finds a number in a text")}
