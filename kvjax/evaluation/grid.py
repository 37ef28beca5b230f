"""A leaderboard from one file: models' caches under (policies x budgets) on (tasks x lengths) under protocols.

    name: leaderboard
    model: gemma3-270m           # or several: [gemma3-270m, ./my-checkpoint]
    policies: [int8, kivi, snapkv, "snapkv | kivi(bits=4)"]
    sizes: [50, 25]              # percent of the full cache's bytes, for policies without a budget of their own
    protocols: [agnostic]
    tasks:
      - {task: niah_single_1, context: [1000, 2000], count: 4}
      - {task: ppl, context: 2000}
      - {task: longbench, path: data/longbench}      # a benchmark's published files; relative to this file

Every task at every length under every protocol, for every model, is a job with a folder of its own. Processes that run
the same grid in the same folder share the jobs: each takes what no other has taken. A process that is killed leaves its
job to the next.
"""

import concurrent.futures
import contextlib
import dataclasses
import datetime
import difflib
import itertools
import json
import pathlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import yaml

from kvjax.evaluation.cases import (
    Case,
    Settings,
    check,
    dtype_of,
    make_cases,
    parse_policies,
    protocol_of,
    resolved_config,
    servable,
)
from kvjax.evaluation.heads import LOCAL, SINKS, head_maps, where
from kvjax.evaluation.results import Row, config_hash, make_folder, read_rows, versions, write_json
from kvjax.evaluation.runner import run
from kvjax.evaluation.tasks import Task, make_tasks
from kvjax.model import Model
from kvjax.policies import Policy
from kvjax.policies.registry import nearest

FILE, HEADS, LOG, LOCK = "grid.json", "heads.json", "log.jsonl", ".lock"
HEAD_SAMPLES = 4  # Prompts over which heads are looked at.
DEFAULT_PROTOCOLS = ("agnostic",)
DTYPES = ("float32", "bfloat16", "float16")
FILES = {"path", "haystack", "examples"}  # Parameters of tasks that name a file or a folder.
Notes = Callable[[str], None]


