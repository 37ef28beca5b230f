"""SCBench (arXiv 2412.10319): several questions about one context that is compressed once.

In multi-turn mode a question comes after the earlier ones and their right answers; only the first was there when the
context was compressed. In multi-request mode every question comes alone to the compressed context, which was compressed
without any of them. Four kinds are made here (`shared_context`); all come from SCBench's files too, with its prompts,
lengths and metrics, but for those that ask for functions of a repository, whose score takes a parser of each language.
Two things in a conversation differ: right answers that are lists stand there with commas between them, where SCBench
writes Python's brackets; and a space sets an answer off from its question where neither has one.
"""

import dataclasses
import pathlib
import random
import re
from collections.abc import Sequence
from typing import Any, Literal

from kvjax.checkpoints import Tokenizer
from kvjax.evaluation.tasks.base import (
    Entry,
    Ids,
    Metric,
    Sample,
    check_number,
    digest,
    spaced,
    text_sample,
    tokenizer_of,
)
from kvjax.evaluation.tasks.fit import most
from kvjax.evaluation.tasks.published import Record, listed, locate, prompts, records
from kvjax.evaluation.tasks.shared_context import GENERATORS, Conversation, Turn
from kvjax.model import Model

LETTERS = "ABCD"
OF_TURNS = {"scbench_summary": ("rouge_l_sum", 800), "scbench_passkey": ("first_integer", 15)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScBench:
    """One kind of conversation.

    Attributes:
      kind: What is asked: SCBench's name without "scbench_".
      metric: SCBench's.
      mode: How questions follow one another: "multi_turn" or "multi_request".
      turns: Questions about a context; of a file's rows the first so many (default there: all).
      context: Tokens of the whole: context, all turns and the last answer. A file's contexts lose their middle where
        they are longer. Default: 4096 for what is made here; of files nothing is cut.
      count: Number of contexts; default: 4 for what is made here, all for files.
      seed: Of what is made here.
      path: SCBench's file of JSON lines, or a folder that holds it; default: conversations are made here.
      tokens: Written at most; default: what SCBench says.
    """

    kind: str
    metric: Metric
    mode: Literal["multi_turn", "multi_request"] = "multi_turn"
    turns: int | None = None
    context: int | None = None
    count: int | None = None
    seed: int = 0
    path: str | None = None
    tokens: int | None = None
    group: str = dataclasses.field(default="scbench", init=False)

    def __post_init__(self):
        if self.mode not in ("multi_turn", "multi_request"):
            raise ValueError(f'The mode is "multi_turn" or "multi_request", got {self.mode!r}.')
        for name in ("turns", "context", "count", "tokens"):
            value = getattr(self, name)
            if value is not None:
                check_number("samples" if name == "count" else name, value, 1)
        if self.path is None and self.kind not in GENERATORS:
            raise ValueError(
                f"The task {self.name} needs path: {self.kind}.jsonl of SCBench, or its folder. Made here are "
                f"{', '.join(f'scbench_{kind}' for kind in GENERATORS)}."
            )
        if self.path is not None:
            self._read()

    @property
    def name(self) -> str:
        """Of the two modes, which a grid may hold side by side, multi-turn has SCBench's own."""
        return f"scbench_{self.kind}" + ("_requests" if self.mode == "multi_request" else "")

    @property
    def length(self) -> int | None:
        return self._context

    @property
    def _prompts(self) -> dict[str, Any]:
        return prompts("scbench")[self.kind]

    @property
    def _context(self) -> int | None:
        return 4096 if self.context is None and self.path is None else self.context

    def _written(self, turn: Turn) -> int:
        of_turn = next((tokens for metric, tokens in OF_TURNS.values() if metric == turn.metric), None)
        return self.tokens or of_turn or self._prompts["tokens"]

    def resolved(self) -> dict[str, Any]:
        own = dataclasses.asdict(self) | {"name": self.name, "context": self._context}
        if self.path is None:
            return own
        file = self._file()
        return own | {"path": file.name, "sha256": digest(file.read_bytes())}

    def samples(self, model: Model) -> list[Sample]:
        tokenizer = tokenizer_of(model, self.name)
        if self.path is None:
            made = [self._made(tokenizer, i) for i in range(self.count or 4)]
            return [sample for i, talk in enumerate(made) for sample in self._asked(tokenizer, talk, str(i))]
        read = self._read()
        return [sample for i, talk in enumerate(read) for sample in self._asked(tokenizer, talk, str(i))]

    # Conversations

    def _made(self, tokenizer: Tokenizer, i: int) -> Conversation:
        generator, turns = GENERATORS[self.kind], self.turns or 5

        def make(units: int) -> Conversation:
            return generator.make(random.Random(f"scbench/{self.kind}/{self.seed}/{i}"), units, turns)

        def cost(units: int) -> int:
            # A sample's ids, counted as they come: context and question are tokens of their own.
            return max(
                len(sample.context_ids) + len(sample.question_ids) + sample.max_new_tokens
                for sample in self._asked(tokenizer, make(units), "")
            )

        least = generator.least(turns)
        assert self._context is not None
        units = most(cost, self._context, least)
        if units is None:
            raise ValueError(f"{self._context} tokens have no room for {self.name}: it takes {cost(least)} at least.")
        return make(units)

    def _file(self) -> pathlib.Path:
        assert self.path is not None
        return locate(self.path, (f"scbench_{self.kind}.jsonl", f"{self.kind}.jsonl"))

    def _read(self) -> list[Conversation]:
        file = self._file()
        conversations = []
        for i, row in enumerate(records(file, ("multi_turns",))[: self.count], 1):
            try:
                turns = tuple(_turn(self.kind, turn) for turn in row["multi_turns"][: self.turns])
                conversations.append(Conversation(row["context"] if "context" in row else row["input"], turns))
            except (KeyError, TypeError, ValueError, IndexError) as error:
                raise ValueError(f"{file}: row {i} is not as SCBench publishes {self.kind}: {error!r}.") from None
        return conversations

    # Questions

    def _asked(self, tokenizer: Tokenizer, talk: Conversation, id: str) -> list[Sample]:
        questions = self._questions(talk)
        context = self._prompts["context"].replace("{context}", "\0")
        context = context.format(prefix=self._prefix(talk)).replace("\0", talk.context)
        samples = [
            text_sample(
                tokenizer,
                id=f"{id}-{place}",
                context="",
                question=question,
                answers=turn.answers,
                references=turn.references,
                max_new_tokens=self._written(turn),
                info={"turn": place, "mode": self.mode, **turn.info} | ({"metric": turn.metric} if turn.metric else {}),
            )
            for place, (question, turn) in enumerate(zip(questions, talk.turns, strict=True), 1)
        ]
        early = _shared([sample.question_ids for sample in samples]) - 1 if self.mode == "multi_turn" else 0
        ids = self._shortened(tuple(tokenizer.encode(context)), samples)
        return [dataclasses.replace(sample, context_ids=ids, early=max(early, 0)) for sample in samples]

    def _questions(self, talk: Conversation) -> list[str]:
        """What follows the context, up to where each turn's answer begins."""
        templates, turns = self._prompts, talk.turns
        if self.mode == "multi_request":
            return ["\n\n" + templates["request"].format(**turn.fields) for turn in turns]
        talked = [templates["first"].format(**turns[0].fields)]
        for before, turn in zip(turns, turns[1:], strict=False):
            said = spaced(talked[-1], before.answer)
            talked.append(talked[-1] + templates["next"].format(pre_ans=said, **turn.fields))
        return talked

    def _prefix(self, talk: Conversation) -> str:
        """What stands before the numbers of Math.Find: the first question, or a multi-request context's first input."""
        fields = talk.turns[0].fields
        return fields.get("prefix", "") if self.mode == "multi_turn" else fields.get("input", "")

    def _shortened(self, ids: Ids, samples: Sequence[Sample]) -> Ids:
        """A file's context without its middle, where it is too long for the longest conversation."""
        if self._context is None or self.path is None:
            return ids
        after = max(len(sample.question_ids) + sample.max_new_tokens for sample in samples)
        room = self._context - after
        if room < 2:
            raise ValueError(f"The turns of sample {samples[0].id} take {after} tokens of {self._context}.")
        return ids if len(ids) <= room else ids[: room // 2] + ids[-(room // 2) :]


def _shared(prompts_ids: Sequence[Sequence[int]]) -> int:
    """How many tokens all of them begin with."""
    shortest = min(map(len, prompts_ids))
    return next((i for i in range(shortest) if len({ids[i] for ids in prompts_ids}) > 1), shortest)


def _turn(kind: str, turn: Record) -> Turn:
    """A turn of SCBench's file."""
    given = listed(turn["answer"])
    fields = {"input": turn["input"], "question": turn["input"]}
    answers, references, metric = given, given, None
    if kind == "choice_eng":
        options = turn["options"]
        fields |= {f"OPTION_{letter}": option for letter, option in zip(LETTERS, options, strict=True)}
        letter = LETTERS[options.index(given[0])]
        answers, references = (letter, given[0]), (given[0], letter)
    elif kind == "mf":
        fields["prefix"] = f"What is {re.findall(r'The .+ is', turn['input'])[0].lower()[:-3]}?"
    elif kind == "vt":
        answers = (", ".join(given),)
    elif kind == "summary_with_needles":
        metric = OF_TURNS[turn["task"]][0]
    return Turn(fields=fields, answer=", ".join(given), answers=answers, references=references, info={}, metric=metric)


ABOUT = {
    "kv": "values of keys in a JSON object",
    "prefix_suffix": "strings by how they begin and end",
    "vt": "variables of chains of assignments",
    "many_shot": "classes after many examples",
    "mf": "largest, smallest ... numbers of a list",
    "choice_eng": "choices about a book",
    "qa_eng": "questions about a book",
    "qa_chn": "questions about a Chinese book",
    "summary": "summaries of several papers",
    "summary_with_needles": "summaries of papers, and pass keys between them",
}
TASKS = {
    f"scbench_{kind}": Entry(
        kind=ScBench,
        group="scbench",
        about=f"several questions about one context: {about}"
        + ("" if kind in GENERATORS else f" (path of scbench_{kind}.jsonl)"),
        fixed={"kind": kind, "metric": prompts("scbench")[kind]["metric"]},
    )
    for kind, about in ABOUT.items()
}
