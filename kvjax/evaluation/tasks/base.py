"""What a task is: a value that makes samples of token ids, and what tasks share to make them.

Text comes from the manual that ships with Python (`pydoc_data.topics`), or from a file of yours; nothing is downloaded.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from kvjax.checkpoints import Tokenizer
from kvjax.model import Model

Ids = tuple[int, ...]
Metric = str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
    """One question about one context.

    Attributes:
      id: Unique within the task.
      context_ids: What is compressed.
      question_ids: What comes next; at least one token, so that its last one asks for the answer.
      answers: Token ids that count as right, any of them; how likely they are is measured by teacher forcing.
      references: Texts that a written answer is scored against.
      max_new_tokens: How many tokens are written, greedily, where the metric scores text.
      stop: The written answer ends before the first of these texts.
      early: How many of the question's tokens are compressed with the context where the question is known in time
        (the aware protocol); None: all but the last. In a conversation `question_ids` is all turns so far with their
        right answers, and `early` covers the first turn's question alone.
      endless: Whether it may go on beyond the model's context.
      info: What else a row should say, such as a needle's depth; JSON values.
    """

    id: str
    context_ids: Ids
    question_ids: Ids
    answers: tuple[Ids, ...]
    references: tuple[str, ...] = ()
    max_new_tokens: int = 0
    stop: tuple[str, ...] = ()
    early: int | None = None
    endless: bool = False
    info: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class MissingFile(ValueError):
    """The file that a task is made from is not there."""


class Task(Protocol):
    """Makes samples. Implementations are frozen dataclasses that check their parameters when they are built."""

    @property
    def name(self) -> str: ...

    @property
    def group(self) -> str:
        """The family of tasks that it belongs to, such as "ruler"."""
        ...

    @property
    def length(self) -> int | None:
        """Tokens of the context as asked for; None where contexts are as long as they are."""
        ...

    @property
    def metric(self) -> Metric:
        """How answers are judged: "exact", "perplexity", "drift", "judge", or a name in `metrics.METRICS`.

        "exact": greedy decoding would write exactly one of the answers; they are fed, nothing is written. "perplexity":
        of the answer's tokens. "drift": see `Drift`. "judge": the answer is written and not scored; a judge of the
        benchmark's own reads it (`export_predictions`). Of any other the answer is written, and the text is scored.
        """
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


def digest(text: str | bytes) -> str:
    return hashlib.sha256(text.encode() if isinstance(text, str) else text).hexdigest()[:12]


def tokenizer_of(model: Model, task: str) -> Tokenizer:
    """The model's tokenizer.

    Raises:
      ValueError: It has none, so a task of text cannot be asked.
    """
    if model.tokenizer is None:
        raise ValueError(
            f"The task {task!r} is made of text, and this checkpoint has no tokenizer. Give a file of token ids: "
            '{"context_ids": [...], "question_ids": [...], "answer_ids": [...]} on every line.'
        )
    return model.tokenizer


def library_ids(model: Model, task: str) -> tuple[Tokenizer, list[int]]:
    tokenizer = tokenizer_of(model, task)
    return tokenizer, tokenizer.encode(library_text(), add_bos=False)


def bos(tokenizer: Tokenizer) -> Ids:
    return (tokenizer.bos_id,) if tokenizer.bos_id >= 0 else ()


def check_number(name: str, value: int, least: int) -> None:
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


def spaced(question: str, answer: str) -> str:
    """The answer as it follows the question: with a space, where neither brings a space or line break of its own."""
    return answer if question[-1:].isspace() or answer[:1].isspace() else " " + answer


def text_sample(
    tokenizer: Tokenizer, *, id: str, context: str, question: str, answers: Sequence[str], **more: Any
) -> Sample:
    """A sample of texts.

    Args:
      context: Compressed; BOS is put in front.
      answers: Any of them counts; see `spaced`.
      **more: Further fields of the sample.

    Raises:
      ValueError: The question has no token of its own before the answer begins.
    """
    ids, answer_ids = split_answers(tokenizer, question, [spaced(question, answer) for answer in answers])
    if not ids:
        raise ValueError(f"The question of sample {id} has no token of its own before the answer begins.")
    return Sample(id=id, context_ids=tuple(tokenizer.encode(context)), question_ids=ids, answers=answer_ids, **more)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """How a task is built from its name.

    Attributes:
      kind: A dataclass that implements `Task`.
      group: The name under which all tasks of the family are asked for.
      about: What it asks, in a line.
      fixed: Parameters of `kind` that make the task what its name says.
      defaults: Of other parameters, where they are not those of `kind`.
    """

    kind: Callable[..., Task]
    group: str
    about: str
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def parameters(self) -> dict[str, Any]:
        """What may be given, with defaults; a default of `dataclasses.MISSING` must be given."""
        fields = dataclasses.fields(self.kind)  # type: ignore[arg-type]
        own = {field.name: field.default for field in fields if field.init and field.name not in self.fixed}
        return {**own, **self.defaults}

    @property
    def metric(self) -> Metric:
        """See `Task.metric`."""
        fields = {field.name: field.default for field in dataclasses.fields(self.kind)}  # type: ignore[arg-type]
        return self.fixed.get("metric", fields["metric"])

    def build(self, **parameters: Any) -> Task:
        return self.kind(**{**self.fixed, **self.defaults, **parameters})


def depths_of(count: int, depths: Sequence[float] | None) -> list[float]:
    """Where in each context something lies: 0 is the beginning, 1 the end.

    Args:
      count: Contexts, or contexts per depth where depths are given.
      depths: For heat maps; default: evenly spread over the contexts.
    """
    if depths is None:
        return [(i + 0.5) / count for i in range(count)]
    return [depth for depth in depths for _ in range(count)]


def check_depths(depths: Sequence[float] | None) -> None:
    if depths is not None and (not depths or not all(0 <= depth <= 1 for depth in depths)):
        raise ValueError(f"Depths are numbers from 0 (the beginning) to 1 (the end), got {list(depths)}.")