class GridError(ValueError):
    """A grid that cannot be read or run; the message says what would be right."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grid:
    """What a file says, checked.

    Attributes:
      name: Of the folder of results.
      title: Of the report.
      models: As `kvjax.load` takes them. dtype: Of parameters and caches; None for the machine's default.
      policies: The full cache first.
      tasks: One for every task and length.
      protocols: "aware", "agnostic" or both; tasks without a question are agnostic.
      tokens: Along so many of the full cache's own tokens predictions are compared.
      speed: Whether decoding is timed, in the first job of every length.
    """

    name: str
    title: str
    models: tuple[str, ...]
    policies: tuple[Policy, ...]
    tasks: tuple[Task, ...]
    dtype: str | None = None
    protocols: tuple[str, ...] = DEFAULT_PROTOCOLS
    tokens: int = 16
    speed: bool = True

    def resolved(self) -> dict[str, Any]:
        """All that results depend on, for JSON."""
        return {
            "name": self.name,
            "title": self.title,
            "models": list(self.models),
            "dtype": self.dtype,
            "policies": [str(policy) for policy in self.policies],
            "tasks": [task.resolved() for task in self.tasks],
            "protocols": list(self.protocols),
            "continuation": self.tokens,
            "speed": self.speed,
        }


@dataclasses.dataclass(frozen=True)
class Job:
    """One task under one protocol for one model, ready to run.

    Attributes:
      name: Its folder's, within the run's.
      model: As the grid names it.
      task, settings, cases: What is asked of whom.
      folder: Its results'. config: Its resolved configuration.
      left_out: Policies that cannot serve it, and why.
    """

    name: str
    model: str
    task: Task
    settings: Settings
    cases: Sequence[Case]
    folder: pathlib.Path
    config: Mapping[str, Any]
    left_out: Mapping[str, str]

    @property
    def rows(self) -> int:
        """How many it has when it is done."""
        return len(self.cases) * len(self.settings.policies)


# Reading


KEYS = {
    "name": str,
    "title": str,
    "model": str,
    "dtype": str,
    "policies": list,
    "sizes": list,
    "protocols": list,
    "tasks": list,
    "continuation": int,
    "speed": bool,
}


def read_grid(path: pathlib.Path) -> Grid:
    """Reads and checks a file; needs no model.

    Raises:
      ValueError: It cannot be read, or says something that makes no sense; the message says what would.
    """
    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        beside = [other.name for other in sorted(path.parent.glob("*")) if other.suffix in (".yaml", ".yml")]
        close = difflib.get_close_matches(path.name, beside, n=1)
        meant = f" Did you mean {path.parent / close[0]}?" if close else ""
        raise GridError(f"Cannot read the grid {path}: there is no such file.{meant}") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise GridError(f"Cannot read the grid {path}: {error}") from None
    return make_grid(given, path.stem, str(path), path.parent)


def make_grid(given: Any, name: str, where: str = "The grid", folder: pathlib.Path = pathlib.Path()) -> Grid:
    """A grid from what its file says.

    Args:
      given: A mapping, see above.
      name: If it has none of its own.
      where: For messages.
      folder: Where paths of tasks' files and folders start.

    Raises:
      ValueError: As `read_grid`.
    """
    if not isinstance(given, dict):
        raise GridError(f"{where}: a grid is a mapping with {', '.join(KEYS)}.")
    for key, value in given.items():
        if key not in KEYS:
            raise GridError(f"{where}: there is no setting {key!r}. {nearest(str(key), KEYS)}")
        kind = KEYS[key]
        if key == "model" and isinstance(value, list) and all(isinstance(one, str) for one in value):
            continue
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            kinds = {str: "text", list: "a list", int: "a whole number", bool: "true or false"}
            raise GridError(f"{where}: {key} is {kinds[kind]}, got {value!r}.")
    for key in ("model", "policies", "tasks"):
        if not given.get(key):
            raise GridError(f"{where}: {key} is missing.")
    sizes = given.get("sizes", [])
    if wrong := [size for size in sizes if isinstance(size, bool | str) or not 0 < size <= 100]:
        raise GridError(f"{where}: sizes are percentages of the full cache's bytes, got {wrong[0]!r}.")
    if given.get("dtype") not in (None, *DTYPES):
        raise GridError(f"{where}: dtype is {', '.join(DTYPES)}, got {given['dtype']!r}.")
    protocols = tuple(given.get("protocols", DEFAULT_PROTOCOLS))
    if not protocols or set(protocols) - {"aware", "agnostic"}:
        raise GridError(f"{where}: protocols are aware, agnostic or both, got {list(protocols)}.")
    return Grid(
        name=given.get("name", name),
        title=given.get("title", given.get("name", name)),
        models=_models(given["model"], where),
        dtype=given.get("dtype"),
        policies=parse_policies("; ".join(map(str, given["policies"])), [size / 100 for size in sizes]),
        tasks=tuple(task for entry in given["tasks"] for task in _tasks(entry, where, folder)),
        protocols=protocols,
        tokens=given.get("continuation", 16),
        speed=given.get("speed", True),
    )


def _models(given: str | list[str], where: str) -> tuple[str, ...]:
    models = (given,) if isinstance(given, str) else tuple(given)
    short = [short_name(model) for model in models]
    if twice := [model for model, name in zip(models, short, strict=True) if short.count(name) > 1]:
        raise GridError(f"{where}: {' and '.join(twice)} would have one folder for their results; their names differ.")
    return models


def short_name(model: str) -> str:
    """Of a model: the last part of its path or hub name, without a checkpoint's ending."""
    return pathlib.PurePath(model).name.removesuffix(".gguf")


def _tasks(entry: Any, where: str, folder: pathlib.Path) -> list[Task]:
    """The tasks of one entry: a name, or a mapping with `task` (a name or several, of tasks or of groups), parameters
    and one or more lengths (`context`)."""
    entry = {"task": entry} if isinstance(entry, str) else entry
    names = entry.get("task") if isinstance(entry, dict) else None
    names = names if isinstance(names, list) else [names]
    if not isinstance(entry, dict) or not all(isinstance(name, str) for name in names):
        raise GridError(f"{where}: a task is a name, or a mapping such as {{task: needle, context: [1000, 2000]}}.")
    parameters = {key: value for key, value in entry.items() if key not in ("task", "context")}
    for key in FILES & set(parameters):
        place = folder / str(parameters[key])
        parameters[key] = str(place) if place.exists() else parameters[key]
    lengths = entry.get("context")
    lengths = lengths if isinstance(lengths, list) else [lengths]
    found = []
    for name, length in itertools.product(names, lengths):
        try:
            found += make_tasks(beside(str(name), folder), **_given(context=length), **parameters)
        except ValueError as error:
            raise GridError(f"{where}: task {name}: {error}") from None
    return found


