"""Tasks by name, and groups of them."""

import dataclasses
import difflib
import pathlib
import warnings
from collections.abc import Mapping
from typing import Any

from kvjax.evaluation.metrics import MissingPackage
from kvjax.evaluation.tasks import (
    infinitebench,
    longbench,
    longgenbench,
    longmemeval,
    needle,
    retrieval,
    ruler,
    scbench,
    zeroscrolls,
)
from kvjax.evaluation.tasks.base import Entry, MissingFile, Task
from kvjax.evaluation.tasks.jsonl import read_json_lines
from kvjax.evaluation.tasks.text import Drift, Perplexity, Stream

TEXT = {
    "ppl": Entry(kind=Perplexity, group="text", about="goes on with a text: perplexity"),
    "stream": Entry(kind=Stream, group="text", about="goes on with an endless text: perplexity along the way"),
    "drift": Entry(kind=Drift, group="text", about="is led along a long text of the full cache: KL and agreement"),
}
TASKS: Mapping[str, Entry] = {
    **needle.TASKS,
    **retrieval.TASKS,
    **TEXT,
    **ruler.TASKS,
    **scbench.TASKS,
    **longbench.TASKS,
    **infinitebench.TASKS,
    **zeroscrolls.TASKS,
    **longmemeval.TASKS,
    **longgenbench.TASKS,
}


def groups() -> dict[str, tuple[str, ...]]:
    """The names of each group's tasks."""
    names = dict.fromkeys(entry.group for entry in TASKS.values())
    return {group: tuple(name for name, entry in TASKS.items() if entry.group == group) for group in names}


def make_task(name: str, **parameters: Any) -> Task:
    """A task by its name, or from a file of JSON lines.

    Args:
      name: One of `TASKS`, or the path of a file.
      **parameters: Of the task; None stands for the task's own default. `seed` may be given to any task.

    Raises:
      ValueError: There is no such task or file, or a parameter does not fit the task; the message says what would.
    """
    given = {key: _hashable(value) for key, value in parameters.items() if value is not None}
    entry = TASKS.get(name)
    if entry is None:
        return _from_file(name, given)
    known = entry.parameters
    if "seed" not in known:
        given.pop("seed", None)
    if wrong := [key for key in given if key not in known]:
        raise ValueError(
            f"{' and '.join(wrong)}: no parameter of the task {name}{_meant(wrong[0], known)}. It has "
            f"{', '.join(known)}."
        )
    if missing := _missing(entry, given):
        raise ValueError(f"The task {name} needs {' and '.join(missing)}: {entry.about}.")
    return entry.build(**given)


def make_tasks(name: str, **parameters: Any) -> tuple[Task, ...]:
    """All tasks of a group, or the one of that name.

    Of a group those are left out whose file is not there, or whose metric's package is not installed; a warning says
    which and why.

    Args:
      name: A group such as "ruler", a task or a file.
      **parameters: As of `make_task`; in a group each goes to the tasks that have it.

    Raises:
      ValueError: As `make_task` does, no task of the group has the parameter, or none is left.
    """
    members = groups().get(name, ())
    if name in TASKS or not members:
        return (make_task(name, **parameters),)
    known = dict.fromkeys(key for member in members for key in TASKS[member].parameters)
    given = {key: value for key, value in parameters.items() if value is not None}
    if wrong := [key for key in given if key not in known and key != "seed"]:
        raise ValueError(
            f"{' and '.join(wrong)}: no parameter of any task of {name}{_meant(wrong[0], known)}. They have "
            f"{', '.join(known)}."
        )
    lacking = [member for member in members if set(_missing(TASKS[member], given))]
    if lacking:
        rest = [member for member in members if member not in lacking]
        others = f", or name those that do not: {', '.join(rest)}" if rest else ""
        needs = " and ".join(_missing(TASKS[lacking[0]], given))
        raise ValueError(f"{' and '.join(lacking)} of {name} need {needs}: give it{others}.")
    fitting = {member: {k: v for k, v in given.items() if k in TASKS[member].parameters} for member in members}
    tasks, left_out = [], {}
    for member in members:
        try:
            tasks.append(make_task(member, **fitting[member]))
        except (MissingFile, MissingPackage) as error:
            left_out[member] = str(error)
    reasons = "".join(f"\n  {member}: {reason}" for member, reason in left_out.items())
    if not tasks:
        raise ValueError(f"No task of {name} can be made:{reasons}")
    if left_out:
        warnings.warn(f"Left out of {name}:{reasons}", stacklevel=2)
    return tuple(tasks)


def _missing(entry: Entry, given: Mapping[str, Any]) -> list[str]:
    return [key for key, default in entry.parameters.items() if default is dataclasses.MISSING and key not in given]


def _from_file(name: str, given: Mapping[str, Any]) -> Task:
    if not pathlib.Path(name).is_file():
        if members := groups().get(name):
            raise ValueError(f"{name} is a group of tasks: {', '.join(members)}. Name one of them.")
        raise ValueError(
            f"There is no task {name!r} and no file of that name{_meant(name, [*TASKS, *groups()]) or '.'} A task "
            "is a file of JSON lines or has a name; `kvjax tasks` lists all names."
        )
    if wrong := [key for key in given if key not in ("count", "seed")]:
        raise ValueError(f"The rows of {name} are what they are; leave {' and '.join(wrong)} out.")
    return read_json_lines(name, given.get("count"))


def _meant(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else ""


def _hashable(value: Any) -> Any:
    return tuple(_hashable(part) for part in value) if isinstance(value, list) else value
