"""LongMemEval (arXiv 2410.10813) from its files: questions about many earlier chats with a user.

LongMemEval lets a language model judge whether an answer is right. No judge is run here: a score says whether the
expected answer stands in what was written, letter for letter but for case ("string_match_part"), which is stricter.
What only a judge can tell is left out: questions whose right answer is that there is none (`_abs`), and those about
preferences, whose answer is a rubric. The prompt has sessions as JSON, sorted by date, and asks for no steps; too long
histories lose their end. Data: https://huggingface.co/datasets/xiaowu0162/longmemeval-cleaned.
"""

import json

from kvjax.evaluation.tasks.base import Entry
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
JUDGED = "single-session-preference"
ABOUT = {
    "oracle": "with the sessions that hold the answer alone",
    "s": "with some 115,000 tokens of sessions",
    "m": "with some 500 sessions",
}


def _judged(row: Record) -> bool:
    return row["question_type"] == JUDGED or str(row["question_id"]).endswith("_abs")


def _prompt(row: Record) -> Prompt | None:
    if _judged(row):
        return None
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
        info={"type": row["question_type"]},
        cut="",
    )


def _turn(turn: Record) -> dict[str, str]:
    """Without the label that says where the answer is."""
    return {key: value for key, value in turn.items() if key != "has_answer"}


TASKS = {
    f"longmemeval_{part}": Entry(
        kind=Published,
        group="longmemeval",
        about=f"answers a question about earlier chats, {about} (path of longmemeval_{part}.json)",
        fixed={
            "name": f"longmemeval_{part}",
            "group": "longmemeval",
            "metric": "string_match_part",
            "files": (f"longmemeval_{part}_cleaned.json", f"longmemeval_{part}.json"),
            "keys": KEYS,
            "make": _prompt,
        },
        defaults={"tokens": 500},
    )
    for part, about in ABOUT.items()
}
