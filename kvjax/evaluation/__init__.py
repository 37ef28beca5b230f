"""Tasks, the runner that asks every policy the same, and the report. `kvjax compare` puts them together."""

from kvjax.evaluation.report import bench_table as bench_table
from kvjax.evaluation.report import plot as plot
from kvjax.evaluation.report import summarize as summarize
from kvjax.evaluation.report import table as table
from kvjax.evaluation.report import title as title
from kvjax.evaluation.results import config_hash as config_hash
from kvjax.evaluation.results import make_folder as make_folder
from kvjax.evaluation.results import read_rows as read_rows
from kvjax.evaluation.runner import Settings as Settings
from kvjax.evaluation.runner import check as check
from kvjax.evaluation.runner import make_cases as make_cases
from kvjax.evaluation.runner import parse_policies as parse_policies
from kvjax.evaluation.runner import resolved_config as resolved_config
from kvjax.evaluation.runner import run as run
from kvjax.evaluation.speed import bench as bench
from kvjax.evaluation.tasks import Sample as Sample
from kvjax.evaluation.tasks import Task as Task
from kvjax.evaluation.tasks import make_task as make_task
