"""The rows of your own file."""

import dataclasses
import json
import pathlib
from typing import Any

from kvjax.evaluation.tasks.base import Ids, Metric, Sample, check_number, digest, split_answers
from kvjax.model import Model


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
    metric: Metric = dataclasses.field(default="exact", init=False)
    group: str = dataclasses.field(default="file", init=False)
    length: int | None = dataclasses.field(default=None, init=False)

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
        check_number("samples", count, 1)
    rows = tuple(_row(path, i, line) for i, line in enumerate(lines, 1) if line.strip())[:count]
    if not rows:
        raise ValueError(f"{path} has no rows.")
    seen: dict[str, int] = {}
    for row in rows:
        if row.id in seen:
            raise ValueError(f"{path}:{row.line}: id {row.id!r} is the id of line {seen[row.id]} too.")
        seen[row.id] = row.line
    return JsonLines(path=str(path), rows=rows, digest=digest(content))


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
