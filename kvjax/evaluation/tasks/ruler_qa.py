"""RULER's question answering (arXiv 2404.06654, scripts/data/synthetic/qa.py) over a local SQuAD or HotpotQA file."""

import dataclasses
import functools
import json
import pathlib
import random
from typing import Any, Literal

from kvjax.evaluation.tasks.base import Metric, Sample, check_number, digest, tokenizer_of
from kvjax.evaluation.tasks.fit import Prompt, fitted
from kvjax.evaluation.tasks.published import locate
from kvjax.model import Model

INTRODUCTION = (
    "Answer the question based on the given documents. Only give me the answer and do not output any other words.\n\n"
    "The following are given documents.\n\n"
)
QUESTION = (
    "\n\nAnswer the question based on the given documents. Only give me the answer and do not output any other words."
    "\n\nQuestion: {question} Answer:"
)
FILES = {  # RULER's name, and the published one.
    "squad": ("squad.json", "dev-v2.0.json"),
    "hotpotqa": ("hotpotqa.json", "hotpot_dev_distractor_v1.json"),
}


@dataclasses.dataclass(frozen=True)
class Item:
    """A question.

    Attributes:
      question: As published.
      answers: Any of them is right.
      needed: Documents that hold the answer, as indices.
      near: Documents of the same article, which fill the context first.
    """

    question: str
    answers: tuple[str, ...]
    needed: tuple[int, ...]
    near: tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Questions:
    """A question about documents, among which the ones that answer it are hidden.

    Attributes:
      name: Of the task.
      data: In which format the file is: SQuAD 2.0's or HotpotQA's (distractor setting).
      path: Of the file (squad.json or dev-v2.0.json; hotpotqa.json or hotpot_dev_distractor_v1.json), or of a folder
        that holds it.
      context: Tokens of the whole: prompt and the answer's `tokens`, as RULER counts.
      count: The file's first so many questions; RULER takes 500.
      seed: Of other documents and of their order.
      tokens: Written at most.
    """

    name: str
    data: Literal["squad", "hotpotqa"]
    path: str
    context: int = 4096
    count: int = 20
    seed: int = 0
    tokens: int = 32
    group: str = dataclasses.field(default="ruler", init=False)
    metric: Metric = dataclasses.field(default="string_match_part", init=False)

    def __post_init__(self):
        for name in ("context", "tokens"):
            check_number(name, getattr(self, name), 1)
        check_number("samples", self.count, 1)
        read(self.data, locate(self.path, FILES[self.data]))

    @property
    def length(self) -> int | None:
        return self.context

    def resolved(self) -> dict[str, Any]:
        path = locate(self.path, FILES[self.data])
        return dataclasses.asdict(self) | {"path": path.name, "sha256": digest(path.read_bytes())}

    def samples(self, model: Model) -> list[Sample]:
        tokenizer = tokenizer_of(model, self.name)
        items, documents = read(self.data, locate(self.path, FILES[self.data]))
        return [
            fitted(
                tokenizer,
                lambda n, i=i, item=item: self._prompt(i, item, documents, n),
                str(i),
                self.context,
                len(item.needed),
                self.tokens,
            )
            for i, item in enumerate(items[: self.count])
        ]

    def _prompt(self, i: int, item: Item, documents: tuple[str, ...], number: int) -> Prompt:
        chance = random.Random(f"{self.name}/{self.seed}/{i}")
        near, missing = list(item.near), number - len(item.needed)
        chance.shuffle(near)
        if missing > len(near):
            taken = {*item.needed, *near}
            others = [j for j in range(len(documents)) if j not in taken]
            chance.shuffle(others)
            # Over again where there are too few.
            near = (near + others + list(range(len(documents))) * (missing // len(documents) + 1))[:missing]
        shown = [*item.needed, *near[:missing]]
        chance.shuffle(shown)
        return Prompt(
            context=INTRODUCTION
            + "\n\n".join(f"Document {place}:\n{documents[j]}" for place, j in enumerate(shown, 1)),
            question=QUESTION.format(question=item.question),
            answers=item.answers,
            references=item.answers,
            info={"documents": [shown.index(j) + 1 for j in item.needed]},
        )


@functools.cache
def read(data: str, path: pathlib.Path) -> tuple[list[Item], tuple[str, ...]]:
    """Questions that have an answer, and all documents.

    Raises:
      ValueError: The file is not in the published format.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        items, documents = _squad(content) if data == "squad" else _hotpot(content)
    except (OSError, UnicodeDecodeError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not in the published format of {data}: {error!r}.") from None
    if not items:
        raise ValueError(f"{path} has no question that can be answered.")
    return items, documents


def _squad(content: Any) -> tuple[list[Item], tuple[str, ...]]:
    articles = [article["paragraphs"] for article in content["data"]]
    documents = sorted({paragraph["context"] for article in articles for paragraph in article})
    place = {document: i for i, document in enumerate(documents)}
    items = [
        Item(
            question["question"],
            tuple(dict.fromkeys(answer["text"] for answer in question["answers"])),
            (place[paragraph["context"]],),
            tuple(dict.fromkeys(place[p["context"]] for p in article if p["context"] != paragraph["context"])),
        )
        for article in articles
        for paragraph in article
        for question in paragraph["qas"]
        if not question.get("is_impossible", False)
    ]
    return items, tuple(documents)


def _hotpot(content: Any) -> tuple[list[Item], tuple[str, ...]]:
    def written(title: str, sentences: list[str]) -> str:
        return f"{title}\n{''.join(sentences)}"

    documents = sorted({written(*document) for row in content for document in row["context"]})
    place = {document: i for i, document in enumerate(documents)}
    items = [
        Item(row["question"], (row["answer"],), tuple(dict.fromkeys(place[written(*d)] for d in row["context"])), ())
        for row in content
    ]
    return items, tuple(documents)
