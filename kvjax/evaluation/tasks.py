"""What a compressed cache is asked: needles in a text, the text's continuation, or the rows of your own file.

A task is a value that makes samples of token ids: a context to compress, a question that is fed to the compressed
cache, and the answers that count. Text comes from the manual that ships with Python (`pydoc_data.topics`); nothing is
downloaded, and the same seed gives the same samples.
"""

import collections
import dataclasses
import functools
import hashlib
import json
import pathlib
import random
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

from kvjax.checkpoints import Tokenizer
from kvjax.model import Model

Ids = tuple[int, ...]
Metric = Literal["accuracy", "perplexity"]

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
class Sample:
    """One question about one context.

    Attributes:
      id: Unique within the task.
      context_ids: What is compressed.
      question_ids: What comes next; at least one token, so that its last one asks for the answer.
      answers: Token ids that count as right, any of them.
      info: What else a row should say, such as a needle's depth.
    """

    id: str
    context_ids: Ids
    question_ids: Ids
    answers: tuple[Ids, ...]
    info: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class Task(Protocol):
    """Makes samples. Implementations are frozen dataclasses that check their parameters when they are built."""

    @property
    def name(self) -> str: ...

    @property
    def metric(self) -> Metric:
        """What its table shows: answers that are exactly right, or the perplexity of the answer's tokens."""
        ...

    def resolved(self) -> dict[str, Any]:
        """Everything that the samples depend on but the tokenizer, for JSON."""
        ...

    def samples(self, model: Model) -> list[Sample]:
        """The samples for a model.

        Raises:
          ValueError: The model cannot serve the task; the message says why.
        """
        ...


