"""`kvjax tasks`: what a compressed cache can be asked."""

import dataclasses
import json
from typing import Annotated, Any

import typer

from kvjax.commands import complete
from kvjax.commands.common import console, user_errors
from kvjax.commands.options import JsonOption


def tasks(
    name: Annotated[
        str | None, typer.Argument(help="Show one task, or the tasks of one group.", autocompletion=complete.tasks)
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Lists every task: what it asks, how it is scored, and its parameters with their defaults.

    Tasks are generated for any tokenizer at any length, or read from a benchmark's published files (`path`). They go
    into `kvjax compare --task`, and with all their parameters into the grids of `kvjax eval`.

    **Examples**

    `kvjax tasks`

    `kvjax tasks ruler`

    `kvjax tasks vt`
    """
    with user_errors():
        from kvjax.evaluation.tasks import TASKS, groups
        from kvjax.policies.registry import nearest

        members = groups().get(name, (name,)) if name else tuple(TASKS)
        if unknown := [one for one in members if one not in TASKS]:
            raise ValueError(f"There is no task or group {unknown[0]!r}. {nearest(unknown[0], [*TASKS, *groups()])}")
    rows = [
        {
            "name": one,
            "group": TASKS[one].group,
            "about": TASKS[one].about,
            "parameters": {key: _shown(value) for key, value in TASKS[one].parameters.items()},
        }
        for one in members
    ]
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    _print(rows, whole=name is not None)


def _shown(default: Any) -> Any:
    return "required" if default is dataclasses.MISSING else list(default) if isinstance(default, tuple) else default


def _print(rows: list[dict[str, Any]], whole: bool) -> None:
    group = None
    for row in rows:
        if row["group"] != group:
            group = row["group"]
            console.print(f"\n[bold]{group}[/]", highlight=False)
        console.print(f"  [cyan]{row['name']}[/]: {row['about']}", highlight=False, soft_wrap=True)
        if whole:
            given = ", ".join(f"{key}={value}" for key, value in row["parameters"].items())
            console.print(f"      {given}", style="dim", highlight=False, markup=False, soft_wrap=True)
    if not whole:
        console.print("\n`kvjax tasks NAME` tells the parameters.", style="dim", highlight=False)