def beside(name: str, folder: pathlib.Path) -> str:
    """The path of what lies in a grid's folder, such as a checkpoint or a file of JSON lines; or the name as it is."""
    is_path = "/" in name or bool(pathlib.PurePath(name).suffix)
    return str(folder / name) if is_path and (folder / name).exists() else name


def _given(**values: Any) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}


# Jobs


def prepare(load: Callable[[str], Model], grid: Grid, folder: pathlib.Path) -> list[Job]:
    """Makes every job's samples and checks them; policies that cannot serve a job are left out of it.

    Args:
      load: A model by its name in the grid; asked for one after the other.
      grid: What is run.
      folder: Of the run.

    Raises:
      ValueError: A task cannot be made for a model, a sample is too long for it, or two jobs would share a folder.
    """
    several = len(grid.models) > 1
    return [
        job
        for name in grid.models
        for job in _jobs(load(name), name, grid, folder, short_name(name) if several else "")
    ]


def _jobs(model: Model, name: str, grid: Grid, folder: pathlib.Path, own: str) -> list[Job]:
    """One model's, in its own folder within the run's."""
    jobs, timed = [], set()
    for task, protocol in itertools.product(grid.tasks, grid.protocols):
        settings = Settings(policies=grid.policies, protocol=protocol, tokens=grid.tokens, speed=False)  # type: ignore[arg-type]
        protocol = protocol_of(task, settings)
        path = folder / own / "-".join(map(str, filter(None, (task.name, task.length, protocol))))
        if any(job.folder == path and job.task is task for job in jobs):
            continue  # A task without a question is the same under both protocols.
        if any(job.folder == path for job in jobs):
            raise GridError(f"Two tasks are called {path.name}: give each its own context, or another name.")
        cases = make_cases(task, task.samples(model), settings)
        fit, reasons = servable(model, cases, grid.policies)
        speed = grid.speed and (task.length, protocol) not in timed
        timed.add((task.length, protocol))
        settings = dataclasses.replace(settings, policies=fit, speed=speed)
        check(model, cases, settings)
        config = resolved_config(name, dtype_of(model), task, settings)
        left_out = {str(policy): why for policy, why in reasons.items()}
        jobs.append(Job(path.relative_to(folder).as_posix(), name, task, settings, cases, path, config, left_out))
    return jobs


def unfinished(jobs: Sequence[Job]) -> int:
    """Rows that are still to be made.

    Raises:
      ValueError: Results in a job's folder are of other settings.
    """
    return sum(job.rows - len(read_rows(job.folder, job.config)) for job in jobs)