@functools.cache
def library_text() -> str:
    """The language reference that comes with Python, about half a million characters; versions differ."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def _digest(text: str | bytes) -> str:
    return hashlib.sha256(text.encode() if isinstance(text, str) else text).hexdigest()[:12]


def _library_ids(model: Model, task: str) -> tuple[Tokenizer, list[int]]:
    if model.tokenizer is None:
        raise ValueError(
            f"The task {task!r} is made of text, and this checkpoint has no tokenizer. Give a file of token ids: "
            '{"context_ids": [...], "question_ids": [...], "answer_ids": [...]} on every line.'
        )
    return model.tokenizer, model.tokenizer.encode(library_text(), add_bos=False)


def _bos(tokenizer: Tokenizer) -> Ids:
    return (tokenizer.bos_id,) if tokenizer.bos_id >= 0 else ()


def _check_number(name: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}.")


def split_answers(tokenizer: Tokenizer, question: str, answers: Sequence[str]) -> tuple[Ids, tuple[Ids, ...]]:
    """Token ids of a question and of its answers, cut where the answers begin.

    Question and answer are read as one text, as a model would write them; a token that holds the end of the question
    and the beginning of an answer belongs to the answer.
    """
    alone = tokenizer.encode(question, add_bos=False)
    together = [tokenizer.encode(question + answer, add_bos=False) for answer in answers]
    shared = [
        next((i for i, (a, b) in enumerate(zip(alone, ids, strict=False)) if a != b), len(alone)) for ids in together
    ]
    cut = min(*shared, *(len(ids) - 1 for ids in together))
    return tuple(alone[:cut]), tuple(tuple(ids[cut:]) for ids in together)


# Needles


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
    metric: Metric = dataclasses.field(default="accuracy", init=False)

    def __post_init__(self):
        _check_number("samples", self.count, 1)
        _check_number("needles", self.needles, 1)
        _check_number("context", self.context, 1)
        if self.needles > len(CITIES):
            raise ValueError(f"There are {len(CITIES)} cities for needles, got needles={self.needles}.")

    def resolved(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "text": _digest(library_text())}

    def samples(self, model: Model) -> list[Sample]:
        tokenizer, library = _library_ids(model, self.name)
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
        bos = _bos(tokenizer)
        filling = self.context - len(bos) - sum(map(len, needles))
        if filling < self.needles:
            raise ValueError(
                f"A context of {self.context} tokens has no room for {self.needles} needles of {len(needles[0])}."
            )
        start = chance.randrange(len(library))
        filler = [library[(start + n) % len(library)] for n in range(filling)]
        context: list[int] = [*bos]
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


# Perplexity


@dataclasses.dataclass(frozen=True, kw_only=True)
class Perplexity:
    """How well the continuation of a text is predicted once the text before it is compressed.

    The first token of the continuation is fed, the others are predicted.

    Attributes:
      context: Tokens that are compressed, with the beginning-of-sequence token.
      count: Number of windows of the text.
      continuation: Tokens of the continuation, the first included.
      seed: Of the windows' places.
    """

    context: int = 2048
    count: int = 4
    continuation: int = 256
    seed: int = 0
    name: str = dataclasses.field(default="ppl", init=False)
    metric: Metric = dataclasses.field(default="perplexity", init=False)

    def __post_init__(self):
        _check_number("samples", self.count, 1)
        _check_number("context", self.context, 2)
        _check_number("continuation", self.continuation, 2)

    def resolved(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "text": _digest(library_text())}

    def samples(self, model: Model) -> list[Sample]:
        tokenizer, library = _library_ids(model, self.name)
        bos = _bos(tokenizer)
        inside = self.context - len(bos)
        last = len(library) - inside - self.continuation
        if last < 0:
            raise ValueError(
                f"Python's manual has {len(library)} tokens: fewer than context and continuation together."
            )
        starts = random.Random(f"ppl/{self.seed}").sample(range(last + 1), min(self.count, last + 1))
        samples = []
        for i, start in enumerate(starts):
            middle = start + inside
            after = tuple(library[middle : middle + self.continuation])
            samples.append(
                Sample(
                    id=str(i),
                    context_ids=(*bos, *library[start:middle]),
                    question_ids=after[:1],
                    answers=(after[1:],),
                    info={"start": start},
                )
            )
        return samples


# Your own file


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One line of a file: context, question and answers as text or as token ids.

    Attributes:
      line: Counted from 1, for error messages.
    """

    line: int
    id: str
    context: str | Ids
    question: str | Ids
    answers: tuple[str, ...] | tuple[Ids, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class JsonLines:
    """A file of `{"context", "question", "answers"}` or `{"context_ids", "question_ids", "answer_ids"}` on every line.

    Several answers may count. Of a text's question and answer, neither of which brings a space or line break of its
    own, a space is put in between. Token ids are used as they are: begin the context with BOS if the model wants one.

    Attributes:
      path: For messages and tables.
      rows: What it holds, see `read_json_lines`.
      digest: Of the file's content.
    """

    path: str
    rows: tuple[Row, ...]
    digest: str
    metric: Metric = dataclasses.field(default="accuracy", init=False)

    @property
    def name(self) -> str:
        return pathlib.Path(self.path).name

    def resolved(self) -> dict[str, Any]:
        return {"name": self.name, "count": len(self.rows), "sha256": self.digest}

    def samples(self, model: Model) -> list[Sample]:
        return [self._sample(model, row) for row in self.rows]

    def _sample(self, model: Model, row: Row) -> Sample:
        def problem(what: str) -> ValueError:
            return ValueError(f"{self.path}:{row.line}: {what}")

        if isinstance(row.context, str):
            tokenizer = model.tokenizer
            if tokenizer is None:
                raise problem("this checkpoint has no tokenizer: give context_ids, question_ids and answer_ids.")
            assert isinstance(row.question, str)
            gaps = ["" if row.question[-1:].isspace() or str(a)[:1].isspace() else " " for a in row.answers]
            question, answers = split_answers(
                tokenizer, row.question, [gap + str(a) for gap, a in zip(gaps, row.answers, strict=True)]
            )
            context = tuple(tokenizer.encode(row.context))
            if not question:
                raise problem("the question has no token of its own before the answer begins; write a longer one.")
        else:
            context, question, answers = row.context, tuple(row.question), row.answers
            largest = model.config.vocab_size - 1
            for ids in (context, question, *answers):
                wrong = next((token for token in ids if not 0 <= int(token) <= largest), None)
                if wrong is not None:
                    raise problem(f"token id {wrong} is out of range: this model's ids are 0 to {largest}.")
        return Sample(id=row.id, context_ids=context, question_ids=question, answers=answers, info={"line": row.line})  # type: ignore[arg-type]


TEXT_KEYS = ("context", "question", "answers")
ID_KEYS = ("context_ids", "question_ids", "answer_ids")


def read_json_lines(path: str, count: int | None = None) -> JsonLines:
    """Reads and checks a file; needs no model.

    Args:
      path: Of the file; empty lines are skipped.
      count: Only the first so many rows; default: all.

    Raises:
      ValueError: It cannot be read, or a line is not what it should be; the message names the line.
    """
    try:
        content = pathlib.Path(path).read_bytes()
        lines = content.decode("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"Cannot read {path}: {error}. A task is needle, ppl or a file of JSON lines.") from None
    if count is not None:
        _check_number("samples", count, 1)
    rows = tuple(_row(path, i, line) for i, line in enumerate(lines, 1) if line.strip())[:count]
    if not rows:
        raise ValueError(f"{path} has no rows.")
    seen: dict[str, int] = {}
    for row in rows:
        if row.id in seen:
            raise ValueError(f"{path}:{row.line}: id {row.id!r} is the id of line {seen[row.id]} too.")
        seen[row.id] = row.line
    return JsonLines(path=str(path), rows=rows, digest=_digest(content))


def _row(path: str, number: int, line: str) -> Row:
    def problem(what: str) -> ValueError:
        return ValueError(f"{path}:{number}: {what}")

    try:
        data = json.loads(line)
    except ValueError as error:
        raise problem(f"not valid JSON: {error}") from None
    if not isinstance(data, dict):
        raise problem(f"a row is an object with {', '.join(TEXT_KEYS)} or {', '.join(ID_KEYS)}.")
    keys = ID_KEYS if any(key in data for key in ID_KEYS) else TEXT_KEYS
    if missing := [key for key in keys if key not in data]:
        raise problem(f"{' and '.join(missing)} missing; a row has {', '.join(TEXT_KEYS)} or {', '.join(ID_KEYS)}.")
    context, question, answers = (data[key] for key in keys)
    if keys is TEXT_KEYS:
        answers, kind, fits = [answers] if isinstance(answers, str) else answers, "text", _is_text
    else:
        answers, kind, fits = [answers] if _is_ids(answers) else answers, "a list of token ids", _is_ids
    for key, value in zip(keys, (context, question), strict=False):
        if not fits(value):
            raise problem(f"{key} must be {kind}, and not empty.")
    if not isinstance(answers, list) or not answers or not all(map(fits, answers)):
        raise problem(f"{keys[2]} must be {kind} or a list of such, and not empty.")
    if keys is ID_KEYS:
        context, question, answers = tuple(context), tuple(question), [tuple(answer) for answer in answers]
    found: Any = tuple(answers)
    return Row(line=number, id=str(data.get("id", number)), context=context, question=question, answers=found)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(token) is int for token in value)


def make_task(
    name: str,
    *,
    context: int | None = None,
    count: int | None = None,
    needles: int | None = None,
    seed: int = 0,
) -> Task:
    """A task by its name on the command line: "needle", "ppl" or the path of a file of JSON lines.

    Args:
      name: Which.
      context: Tokens of the context; default: the task's.
      count: Number of contexts (rows of a file); default: the task's (all).
      needles: Per context.
      seed: Of what is drawn at random.

    Raises:
      ValueError: There is no such task or file, or a parameter does not fit the task.
    """
    given = {"context": context, "count": count, "needles": needles}
    given = {key: value for key, value in given.items() if value is not None}
    if needles is not None and name != "needle":
        raise ValueError(f"needles is a parameter of the task needle, not of {name}.")
    if name == "needle":
        return Needle(seed=seed, **given)
    if name == "ppl":
        return Perplexity(seed=seed, **given)
    if not pathlib.Path(name).is_file():
        raise ValueError(
            f"There is no task {name!r} and no file of that name. A task is needle, ppl or a file of JSON lines."
        )
    if context is not None:
        raise ValueError(f"The contexts of {name} are as long as they are; leave context out.")
    return read_json_lines(name, count)
