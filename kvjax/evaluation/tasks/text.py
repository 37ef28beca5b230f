"""A text's continuation: how well it is predicted once the text before it is compressed."""

import dataclasses
import random
from typing import Any

from kvjax.evaluation.tasks.base import Metric, Sample, bos, check_number, digest, library_ids, library_text
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
        tokenizer, library = library_ids(model, self.name)
        first = bos(tokenizer)
        inside = self.context - len(first)
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
                    context_ids=(*first, *library[start:middle]),
                    question_ids=after[:1],
                    answers=(after[1:],),
                    info={"start": start},
                )
            )
        return samples
