"""Things to be found in noise, in a list or in a text, and written down: a pass key, a value, a passage."""

import dataclasses
import random
from typing import Any, Literal

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
    library_text,
    tokenizer_of,
)
from kvjax.evaluation.tasks.fit import Prompt, fitted
from kvjax.evaluation.tasks.haystack import NOISE
from kvjax.evaluation.tasks.vocabulary import identifier, number
from kvjax.model import Model

PASSKEY = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. I will quiz you about "
    "the important information.\n\n"
)
PASSKEY_LINE = "The pass key is {key}. Remember it. {key} is the pass key."
PASSKEY_QUESTION = "\n\nWhat is the pass key?\n\nThe pass key is"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Passkey:
    """A number of five digits in noise (arXiv 2305.16300), in the words of InfiniteBench (arXiv 2402.13718).

    Attributes:
      context: Tokens of the whole: prompt and the answer's `tokens`.
      count: Number of samples; where `depths` are given, per depth.
      seed: Of the numbers.
      depths: Where the number lies, from 0 (the beginning) to 1; default: evenly spread over the samples.
      tokens: Written at most.
    """

    context: int = 2000
    count: int = 12
    seed: int = 0
    depths: tuple[float, ...] | None = None
    tokens: int = 6
    name: str = dataclasses.field(default="passkey", init=False)
    group: str = dataclasses.field(default="retrieval", init=False)
    metric: Metric = dataclasses.field(default="first_integer", init=False)

    def __post_init__(self):
        check_number("context", self.context, 1)
        check_number("samples", self.count, 1)
        check_number("tokens", self.tokens, 1)
        check_depths(self.depths)

    @property
    def length(self) -> int | None:
        return self.context

    def resolved(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def samples(self, model: Model) -> list[Sample]:
        tokenizer = tokenizer_of(model, self.name)
        return [
            fitted(tokenizer, lambda n, i=i, d=depth: self._prompt(i, n, d), str(i), self.context, 1, self.tokens)
            for i, depth in enumerate(depths_of(self.count, self.depths))
        ]

    def _prompt(self, i: int, lines: int, depth: float) -> Prompt:
        key = number(random.Random(f"{self.name}/{self.seed}/{i}"), 5)
        text = [NOISE] * lines
        text.insert(round(depth * lines), PASSKEY_LINE.format(key=key))
        return Prompt(
            context=PASSKEY + "\n".join(text),
            question=PASSKEY_QUESTION,
            answers=(key,),
            references=(key,),
            info={"depth": round(depth, 4)},
        )


KEY_VALUES = "Extract the value corresponding to the specified key in the JSON object below.\n\nJSON data:\n"
KEY_QUESTION = '\n\nKey: "{key}"\nCorresponding value:'


@dataclasses.dataclass(frozen=True, kw_only=True)
class KeyValues:
    """The value of a key in a JSON object of UUIDs (Lost in the Middle, arXiv 2307.03172).

    Attributes:
      context: Tokens of the whole: prompt and the answer's `tokens`.
      count: Number of samples; where `depths` are given, per depth.
      seed: Of keys and values.
      depths: Where in the object the key lies, from 0 (the first) to 1; default: evenly spread over the samples.
      tokens: Written at most.
    """

    context: int = 2000
    count: int = 12
    seed: int = 0
    depths: tuple[float, ...] | None = None
    tokens: int = 100
    name: str = dataclasses.field(default="kv", init=False)
    group: str = dataclasses.field(default="retrieval", init=False)
    metric: Metric = dataclasses.field(default="string_match_part", init=False)

    def __post_init__(self):
        check_number("context", self.context, 1)
        check_number("samples", self.count, 1)
        check_number("tokens", self.tokens, 1)
        check_depths(self.depths)

    @property
    def length(self) -> int | None:
        return self.context

    def resolved(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def samples(self, model: Model) -> list[Sample]:
        tokenizer = tokenizer_of(model, self.name)
        return [
            fitted(tokenizer, lambda n, i=i, d=depth: self._prompt(i, n, d), str(i), self.context, 2, self.tokens)
            for i, depth in enumerate(depths_of(self.count, self.depths))
        ]

    def _prompt(self, i: int, pairs: int, depth: float) -> Prompt:
        chance = random.Random(f"{self.name}/{self.seed}/{i}")
        records = [(identifier(chance), identifier(chance)) for _ in range(pairs)]
        asked = round(depth * (pairs - 1))
        key, value = records[asked]
        return Prompt(
            context=KEY_VALUES + json_object(records),
            question=KEY_QUESTION.format(key=key),
            answers=(f'"{value}"',),
            references=(value,),
            info={"depth": round(depth, 4), "pair": asked, "pairs": pairs},
        )


def json_object(records: list[tuple[str, str]]) -> str:
    """One pair on every line."""
    return "{" + ",\n ".join(f'"{key}": "{value}"' for key, value in records) + "}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Copy:
    """A passage of the context goes on as it did there: its beginning is repeated, and what followed is asked for.

    Attributes:
      name: Of the task.
      kind: Of what the context consists: "text", Python's manual; or "tokens", ids drawn at random, for which a model
        needs no tokenizer.
      context: Tokens of the context, beginning-of-sequence token included; all are exactly so long.
      count: Number of samples; where `depths` are given, per depth.
      lead: Tokens that are repeated; nowhere else in the context do the same follow one another.
      span: Tokens of the answer.
      seed: Of text, ids and places.
      depths: Where the passage begins, from 0 to 1; default: evenly spread over the samples.
    """

    name: str
    kind: Literal["text", "tokens"]
    context: int = 2000
    count: int = 12
    lead: int = 16
    span: int = 16
    seed: int = 0
    depths: tuple[float, ...] | None = None
    group: str = dataclasses.field(default="retrieval", init=False)
    metric: Metric = dataclasses.field(default="exact", init=False)

    def __post_init__(self):
        check_number("lead", self.lead, 1)
        check_number("span", self.span, 1)
        check_number("context", self.context, self.lead + self.span + 1)
        check_number("samples", self.count, 1)
        check_depths(self.depths)

    @property
    def length(self) -> int | None:
        return self.context

    def resolved(self) -> dict[str, Any]:
        text = {"text": digest(library_text())} if self.kind == "text" else {}
        return dataclasses.asdict(self) | text

    def samples(self, model: Model) -> list[Sample]:
        if self.kind == "text":
            tokenizer = tokenizer_of(model, self.name)
            first, library = bos(tokenizer), tokenizer.encode(library_text(), add_bos=False)
        else:
            first, library = bos(model.tokenizer) if model.tokenizer else (), None
        places = depths_of(self.count, self.depths)
        return [self._sample(model, first, library, i, depth) for i, depth in enumerate(places)]

    def _sample(self, model: Model, first: Ids, library: list[int] | None, i: int, depth: float) -> Sample:
        chance = random.Random(f"{self.name}/{self.seed}/{i}")
        inside = self.context - len(first)
        begin = round(depth * (inside - self.lead - self.span))
        for _ in range(100):
            text = self._text(model, chance, first, library, inside)
            lead, answer = text[begin : begin + self.lead], text[begin + self.lead :][: self.span]
            if sum(text[at : at + self.lead] == lead for at in range(inside)) == 1:
                return Sample(
                    id=str(i),
                    context_ids=(*first, *text),
                    question_ids=tuple(lead),
                    answers=(tuple(answer),),
                    info={"depth": round(depth, 4)},
                )
        raise ValueError(f"No passage of the text begins with {self.lead} tokens that come once: make lead longer.")

    def _text(
        self, model: Model, chance: random.Random, first: Ids, library: list[int] | None, length: int
    ) -> list[int]:
        if library is not None:
            start = chance.randrange(len(library))
            return [library[(start + n) % len(library)] for n in range(length)]
        special = {*first, *model.config.eos_ids}
        known = model.tokenizer.vocab_size if model.tokenizer else model.config.vocab_size
        ids = [token for token in range(min(known, model.config.vocab_size)) if token not in special]
        return chance.choices(ids, k=length)


TASKS = {
    "passkey": Entry(kind=Passkey, group="retrieval", about="finds a pass key in noise"),
    "kv": Entry(kind=KeyValues, group="retrieval", about="finds the value of a key in a JSON object of UUIDs"),
    "copy": Entry(
        kind=Copy,
        group="retrieval",
        about="repeats a passage of a text, given its beginning",
        fixed={"name": "copy", "kind": "text"},
    ),
    "copy_tokens": Entry(
        kind=Copy,
        group="retrieval",
        about="repeats a passage of random tokens, given its beginning",
        fixed={"name": "copy_tokens", "kind": "tokens"},
    ),
}
