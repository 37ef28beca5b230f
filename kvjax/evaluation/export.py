"""What was written, in the formats that the judges of benchmarks read: language models, which are not run here."""

import collections
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence

from kvjax.evaluation.results import Row
from kvjax.evaluation.tasks.longgenbench import CHECKS


def export_predictions(rows: Sequence[Row], path: str | pathlib.Path, benchmark: str) -> None:
    """Writes the answers of one policy as a benchmark's own judge reads them.

    Args:
      rows: Of one policy, task and protocol: those of `run`, or of a results.json.
      path: Of the file to write.
      benchmark: "longmemeval": JSON lines of `question_id` and `hypothesis`, for src/evaluation/evaluate_qa.py of
        https://github.com/xiaowu0162/LongMemEval. "longgenbench_plans": a JSON list with `output_blocks` and checks,
        for Evalution/eval.py of https://github.com/mozhu621/LongGenBench.

    Raises:
      ValueError: No such judge is known, rows are of another benchmark, or a sample was answered more than once.
    """
    if benchmark not in JUDGES:
        raise ValueError(f"Judges are known of {' and '.join(JUDGES)}, got {benchmark!r}.")
    needs, written = JUDGES[benchmark]
    if not rows or any(key not in row for row in rows for key in ("prediction", *needs)):
        raise ValueError(f"These are no rows of {benchmark}: each has prediction, {', '.join(needs)}.")
    sample, times = collections.Counter(row["sample"] for row in rows).most_common(1)[0]
    if times > 1:
        raise ValueError(f"Sample {sample} has {times} answers: give the rows of one policy, one task, one protocol.")
    pathlib.Path(path).write_text(written(rows), encoding="utf-8")


def _hypotheses(rows: Sequence[Row]) -> str:
    lines = [{"question_id": row["question_id"], "hypothesis": row["prediction"]} for row in rows]
    return "".join(json.dumps(line) + "\n" for line in lines)


def _plans(rows: Sequence[Row]) -> str:
    """The heading that ended the prompt is a part of the text, as in the benchmark's inference.py."""
    texts = [row["heading"] + row["prediction"] for row in rows]
    plans = [
        {key: row[key] for key in CHECKS}
        | {"type": row["unit"], "number": row["units"]}
        | {"output_blocks": text.split("#*#"), "word_count": len(text.split())}
        for row, text in zip(rows, texts, strict=True)
    ]
    return json.dumps(plans, indent=1)


JUDGES: Mapping[str, tuple[tuple[str, ...], Callable[[Sequence[Row]], str]]] = {
    "longmemeval": (("question_id",), _hypotheses),
    "longgenbench_plans": (("heading", "unit", "units", *CHECKS), _plans),
}
