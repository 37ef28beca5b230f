"""The command line. Each command is a function in `kvjax/commands`.

Results go to stdout, progress and remarks to stderr. What the user got wrong is one line, `error: ...`, and exit code
2, before anything is computed where it can be known before.
"""

import warnings
from typing import Any

import typer

from kvjax.commands.bench import bench_app
from kvjax.commands.common import notes
from kvjax.commands.doctor import doctor
from kvjax.commands.evaluate import compare, evaluate
from kvjax.commands.generate import generate
from kvjax.commands.methods import methods
from kvjax.commands.plan import plan
from kvjax.commands.report import report
from kvjax.commands.tasks import tasks

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode="markdown")


def main() -> None:
    """What the command `kvjax` calls."""
    warnings.showwarning = _show_warning
    app()


def _show_warning(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
    """As a remark: who types a command does not care in which line of which file it came up."""
    notes.print(f"warning: {message}", style="yellow", markup=False, highlight=False, soft_wrap=True)


@app.callback()
def _about() -> None:
    """KV-cache compression in JAX: real bytes, real quality, real speed.

    Start with `kvjax compare`: ten policies on Gemma 3 270M, in a few minutes on a laptop.
    """


app.command()(compare)
app.command(name="eval")(evaluate)
app.command()(generate)
app.add_typer(bench_app, name="bench")
app.command()(plan)
app.command()(report)
app.command()(methods)
app.command()(doctor)
app.command()(tasks)
