"""Runs an experiment on the tiny model; `test_killed.py` kills it.

Usage: python -m tests.evaluation.long_run TASK.jsonl FOLDER
"""

import pathlib
import sys

import numpy as np

from kvjax.evaluation import (
    Settings,
    check,
    make_cases,
    make_folder,
    make_task,
    parse_policies,
    read_rows,
    resolved_config,
    run,
)
from tests import tiny


def main(task_file: str, out: str) -> None:
    model, folder = tiny.model(), pathlib.Path(out)
    task = make_task(task_file)
    settings = Settings(policies=parse_policies("full; knorm(0.5)"), speed=False, tokens=2)
    config, cases = resolved_config("tiny", np.float32, task, settings), make_cases(task, task.samples(model), settings)
    check(model, cases, settings)
    make_folder(folder)
    run(model, task, cases, settings, config, folder, read_rows(folder, config))


if __name__ == "__main__":
    main(*sys.argv[1:])
