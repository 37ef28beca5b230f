"""Tasks, the runner that asks every policy the same, and the report. `kvjax compare` puts them together."""

from kvjax.evaluation.cases import (
    Settings as Settings,
    check as check,
    make_cases as make_cases,
    parse_policies as parse_policies,
    resolved_config as resolved_config,
    servable as servable,
)
from kvjax.evaluation.export import export_predictions as export_predictions
from kvjax.evaluation.metrics import (
    aggregate as aggregate,
    by_words as by_words,
    effective_length as effective_length,
)
from kvjax.evaluation.report import (
    answered as answered,
    bench_table as bench_table,
    plot as plot,
    summarize as summarize,
    table as table,
    title as title,
)
from kvjax.evaluation.results import config_hash as config_hash, make_folder as make_folder, read_rows as read_rows
from kvjax.evaluation.runner import run as run
from kvjax.evaluation.speed import bench as bench
from kvjax.evaluation.tasks import Sample as Sample, Task as Task, make_task as make_task
