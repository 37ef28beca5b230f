"""Options that commands share, and what they all do with them: load a model, show progress."""

import contextlib
import enum
import pathlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvjax.commands import complete
from kvjax.commands.common import notes, user_errors

if TYPE_CHECKING:
    from kvjax.model import Model

MODEL = "gemma3-270m"


class Protocol(enum.StrEnum):
    aware = "aware"
    agnostic = "agnostic"


class Dtype(enum.StrEnum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Implementation(enum.StrEnum):
    auto = "auto"
    tpu = "tpu"
    gpu = "gpu"
    xla = "xla"
    reference = "reference"


ModelOption = Annotated[
    str,
    typer.Option(
        "--model",
        help=f"{MODEL}, tiny, a Hugging Face or Orbax folder, a .gguf file, or a hub name.",
        autocompletion=complete.models,
    ),
]
MeshOption = Annotated[
    str | None,
    typer.Option(help="Devices to spread over, such as seq=4,model=2: rows (data), slots (seq), heads (model)."),
]
DtypeOption = Annotated[
    Dtype | None, typer.Option(help="Of parameters and cache. Default: float32 on CPUs, bfloat16 elsewhere.")
]
ProtocolOption = Annotated[
    Protocol,
    typer.Option(help="aware: the question is in the prompt that is compressed. agnostic: it comes after compression."),
]
ContextOption = Annotated[int | None, typer.Option(help="Tokens of the context. Default: the task's.")]
SamplesOption = Annotated[int | None, typer.Option(help="Contexts, or rows of a file. Default: the task's, all rows.")]
NeedlesOption = Annotated[int | None, typer.Option(help="Needles per context; each is asked for. Default: 1.")]
SeedOption = Annotated[int, typer.Option(help="Of everything that is drawn at random.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="NAME=VALUE",
        help="A parameter of the task, such as path=data/longbench or depths=[0,0.5,1]; see `kvjax tasks NAME`.",
    ),
]
OutOption = Annotated[
    pathlib.Path | None, typer.Option(help="Folder for results. Default: one below results/ per configuration.")
]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace results instead of continuing them.")]
SpeedOption = Annotated[bool, typer.Option(help="Time decoding at the compressed size.")]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Say what would be run, and stop.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def load(name: str, dtype: Dtype | None, folders: list[pathlib.Path], mesh: str | None) -> "Model":
    """The model, on the mesh that the command then runs on, once it is sure that results can be written."""
    with user_errors():
        import jax

        import kvjax
        from kvjax.evaluation import make_folder

        for folder in folders:
            make_folder(folder)
        cache_compilations()
        if mesh:
            jax.set_mesh(kvjax.sharding.make_mesh(mesh))
        with contextlib.nullcontext() if _of_the_hub(name) else notes.status(f"Loading {name} ..."):
            return kvjax.load(name, dtype=dtype.value if dtype else None)


def _of_the_hub(name: str) -> bool:
    """Whether it is downloaded, which has progress bars of its own."""
    return "/" in name and not pathlib.Path(name).exists()


def cache_compilations() -> None:
    """The next run of the same kind compiles little, unless the user has other plans for that."""
    import os

    import jax

    from kvjax.checkpoints.packaged import cache_dir

    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "jax"))


@contextlib.contextmanager
def progress_bar(what: str) -> Iterator[Any]:
    """A progress bar on stderr; yields `advance(done, total, text)`."""
    from rich import progress
    from rich.table import Column

    class Last(progress.TextColumn):
        """Gives way, with the bar, where the terminal is narrow; numbers do not."""

        def render(self, task: Any) -> Any:
            text = super().render(task)
            text.no_wrap, text.overflow = True, "ellipsis"
            return text

    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(table_column=Column(no_wrap=True)),
        progress.TimeElapsedColumn(table_column=Column(no_wrap=True)),
        progress.TextColumn("left"),
        progress.TimeRemainingColumn(table_column=Column(no_wrap=True)),
        Last("{task.fields[last]}", style="dim", table_column=Column()),
    )
    with progress.Progress(*columns, console=notes, transient=True, speed_estimate_period=600) as bar:
        task = bar.add_task(what, total=None, last="compiling; the first sample takes longest")
        yield lambda done, total, text: bar.update(task, completed=done, total=total, last=text)


def parameters(given: list[str] | None) -> dict[str, Any]:
    """["path=data", "depths=[0, 0.5]"] -> {"path": "data", "depths": [0, 0.5]}; values are as in a grid's YAML.

    Raises:
      ValueError: There is no name or no value, or a name is given twice.
    """
    import yaml

    found: dict[str, Any] = {}
    for text in given or ():
        name, equals, value = text.partition("=")
        if not equals or not name.strip() or not value.strip():
            raise ValueError(f"--set takes NAME=VALUE, such as path=data/longbench, got {text!r}.")
        if name.strip() in found:
            raise ValueError(f"--set gives {name.strip()} twice.")
        try:
            found[name.strip()] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise ValueError(
                f"Cannot read --set {text!r}: a value is a number, text, or a list like [0,0.5]."
            ) from None
    return found


def numbers(option: str, text: str) -> list[int]:
    """ "512,2048" -> [512, 2048]."""
    try:
        return [int(part) for part in text.replace(",", " ").split()]
    except ValueError:
        raise ValueError(f"{option} are numbers separated by commas, got {text!r}.") from None
