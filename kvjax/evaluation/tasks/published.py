"""Benchmarks from files on this machine, in the format in which they are published."""

import dataclasses
import functools
import itertools
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kvjax.checkpoints import Tokenizer
from kvjax.evaluation.metrics import OF_CHINESE_WORDS, chinese_words
from kvjax.evaluation.tasks.base import (
    Ids,
    Metric,
    MissingFile,
    Sample,
    check_number,
    digest,
    text_sample,
    tokenizer_of,
)
from kvjax.evaluation.tasks.fit import Prompt
from kvjax.model import Model

Record = Mapping[str, Any]
PROMPTS = pathlib.Path(__file__).parent / "prompts"


@functools.cache
def prompts(benchmark: str) -> dict[str, dict[str, Any]]:
    """A benchmark's prompts, tokens to write and metrics by task: they define it, and keep its own words."""
    return json.loads((PROMPTS / f"{benchmark}.json").read_text(encoding="utf-8"))["tasks"]


def locate(path: str, names: Sequence[str]) -> pathlib.Path:
    """The file itself, or the first of these names in a folder.

    Raises:
      MissingFile: There is none.
    """
    place = pathlib.Path(path)
    if place.is_file():
        return place
    found = [place / name for name in names if (place / name).is_file()]
    if not found:
        raise MissingFile(f"There is no {' or '.join(names)} at {path}: give path=FILE, or the folder it is in.")
    return found[0]


@functools.cache
def records(path: pathlib.Path, keys: tuple[str, ...]) -> tuple[Record, ...]:
    """The rows of a file: JSON lines or a JSON list.

    Raises:
      ValueError: It cannot be read, or a row lacks one of the keys; the message says which.
    """
    try:
        text = path.read_text(encoding="utf-8")
        if text.lstrip().startswith("["):
            rows = json.loads(text)
        else:
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise ValueError(f"Cannot read {path}: {error}.") from None
    for i, row in enumerate(rows, 1):
        missing = [key for key in keys if key not in row] if isinstance(row, dict) else list(keys)
        if missing:
            raise ValueError(f"{path}: row {i} has no {' and no '.join(missing)}; a row has {', '.join(keys)}.")
    if not rows:
        raise ValueError(f"{path} has no rows.")
    return tuple(rows)


def cut_middle(context: Ids, question: Ids, room: int) -> tuple[Ids, Ids]:
    """The first and the last half of what is too long, as most benchmarks cut; the question is at the end."""
    excess = len(context) + len(question) - room
    if excess <= 0:
        return context, question
    half = room // 2
    whole = context + question
    keep = min(len(question), half)
    return whole[:half] + whole[len(whole) - half : len(whole) - keep], question[len(question) - keep :]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Published:
    """The rows of a benchmark's file, each with its context, question and answers.

    Attributes:
      name: Of the task.
      group: The benchmark.
      metric: In `METRICS`.
      files: Names of the file in a folder.
      keys: What every row must have.
      make: The prompt of a row; None where it cannot be scored and is left out.
      tokens: Written at most.
      path: Of the file, or of a folder that holds it.
      context: Longer prompts lose their middle, or the context its end (`Prompt.cut`): prompt and answer have so many
        tokens at most. Default: nothing is cut.
      count: Only the first so many rows; default: all.
      stop: The written answer ends before the first of these texts.
    """

    name: str
    group: str
    metric: Metric
    files: tuple[str, ...]
    keys: tuple[str, ...]
    make: Callable[[Record], Prompt | None]
    tokens: int
    path: str
    context: int | None = None
    count: int | None = None
    stop: tuple[str, ...] = ()

    def __post_init__(self):
        check_number("tokens", self.tokens, 1)
        for name, value in (("samples", self.count), ("context", self.context)):
            if value is not None:
                check_number(name, value, 1)
        if self.context is not None and self.context <= self.tokens + 1:
            raise ValueError(f"{self.name} writes {self.tokens} tokens: a context of {self.context} has no room.")
        if self.metric in OF_CHINESE_WORDS:
            chinese_words("")  # Says so if it cannot.
        self._prompts()  # A file that cannot be read is refused before any model is loaded.

    @property
    def length(self) -> int | None:
        return self.context

    def resolved(self) -> dict[str, Any]:
        file = locate(self.path, self.files)
        own = {key: getattr(self, key) for key in ("name", "group", "metric", "tokens", "context", "count")}
        return own | {"path": file.name, "sha256": digest(file.read_bytes())}

    def samples(self, model: Model) -> list[Sample]:
        tokenizer = tokenizer_of(model, self.name)
        samples = []
        for i, prompt in enumerate(self._prompts()):
            sample = text_sample(
                tokenizer,
                id=str(i),
                context=prompt.context,
                question=prompt.question,
                answers=prompt.answers,
                references=prompt.references,
                max_new_tokens=self.tokens,
                stop=self.stop,
                info=prompt.info,
            )
            samples.append(self._shortened(tokenizer, sample, prompt.cut))
        return samples

    def _rows(self, file: pathlib.Path) -> Sequence[Record]:
        """One for every question."""
        return records(file, self.keys)

    def _prompts(self) -> list[Prompt]:
        file = locate(self.path, self.files)
        made = (self._prompt(file, i, row) for i, row in enumerate(self._rows(file), 1))
        kept = list(itertools.islice((prompt for prompt in made if prompt is not None), self.count))
        if not kept:
            raise ValueError(f"{file} has no row that can be used.")
        return kept

    def _prompt(self, file: pathlib.Path, i: int, row: Record) -> Prompt | None:
        try:
            prompt = self.make(row)
        except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
            raise ValueError(f"{file}: row {i} is not as {self.group} publishes them: {error!r}.") from None
        if prompt is not None and not prompt.answers:
            raise ValueError(f"{file}: row {i} has no answer. Parts that are published without answers cannot be used.")
        return prompt

    def _shortened(self, tokenizer: Tokenizer, sample: Sample, cut: str | None) -> Sample:
        if self.context is None:
            return sample
        room = self.context - self.tokens
        if cut is None:
            context, question = cut_middle(sample.context_ids, sample.question_ids, room)
            return dataclasses.replace(sample, context_ids=context, question_ids=question)
        room -= len(sample.question_ids)
        if len(sample.context_ids) <= room:
            return sample
        note = tuple(tokenizer.encode(cut, add_bos=False)) if cut else ()
        if room <= len(note):
            raise ValueError(f"{self.context} tokens have no room for the question of sample {sample.id}.")
        return dataclasses.replace(sample, context_ids=sample.context_ids[: room - len(note)] + note)


def halves(template: str, row: Record) -> tuple[str, str]:
    """A prompt's text up to the end of the context, and what comes after it; other fields are filled in."""
    before, after = template.split("{context}")
    return before.format(**row) + str(row["context"]), after.format(**row)


def listed(value: Any) -> tuple[str, ...]:
    """One answer or several, as texts."""
    return tuple(str(part) for part in value) if isinstance(value, list) else (str(value),)
