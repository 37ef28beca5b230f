"""A text's continuation: how well it is predicted once the text before it is compressed."""

import dataclasses
import random
from typing import Any

from kvjax.evaluation.tasks.base import Ids, Metric, Sample, bos, check_number, digest, library_ids, library_text
from kvjax.model import Model


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
    group: str = dataclasses.field(default="text", init=False)
    metric: Metric = dataclasses.field(default="perplexity", init=False)

    def __post_init__(self):
        check_number("samples", self.count, 1)
        check_number("context", self.context, 2)
        check_number("continuation", self.continuation, 2)

    @property
    def length(self) -> int | None:
        return self.context

    def resolved(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "text": digest(library_text())}

    def samples(self, model: Model) -> list[Sample]:
        return [
            Sample(id=str(i), context_ids=before, question_ids=after[:1], answers=(after[1:],), info={"start": start})
            for i, (start, before, after) in enumerate(windows(self, model, self.continuation))
        ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stream(Perplexity):
    """Perplexity along an endless text that streams past a bounded cache (StreamingLLM, arXiv 2309.17453, figure 5).

    What stands in the cache when the stream begins is the compressed context. Policies that act while tokens come stay
    as small as that; others grow with the stream, and so does the full cache. The stream may go on beyond the model's
    context. Rows tell perplexity piece by piece.

    Attributes:
      context: Tokens before the stream begins.
      count: Number of streams.
      continuation: Tokens of the stream.
      seed: Of the places where it begins in Python's manual.
    """

    context: int = 512
    count: int = 1
    continuation: int = 8192
    name: str = dataclasses.field(default="stream", init=False)

    def samples(self, model: Model) -> list[Sample]:
        return [dataclasses.replace(sample, endless=True) for sample in super().samples(model)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Drift:
    """How far a compressed cache leads a long text astray.

    The full cache writes a text, drawn at temperature 1 with a fixed key. Every policy is led along it: rows tell KL
    and agreement (is the likeliest token the same?) over the whole text and piece by piece, and where the first
    disagreement is.

    Attributes:
      context: Tokens that are compressed, with the beginning-of-sequence token.
      count: Number of contexts.
      tokens: Length of the text.
      seed: Of the contexts' places.
    """

    context: int = 1024
    count: int = 2
    tokens: int = 1024
    seed: int = 0
    name: str = dataclasses.field(default="drift", init=False)
    group: str = dataclasses.field(default="text", init=False)
    metric: Metric = dataclasses.field(default="drift", init=False)

    def __post_init__(self):
        check_number("samples", self.count, 1)
        check_number("context", self.context, 2)
        check_number("tokens", self.tokens, 2)

    @property
    def length(self) -> int | None:
        return self.context

    def resolved(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "text": digest(library_text())}

    def samples(self, model: Model) -> list[Sample]:
        return [
            Sample(
                id=str(i),
                context_ids=before,
                question_ids=after[:1],
                answers=(after[1:],),  # What the manual goes on with, for its likelihood.
                max_new_tokens=self.tokens,
                info={"start": start},
            )
            for i, (start, before, after) in enumerate(windows(self, model, REAL))
        ]


REAL = 32  # Tokens of the manual's own continuation.


def windows(task: Perplexity | Drift, model: Model, continuation: int) -> list[tuple[int, Ids, Ids]]:
    """Windows of Python's manual at random places: where they start, the context's tokens, the continuation's.

    Raises:
      ValueError: The manual is shorter than context and continuation together.
    """
    tokenizer, library = library_ids(model, task.name)
    first = bos(tokenizer)
    inside = task.context - len(first)
    last = len(library) - inside - continuation
    if last < 0:
        raise ValueError(f"Python's manual has {len(library)} tokens: fewer than context and continuation together.")
    starts = random.Random(f"ppl/{task.seed}").sample(range(last + 1), min(task.count, last + 1))
    return [
        (
            start,
            (*first, *library[start : start + inside]),
            tuple(library[start + inside : start + inside + continuation]),
        )
        for start in starts
    ]
