"""Reads what a run has left: a folder of jobs that a grid has written, or one job's that `kvjax compare` has.

A grid of several models has a folder for each, with its jobs in it.
"""

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from kvjax.evaluation.results import FILE, Row

GRID, KEPT, HEADS = "grid.json", "kept.json", "heads.json"


@dataclasses.dataclass(frozen=True)
class Job:
    """One task at one length under one protocol, for one model.

    Attributes:
      name: Of its folder, within the run's.
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
      heads: Maps of attention heads of each model that has some.
    """

    name: str
    grid: Mapping[str, Any] | None
    jobs: tuple[Job, ...]
    heads: Mapping[str | None, Mapping[str, Any]]

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
    inside = sorted(path.parent for depth in ("*", "*/*") for path in folder.glob(f"{depth}/{FILE}"))
    if grid:  # Its order, and nothing that only lies beside its jobs.
        named = [folder / name for name in grid.get("jobs", ())]
        inside = [path for path in named if (path / FILE).exists()] or inside
    places = [folder] if (folder / FILE).exists() else inside
    jobs = tuple(job for job in (_job(place, folder) for place in places) if job.rows)
    if not jobs:
        raise ValueError(
            f"{folder} holds no results: neither {FILE} nor folders with one. `kvjax compare --out {folder}` and "
            "`kvjax eval GRID.yaml` write such folders."
        )
    return Run(folder.resolve().name, grid, jobs, _heads(folder, jobs))


def _heads(folder: pathlib.Path, jobs: Sequence[Job]) -> dict[str | None, Mapping[str, Any]]:
    """Each model's maps lie beside its jobs."""
    places = {job.rows[0].get("model"): (folder / job.name).parent for job in reversed(jobs)}
    found = {model: _read(place / HEADS, dict) for model, place in reversed(places.items())}
    return {model: maps for model, maps in found.items() if maps}


NEEDED = ("policy", "task", "metric", "protocol", "sample", "nll", "kl", "top1", "nbytes", "config")


def _job(folder: pathlib.Path, run: pathlib.Path) -> Job:
    rows = _read(folder / FILE, list) or []
    for row in rows:
        if not isinstance(row, dict) or (missing := [key for key in NEEDED if key not in row]):
            what = f"a row has no {missing[0]}" if isinstance(row, dict) else "a row is no mapping"
            raise ValueError(f"{folder / FILE} holds no results of kvjax: {what}.")
    name = folder.resolve().name if folder == run else folder.relative_to(run).as_posix()
    return Job(name, rows, _read(folder / KEPT, dict))


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
