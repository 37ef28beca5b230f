"""Reads what a run has left: a folder of jobs that a grid has written, or one job's that `kvjax compare` has."""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

from kvjax.evaluation.results import FILE, Row

GRID, KEPT, HEADS = "grid.json", "kept.json", "heads.json"


@dataclasses.dataclass(frozen=True)
class Job:
    """One task at one length under one protocol.

    Attributes:
      name: Of its folder.
      rows: One per sample and policy, as far as it has run.
      kept: Which tokens of the first sample stay, or None.
    """

    name: str
    rows: list[Row]
    kept: Mapping[str, Any] | None


@dataclasses.dataclass(frozen=True)
class Run:
    """A run's folder.

    Attributes:
      name: Of the folder.
      grid: The resolved grid, or None.
      jobs: Those that have rows.
      heads: Maps of attention heads, or None.
    """

    name: str
    grid: Mapping[str, Any] | None
    jobs: tuple[Job, ...]
    heads: Mapping[str, Any] | None

    @property
    def rows(self) -> list[Row]:
        return [row for job in self.jobs for row in job.rows]


def read_run(folder: pathlib.Path) -> Run:
    """Reads a run, finished or not.

    Raises:
      ValueError: There is no such folder, it holds no run, or a file of it is not what it should be.
    """
    if not folder.is_dir():
        raise ValueError(f"There is no folder {folder}.")
    grid = _read(folder / GRID, dict)
    inside = sorted(path.parent for path in folder.glob(f"*/{FILE}"))
    if grid:  # Its order, and nothing that only lies beside its jobs.
        named = [folder / name for name in grid.get("jobs", ())]
        inside = [path for path in named if (path / FILE).exists()] or inside
    places = [folder] if (folder / FILE).exists() else inside
    jobs = tuple(job for job in map(_job, places) if job.rows)
    if not jobs:
        raise ValueError(
            f"{folder} holds no results: neither {FILE} nor folders with one. `kvjax compare --out {folder}` and "
            "`kvjax eval GRID.yaml` write such folders."
        )
    return Run(folder.resolve().name, grid, jobs, _read(folder / HEADS, dict))


NEEDED = ("policy", "task", "metric", "protocol", "sample", "nll", "kl", "top1", "nbytes", "config")


def _job(folder: pathlib.Path) -> Job:
    rows = _read(folder / FILE, list) or []
    for row in rows:
        if not isinstance(row, dict) or (missing := [key for key in NEEDED if key not in row]):
            what = f"a row has no {missing[0]}" if isinstance(row, dict) else "a row is no mapping"
            raise ValueError(f"{folder / FILE} holds no results of kvjax: {what}.")
    return Job(folder.resolve().name, rows, _read(folder / KEPT, dict))


def _read(path: pathlib.Path, kind: type) -> Any:
    """What a JSON file says, or None where there is none."""
    if not path.exists():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"Cannot read {path}: {error}") from None
    if not isinstance(value, kind):
        raise ValueError(f"{path} is not of a run of kvjax: it should hold a {kind.__name__}.")
    return value
