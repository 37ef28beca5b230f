"""ZeroSCROLLS' ten tasks (arXiv 2305.14196) from its files, whose rows hold the whole prompt.

Answers are published for the validation split alone (about twenty rows a task), so results are no leaderboard's. Too
long documents lose their end and get the benchmark's note on that, as in its own code. Its evaluator is not published;
ROUGE is that of SCROLLS, by the same authors (metrics/scrolls.py of https://huggingface.co/datasets/tau/scrolls). A row
has ROUGE-1, 2 and L, and their geometric mean as its score; the published number, which is made of their means over
samples, comes from `metrics.aggregate`. F1 is of SQuAD's normal words; that Unicode is written in ASCII before, as the
paper says, is left out. Choices, percentages and orders are read from what was written as `metrics` says. Data:
https://huggingface.co/datasets/tau/zero_scrolls.
"""

import pathlib

from kvjax.evaluation.tasks.base import Entry
from kvjax.evaluation.tasks.fit import Prompt
from kvjax.evaluation.tasks.published import Published, Record, listed

SPECS = {  # Tokens to write (experiments/api/api.py), metric, what is asked.
    "gov_report": (1024, "rouge_geometric", "summarizes a report"),
    "summ_screen_fd": (512, "rouge_geometric", "summarizes a script"),
    "qmsum": (512, "rouge_geometric", "answers a query about a meeting"),
    "squality": (512, "rouge_geometric", "answers a question about a story at length"),
    "qasper": (128, "qa_f1", "answers a question about a scientific article"),
    "narrative_qa": (64, "qa_f1", "answers a question about a story"),
    "quality": (10, "first_letter", "answers a choice about a story"),
    "musique": (32, "qa_f1", "answers a question that takes several passages"),
    "space_digest": (36, "percentage_similarity", "says how many reviews are positive"),
    "book_sum_sort": (256, "concordance", "puts summaries of chapters in order"),
}
KEYS = ("id", "input", "output", "document_end_index", "truncation_seperator")


class ZeroScrolls(Published):
    """Rows of the same id are one question with several answers, as in SCROLLS' evaluator."""

    def _rows(self, file: pathlib.Path) -> list[Record]:
        by_id: dict[str, list[Record]] = {}
        for row in super()._rows(file):
            by_id.setdefault(row["id"], []).append(row)
        return [{**same[0], "output": [row["output"] for row in same if row["output"]]} for same in by_id.values()]


def _prompt(row: Record) -> Prompt:
    end = int(row["document_end_index"])
    answers = listed(row["output"])
    return Prompt(
        context=row["input"][:end],
        question=row["input"][end:],
        answers=answers,
        references=answers,
        cut=row["truncation_seperator"],
    )


TASKS = {
    f"zeroscrolls_{name}": Entry(
        kind=ZeroScrolls,
        group="zeroscrolls",
        about=f"{about} (path of {name}.jsonl, validation)",
        fixed={
            "name": f"zeroscrolls_{name}",
            "group": "zeroscrolls",
            "metric": metric,
            "files": (f"{name}.jsonl", f"{name}/validation.jsonl"),
            "keys": KEYS,
            "make": _prompt,
        },
        defaults={"tokens": tokens},
    )
    for name, (tokens, metric, about) in SPECS.items()
}
