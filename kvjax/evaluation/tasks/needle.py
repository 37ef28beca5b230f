"""Needles in a text: numbers that are hidden at known depths, one of which is asked for."""

import collections
import dataclasses
import random
from typing import Any

from kvjax.checkpoints import Tokenizer
from kvjax.evaluation.tasks.base import (
    Entry,
    Ids,
    Metric,
    Sample,
    bos,
    check_depths,
    check_number,
    depths_of,
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
QUESTIONS = (
    "\nWhat are all the special magic numbers for {cities} mentioned in the provided text?\n"
    "The special magic numbers for {cities} mentioned in the provided text are:"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Needle:
    """Numbers of seven digits hidden in a text, one of which is asked for (as in RULER, arXiv 2404.06654).

    Depths are spread evenly over the context, and over the samples. All prompts are equally long.

    Attributes:
      name: Of the task.
      context: Tokens of the context, needles and beginning-of-sequence token included.
      count: Number of contexts; where `depths` are given, per depth.
      needles: Numbers per context, each about another city; every one is asked for, in a sample of its own.
      seed: Of the text's place in the library, cities and numbers.
      depths: For heat maps, from 0 (the beginning) to 1: one needle lies there and is asked for, the others are spread
        evenly.
    """

    name: str = "needle"
    context: int = 2000
    count: int = 12
    needles: int = 1
    seed: int = 0
    depths: tuple[float, ...] | None = None
    group: str = dataclasses.field(default="needle", init=False)
    metric: Metric = dataclasses.field(default="exact", init=False)

    def __post_init__(self):
        check_number("samples", self.count, 1)
        check_number("needles", self.needles, 1)
        check_number("context", self.context, 1)
        check_depths(self.depths)
        _check_cities(self.needles)

    @property
    def length(self) -> int | None:
        return self.context

    def resolved(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "text": digest(library_text())}

    def samples(self, model: Model) -> list[Sample]:
        tokenizer, library = library_ids(model, self.name)
        cities = _equally_long(tokenizer, self.needles)
        places = depths_of(self.count, self.depths)
        return [
            sample
            for i, place in enumerate(places)
            for sample in self._one_context(tokenizer, library, cities, i, place)
        ]

    def _one_context(
        self, tokenizer: Tokenizer, library: list[int], cities: list[str], i: int, place: float
    ) -> list[Sample]:
        chance = random.Random(f"needle/{self.seed}/{i}")
        chosen = chance.sample(cities, self.needles)
        numbers = [str(chance.randrange(10**6, 10**7)) for _ in chosen]
        if self.depths is None:
            asked, depths = self.needles, [(j + place) / self.needles for j in range(self.needles)]
        else:
            asked, depths = 1, [place, *((j + 0.5) / (self.needles - 1) for j in range(self.needles - 1))]
        hidden = list(zip(chosen, numbers, depths, strict=True))
        context = hide(tokenizer, library, chance, hidden, self.context)
        samples = []
        for city, number, depth in hidden[:asked]:
            question, answers = split_answers(tokenizer, QUESTION.format(city=city), [number])
            samples.append(
                Sample(
                    id=f"{i}-{city}",
                    context_ids=context,
                    question_ids=question,
                    answers=answers,
                    references=(number,),
                    info={"depth": round(depth, 4), "answer": number},
                )
            )
        return samples


@dataclasses.dataclass(frozen=True, kw_only=True)
class Needles:
    """Several numbers to be found at once: all numbers of a city, or those of several cities. They are written.

    Depths are spread evenly over the context, and over the samples.

    Attributes:
      name: Of the task.
      context: Tokens of the context, needles and beginning-of-sequence token included.
      count: Number of contexts.
      needles: Cities in a context.
      values: Numbers per city.
      queries: Cities that are asked for at once.
      seed: Of the text's place in the library, cities and numbers.
      tokens: Written at most.
    """

    name: str
    context: int = 2000
    count: int = 12
    needles: int = 4
    values: int = 1
    queries: int = 1
    seed: int = 0
    tokens: int = 64
    group: str = dataclasses.field(default="retrieval", init=False)
    metric: Metric = dataclasses.field(default="string_match_all", init=False)

    def __post_init__(self):
        for name in ("needles", "values", "queries", "context", "tokens"):
            check_number(name, getattr(self, name), 1)
        check_number("samples", self.count, 1)
        if self.queries > self.needles:
            raise ValueError(f"{self.queries} cities cannot be asked for where there are {self.needles}.")
        _check_cities(self.needles)

    @property
    def length(self) -> int | None:
        return self.context

    def resolved(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "text": digest(library_text())}

    def samples(self, model: Model) -> list[Sample]:
        tokenizer, library = library_ids(model, self.name)
        cities = _equally_long(tokenizer, self.needles)
        return [self._sample(tokenizer, library, cities, i) for i in range(self.count)]

    def _sample(self, tokenizer: Tokenizer, library: list[int], cities: list[str], i: int) -> Sample:
        chance = random.Random(f"{self.name}/{self.seed}/{i}")
        chosen = [city for city in chance.sample(cities, self.needles) for _ in range(self.values)]
        asked = list(dict.fromkeys(chosen))[: self.queries]
        chance.shuffle(chosen)
        numbers = [str(number) for number in chance.sample(range(10**6, 10**7), len(chosen))]
        depths = [(j + (i + 0.5) / self.count) / len(chosen) for j in range(len(chosen))]
        hidden = list(zip(chosen, numbers, depths, strict=True))
        found = [(number, depth) for city in asked for name, number, depth in hidden if name == city]
        names = asked[0] if len(asked) == 1 else f"{', '.join(asked[:-1])} and {asked[-1]}"
        question, answers = split_answers(
            tokenizer, QUESTIONS.format(cities=names), [" " + ", ".join(number for number, _ in found)]
        )
        return Sample(
            id=str(i),
            context_ids=hide(tokenizer, library, chance, hidden, self.context),
            question_ids=question,
            answers=answers,
            references=tuple(number for number, _ in found),
            max_new_tokens=self.tokens,
            info={"depths": [round(depth, 4) for _, depth in found]},
        )


def hide(
    tokenizer: Tokenizer, library: list[int], chance: random.Random, hidden: list[tuple[str, str, float]], context: int
) -> Ids:
    """A context of exactly so many tokens: text, and a needle for every (city, number, depth).

    Raises:
      ValueError: The needles take all of it.
    """
    in_order = sorted(hidden, key=lambda needle: needle[2])
    needles = [tokenizer.encode(NEEDLE.format(city=city, number=number), add_bos=False) for city, number, _ in in_order]
    depths = [depth for _, _, depth in in_order]
    first = bos(tokenizer)
    filling = context - len(first) - sum(map(len, needles))
    if filling < len(needles):
        raise ValueError(f"A context of {context} tokens has no room for {len(needles)} needles of {len(needles[0])}.")
    start = chance.randrange(len(library))
    filler = [library[(start + n) % len(library)] for n in range(filling)]
    ids: list[int] = [*first]
    for before, after, needle in zip([0.0, *depths], depths, needles, strict=False):
        ids += filler[round(before * filling) : round(after * filling)] + needle
    return tuple(ids + filler[round(depths[-1] * filling) :])


def _check_cities(needles: int) -> None:
    if needles > len(CITIES):
        raise ValueError(f"There are {len(CITIES)} cities for needles, got needles={needles}.")


def _equally_long(tokenizer: Tokenizer, least: int) -> list[str]:
    """Cities with names of equally many tokens: prompts of one length compile once."""
    lengths = {city: len(tokenizer.encode(QUESTION.format(city=city), add_bos=False)) for city in CITIES}
    ((common, number),) = collections.Counter(lengths.values()).most_common(1)
    return [city for city in CITIES if lengths[city] == common] if number >= least else list(CITIES)


TASKS = {
    "needle": Entry(
        kind=Needle, group="needle", about="finds a number in a text, at depths for heat maps", fixed={"name": "needle"}
    ),
    "needle_multikey": Entry(
        kind=Needle,
        group="retrieval",
        about="finds the number of one of several cities",
        fixed={"name": "needle_multikey"},
        defaults={"needles": 4},
    ),
    "needle_multivalue": Entry(
        kind=Needles,
        group="retrieval",
        about="finds all numbers of a city",
        fixed={"name": "needle_multivalue", "queries": 1},
        defaults={"needles": 1, "values": 4},
    ),
    "needle_multiquery": Entry(
        kind=Needles,
        group="retrieval",
        about="finds the numbers of several cities at once",
        fixed={"name": "needle_multiquery", "values": 1},
        defaults={"needles": 4, "queries": 4},
    ),
}
