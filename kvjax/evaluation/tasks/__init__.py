"""What a compressed cache is asked: needles in a text, the text's continuation, or the rows of your own file.

A task is a value that makes samples of token ids: a context to compress, a question that is fed to the compressed
cache, and the answers that count. The same seed gives the same samples.
"""

from kvjax.evaluation.tasks.base import (
    Entry as Entry,
    Ids as Ids,
    Metric as Metric,
    Sample as Sample,
    Task as Task,
    library_text as library_text,
    split_answers as split_answers,
)
from kvjax.evaluation.tasks.jsonl import JsonLines as JsonLines, Row as Row, read_json_lines as read_json_lines
from kvjax.evaluation.tasks.needle import CITIES as CITIES, NEEDLE as NEEDLE, QUESTION as QUESTION, Needle as Needle
from kvjax.evaluation.tasks.registry import (
    TASKS as TASKS,
    groups as groups,
    make_task as make_task,
    make_tasks as make_tasks,
)
from kvjax.evaluation.tasks.text import Drift as Drift, Perplexity as Perplexity, Stream as Stream
