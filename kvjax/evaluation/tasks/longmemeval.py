"""LongMemEval (arXiv 2410.10813) from its files: questions about many earlier chats with a user.

LongMemEval lets a language model judge whether an answer is right. No judge is run here. Tasks of the group
"longmemeval" score whether the expected answer stands in what was written, letter for letter but for case
("string_match_part"), which is stricter. They leave out what only a judge can tell: questions whose right answer is
that there is none (`_abs`), and those about preferences, whose answer is a rubric. Tasks of "longmemeval_judged" have
all questions and no score; `export_predictions` hands what was written to LongMemEval's own judge. The prompt has
sessions as JSON, sorted by date, and asks for no steps; too long histories lose their end. Data: https://huggingface.co/datasets/xiaowu0162/longmemeval-cleaned.
"""

import json
from collections.abc import Callable

from kvjax.evaluation.tasks.base import Entry, Metric
from kvjax.evaluation.tasks.fit import Prompt
from kvjax.evaluation.tasks.published import Published, Record

INTRODUCTION = (
    "I will give you several history chats between you and a user. Please answer the question based on the relevant "
    "chat history.\n\n\nHistory Chats:\n\n"
)
QUESTION = "\n\nCurrent Date: {date}\nQuestion: {question}\nAnswer:"
SESSION = "\n### Session {number}:\nSession Date: {date}\nSession Content:\n\n{content}\n"
KEYS = (
    "question_id",
    "question_type",
    "question",
    "answer",
    "question_date",
    "haystack_dates",
    "haystack_sessions",
)
PREFERENCE = "single-session-preference"
ABOUT = {
    "oracle": "with the sessions that hold the answer alone",
    "s": "with some 115,000 tokens of sessions",
    "m": "with some 500 sessions",
}


def _scored(row: Record) -> Prompt | None:
    if row["question_type"] == PREFERENCE or str(row["question_id"]).endswith("_abs"):
        return None
    return _prompt(row)


def _prompt(row: Record) -> Prompt:
    sessions = sorted(zip(row["haystack_dates"], row["haystack_sessions"], strict=True), key=lambda part: part[0])
    history = "".join(
        SESSION.format(number=i, date=date, content=json.dumps([_turn(turn) for turn in turns]))
        for i, (date, turns) in enumerate(sessions, 1)
    )
    answer = str(row["answer"])
    return Prompt(
        context=INTRODUCTION + history,
        question=QUESTION.format(date=row["question_date"], question=row["question"]),
        answers=(answer,),
        references=(answer,),
        info={"type": row["question_type"], "question_id": row["question_id"]},
        cut="",
    )


def _turn(turn: Record) -> dict[str, str]:
    """Without the label that says where the answer is."""
    return {key: value for key, value in turn.items() if key != "has_answer"}


def _entry(group: str, part: str, what: str, metric: Metric, make: Callable[[Record], Prompt | None]) -> Entry:
    name = f"{group}_{part}"
    return Entry(
        kind=Published,
        group=group,
        about=f"{what}, {ABOUT[part]} (path of longmemeval_{part}.json)",
        fixed={
            "name": name,
            "group": group,
            "metric": metric,
            "files": (f"longmemeval_{part}_cleaned.json", f"longmemeval_{part}.json"),
            "keys": KEYS,
            "make": make,
        },
        defaults={"tokens": 500},
    )


ENTRIES = (
    *(
        _entry("longmemeval", part, "answers a question about earlier chats", "string_match_part", _scored)
        for part in ABOUT
    ),
    *(_entry("longmemeval_judged", part, "answers all questions, for a judge", "judge", _prompt) for part in ABOUT),
)
TASKS = {entry.fixed["name"]: entry for entry in ENTRIES}
