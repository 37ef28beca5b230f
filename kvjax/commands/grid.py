"""`kvjax eval GRID.yaml`: a leaderboard from one file, by several devices and processes, resumed where it stopped."""

import functools
import json
import pathlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import typer

from kvjax.commands.common import console, notes, plain_table, print_wide, user_errors, write_whole
from kvjax.commands.options import Dtype, load, progress_bar
from kvjax.commands.report import PAGE

if TYPE_CHECKING:
    from kvjax.evaluation.grid import Grid, Job
    from kvjax.model import Model


def run_file(
    path: pathlib.Path,
    *,
    out: pathlib.Path | None,
    overwrite: bool,
    devices: int,
    mesh: str | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Runs a grid, or goes on with it; prints the leaderboard and writes the page.

    Args:
      path: Of the YAML file.
      out: Folder of the run; default: `results/` and the grid's name.
      overwrite: Forget what is there.
      devices: Jobs that run side by side, each on a device of its own.
      mesh: Devices over which every job is spread instead.
      dry_run: Say what would be run, and stop.
      as_json: Print the leaderboard as JSON.
    """
    with user_errors():
        from kvjax.evaluation import grid as grids

        grid = grids.read_grid(path)
        folder = out or pathlib.Path("results") / grid.name
        chosen = _devices(devices, mesh)

    @functools.lru_cache(maxsize=1)  # One at a time.
    def model(name: str) -> "Model":
        return load(
            grids.beside(name, path.parent),
            Dtype(grid.dtype) if grid.dtype else None,
            [] if dry_run else [folder],
            mesh,
        )

    with user_errors():
        jobs = grids.prepare(model, grid, folder)
        left = grids.unfinished(jobs) if not overwrite else sum(job.rows for job in jobs)
    _say_left_out(jobs)
    if dry_run:
        _print_jobs(model, grid, jobs, folder, left, as_json)
        return
    try:
        with user_errors(), progress_bar(grid.name) as advance:
            elsewhere = grids.run_grid(model, grid, jobs, folder, devices=chosen, overwrite=overwrite, progress=advance)
    except KeyboardInterrupt:
        notes.print(f"Stopped. The same command goes on where it stopped ({folder}).", highlight=False)
        raise typer.Exit(130) from None
    if elsewhere:
        notes.print(f"{elsewhere} jobs are with other processes; this is what is there by now.", highlight=False)
    _print_leaderboard(grid, jobs, folder, as_json)


def _say_left_out(jobs: "list[Job]") -> None:
    """Each reason once, with the jobs that it is true of."""
    reasons: dict[str, list[str]] = {}
    for job in jobs:
        for reason in job.left_out.values():
            reasons.setdefault(reason, []).append(job.name)
    for reason, names in reasons.items():
        which = "all jobs" if len(names) == len(jobs) else ", ".join(names)
        notes.print(f"Left out of {which}: {reason}", style="dim", markup=False, highlight=False, soft_wrap=True)


def _devices(number: int, mesh: str | None) -> tuple[Any, ...]:
    import jax

    if number < 1 or number > jax.local_device_count():
        raise ValueError(f"--devices is 1 to {jax.local_device_count()}, the devices that are here; got {number}.")
    if number > 1 and mesh:
        raise ValueError("--devices runs jobs side by side and --mesh spreads each over all devices: give one of them.")
    return tuple(jax.local_devices()[:number]) if number > 1 else ()


def _print_jobs(
    model: Callable[[str], "Model"], grid: "Grid", jobs: "list[Job]", folder: pathlib.Path, left: int, as_json: bool
) -> None:
    """What would be run, and how large caches would be; nothing is computed."""
    from kvjax.evaluation.caches import sizes
    from kvjax.evaluation.cases import dtype_of
    from kvjax.evaluation.report import megabytes
    from kvjax.policies import plan

    def nbytes(job: "Job", length: int) -> dict[str, int]:
        config, dtype = model(job.model).config, dtype_of(model(job.model))
        policies = job.settings.policies
        return {str(each): sizes([plan(each, config, length, dtype)], config, dtype)[0] for each in policies}

    rows = []
    for job in jobs:
        longest = max(len(case.prompt) for case in job.cases)
        about = {"job": job.name, "samples": len(job.cases), "policies": len(job.settings.policies)}
        more = {"prompt_tokens": longest, "rows": job.rows, "nbytes": nbytes(job, longest)}
        rows.append(about | more | {"left_out": dict(job.left_out)})
    if as_json:
        print(json.dumps({"folder": str(folder), "rows_left": left, "jobs": rows}, indent=1))
        return
    out = plain_table(grid.title, "job", "samples", "policies", "longest prompt", "rows", "full cache", "smallest")
    for row in rows:
        sizes_of = [megabytes(size) for size in (row["nbytes"]["full"], min(row["nbytes"].values()))]
        out.add_row(
            row["job"], *(f"{row[key]:,}" for key in ("samples", "policies", "prompt_tokens", "rows")), *sizes_of
        )
    print_wide(out)
    total = sum(job.rows for job in jobs)
    console.print(f"\n{left:,} of {total:,} rows are left to run in {folder}. Nothing was run.", highlight=False)


def _print_leaderboard(grid: "Grid", jobs: "list[Job]", folder: pathlib.Path, as_json: bool) -> None:
    from kvjax.evaluation.leaderboard import leaderboard, leaderboard_table
    from kvjax.evaluation.page import make_page, page_data, read_run
    from kvjax.evaluation.report import TEST
    from kvjax.evaluation.results import read_rows

    rows = [row for job in jobs for row in read_rows(job.folder, job.config)]
    if not rows:
        return
    board, page = leaderboard(rows), folder / PAGE
    with notes.status("Making the page ..."):
        write_whole(page, make_page(page_data(read_run(folder))))
    if as_json:
        print(
            json.dumps({"title": grid.title, "leaderboard": board, "folder": str(folder), "page": str(page)}, indent=1)
        )
        return
    print_wide(leaderboard_table(board, grid.title))
    console.print(f"\n* differs from the full cache {TEST}\n{page}\n", style="dim", highlight=False, soft_wrap=True)
