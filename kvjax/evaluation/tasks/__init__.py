"""What a compressed cache is asked: needles in a text, the text's continuation, or the rows of your own file.

A task is a value that makes samples of token ids: a context to compress, a question that is fed to the compressed
cache, and the answers that count. The same seed gives the same samples.
"""

import pathlib

from kvjax.evaluation.tasks.base import (
    Ids as Ids,
    Metric as Metric,
    Sample as Sample,
    Task as Task,
    library_text as library_text,
    split_answers as split_answers,
)
from kvjax.evaluation.tasks.jsonl import JsonLines as JsonLines, Row as Row, read_json_lines as read_json_lines
from kvjax.evaluation.tasks.needle import CITIES as CITIES, NEEDLE as NEEDLE, QUESTION as QUESTION, Needle as Needle
from kvjax.evaluation.tasks.text import Perplexity as Perplexity


def make_task(
    name: str,
    *,
    context: int | None = None,
    count: int | None = None,
    needles: int | None = None,
    seed: int = 0,
) -> Task:
    """A task by its name on the command line: "needle", "ppl" or the path of a file of JSON lines.

    Args:
      name: Which.
      context: Tokens of the context; default: the task's.
      count: Number of contexts (rows of a file); default: the task's (all).
      needles: Per context.
      seed: Of what is drawn at random.

    Raises:
      ValueError: There is no such task or file, or a parameter does not fit the task.
    """
    given = {"context": context, "count": count, "needles": needles}
    given = {key: value for key, value in given.items() if value is not None}
    if needles is not None and name != "needle":
        raise ValueError(f"needles is a parameter of the task needle, not of {name}.")
    if name == "needle":
        return Needle(seed=seed, **given)
    if name == "ppl":
        return Perplexity(seed=seed, **given)
    if not pathlib.Path(name).is_file():
        raise ValueError(
            f"There is no task {name!r} and no file of that name. A task is needle, ppl or a file of JSON lines."
        )
    if context is not None:
        raise ValueError(f"The contexts of {name} are as long as they are; leave context out.")
    return read_json_lines(name, count)