@contextlib.contextmanager
def _claimed(folder: pathlib.Path) -> Iterator[bool]:
    """Whether this process has the folder to itself until the block ends, or dies: a lock goes with its process."""
    import fcntl

    with (folder / LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def run_grid(
    load: Callable[[str], Model],
    grid: Grid,
    jobs: Sequence[Job],
    folder: pathlib.Path,
    *,
    devices: Sequence[Any] = (),
    overwrite: bool = False,
    progress: Callable[[int, int, str], None] = lambda done, total, what: None,
) -> int:
    """Runs what has not been run yet.

    Args:
      load: A model by its name in the grid; asked for one after the other.
      grid: What is run.
      jobs: Of `prepare`.
      folder: Of the run.
      devices: With two or more, jobs run side by side, each on one of them with its own copy of the parameters.
      overwrite: Forget what is there.
      progress: Called with rows done, rows in all, and what has been done.

    Returns:
      How many jobs other processes are at work on.

    Raises:
      ValueError: The folder holds results of other settings, or cannot be written to.
    """
    make_folder(folder)
    for job in jobs:
        make_folder(job.folder)
        if overwrite:
            (job.folder / "results.json").unlink(missing_ok=True)
    total, before = sum(job.rows for job in jobs), sum(job.rows for job in jobs) - unfinished(jobs)
    with _claimed(folder) as free:
        if free:  # Of several processes one describes the run.
            write_json(folder / FILE, _about(grid, jobs))
    counts, lock, stopped = {}, threading.Lock(), threading.Event()
    elsewhere: list[Job] = []

    def work(model: Model, waiting: list[Job], device: Any) -> None:
        mine = model if device is None else dataclasses.replace(model, params=jax.device_put(model.params, device))
        with jax.default_device(device) if device else contextlib.nullcontext():
            while True:
                with lock:
                    if not waiting:
                        return
                    job = waiting.pop(0)
                with _claimed(job.folder) as free:
                    if not free:
                        elsewhere.append(job)
                        continue
                    rows = read_rows(job.folder, job.config)

                    def advance(done: int, _: int, what: str, job: Job = job, start: int = len(rows)) -> None:
                        if stopped.is_set():
                            raise concurrent.futures.CancelledError
                        with lock:
                            counts[job.folder] = done - start
                            progress(before + sum(counts.values()), total, f"{job.name}: {what}")

                    if len(rows) < job.rows:
                        _log(folder, {"event": "job", "job": job.name, "rows": job.rows, "there": len(rows)})
                        run(mine, job.task, job.cases, job.settings, job.config, job.folder, rows, advance)
                        _log(folder, {"event": "done", "job": job.name, **_scores(job)})

    for name in grid.models:
        own = [job for job in jobs if job.model == name]
        if not unfinished(own):
            continue
        model = load(name)
        with _claimed(own[0].folder.parent) as free:
            if free:
                _look_at_heads(model, own, own[0].folder.parent)
        if len(devices) < 2:
            work(model, own, None)
        else:
            with concurrent.futures.ThreadPoolExecutor(len(devices)) as pool:
                running = [pool.submit(work, model, own, device) for device in devices]
                try:
                    for one in concurrent.futures.as_completed(running):
                        one.result()
                finally:  # An error or Ctrl-C: the others stop at their next row, which is kept.
                    stopped.set()
    return len(elsewhere)


def _about(grid: Grid, jobs: Sequence[Job]) -> dict[str, Any]:
    resolved = grid.resolved()
    return resolved | {
        "hash": config_hash(resolved),
        "jobs": [job.name for job in jobs],
        "left_out": {job.name: dict(job.left_out) for job in jobs if job.left_out},
        "versions": versions(),
        "device": jax.devices()[0].device_kind,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _scores(job: Job) -> dict[str, Any]:
    """Mean score (or perplexity, or agreement) of every policy, for the log."""
    rows = read_rows(job.folder, job.config)
    key = next(key for key in ("score", "perplexity", "top1") if key in rows[0])
    names = dict.fromkeys(row["policy"] for row in rows)
    values = {name: [row[key] for row in rows if row["policy"] == name] for name in names}
    return {key: {name: sum(of) / len(of) for name, of in values.items()}}


def _log(folder: pathlib.Path, event: Row) -> None:
    """Adds a line to the run's log; lines of several processes do not mix, for each is one write."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    with (folder / LOG).open("a", encoding="utf-8") as file:
        file.write(json.dumps({"time": now, **event}) + "\n")


def _look_at_heads(model: Model, jobs: Sequence[Job], folder: pathlib.Path) -> None:
    """Maps of sinks and retrieval heads, on the first needles whose answers stand in their prompts word for word."""
    if (folder / HEADS).exists():
        return
    for job in jobs:
        asked = [(case.prompt + case.question, case.sample.answers[0]) for case in job.cases]
        found = [(prompt, answer) for prompt, answer in asked if where(prompt, answer) >= 0][:HEAD_SAMPLES]
        if job.task.metric == "perplexity" or not found:
            continue
        maps = head_maps(model, found)
        how = (
            f"{len(found)} prompts of {job.folder.name}, {maps.tokens} answer tokens, uncompressed. Sink: attention on "
            f"the first {SINKS} tokens; local: on the last {LOCAL}; retrieval: share of answer tokens whose most "
            "attended position is the token in the needle that is copied next."
        )
        maps_of = {name: getattr(maps, name).round(4).tolist() for name in ("sink", "local", "retrieval")}
        about = {"layers": list(maps.layers), "heads": model.config.num_heads, "how": how}
        write_json(folder / HEADS, about | maps_of)
        return
