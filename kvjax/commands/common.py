"""What all commands do alike: results to stdout, remarks to stderr, mistakes in one line, files as a whole."""

import contextlib
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

console, notes = Console(), Console(stderr=True)


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """Says in one line what is wrong with the input. Around checks and loading only: bugs keep their traceback."""
    try:
        yield
    except (ValueError, OSError) as error:  # PolicyError and CheckpointError are ValueErrors.
        message = " ".join(str(error).split())
        notes.print(f"error: {message}", style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(2) from None


def plain_table(heading: str, name: str, *numbers: str) -> Table:
    """A table without lines: a column of names, which are never folded, and columns of numbers."""
    from kvjax.evaluation import report

    table = report.plain_table(heading, name)
    for column in numbers:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def print_wide(table: Any) -> None:
    """Never cuts a table: where the terminal is too narrow, or output goes to a file, lines are as long as they are."""
    width = Console(width=10**4).measure(table).maximum
    Console(width=max(console.width, width)).print(table)


def write_whole(path: pathlib.Path, text: str) -> None:
    """Replaces a file at once: who reads it finds the old text or the new one."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
