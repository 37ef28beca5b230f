"""`kvjax plan`: what a model and its cache would need on a TPU pod, from the program that would run there."""

import json
import pathlib
from typing import Annotated

import typer

from kvjax.commands import complete
from kvjax.commands.common import notes, print_wide, user_errors, write_whole


def plan(
    model: Annotated[
        str, typer.Option(help="A known model such as llama3.1-8b, or a config.json (or a folder with one).")
    ] = "llama3.1-8b",
    policy: Annotated[str, typer.Option(help="See `kvjax methods`.", autocompletion=complete.policies)] = "full",
    context: Annotated[str, typer.Option(help="Tokens of each prompt, such as 131072, 128k or 1M.")] = "128k",
    batch: Annotated[int, typer.Option(help="Sequences at once.")] = 1,
    topology: Annotated[str, typer.Option(help="v5e:16x16, v5p:4x4x4, v6e:8x8; h200:8 and others: arithmetic.")] = (
        "v5e:4x4"
    ),
    mesh: Annotated[
        str, typer.Option(help="How devices are used: data (rows), seq (slots), model (heads). Default: heads, slots.")
    ] = "",
    dtype: Annotated[str, typer.Option(help="Of parameters, and of keys and values as they come.")] = "bfloat16",
    every_layer: Annotated[
        bool, typer.Option("--every-layer", help="Compile the whole model: a minute or more if it is deep.")
    ] = False,
    prefill: Annotated[
        bool, typer.Option("--prefill", help="Compile what the prompts go through, too: their peak, and what is sent.")
    ] = False,
    arithmetic: Annotated[bool, typer.Option("--arithmetic", help="Compile nothing.")] = False,
    json_file: Annotated[
        pathlib.Path | None, typer.Option("--json", metavar="FILE", help='Write all as JSON; "-": to stdout alone.')
    ] = None,
) -> None:
    """Says whether a model fits a TPU pod, what it moves there and what limits it, before anyone rents one.

    The decode step is compiled for the topology, as it would run there, with libtpu (`pip install libtpu`); no TPU is
    needed. Memory is what the compiler says, collectives are counted in what it has made. Without libtpu, and for GPUs,
    bytes follow from shapes, exactly, and times from published peaks.

    **Exit code.** 0 if it fits, 1 if it does not (then what would is said), 2 if something was asked wrongly or the
    compiler failed.

    **Examples**

    `kvjax plan --context 1M --batch 4 --topology v5e:16x16 --mesh seq=32,model=8`

    `kvjax plan --policy "snapkv(0.1) | kivi(bits=2)" --context 1M --topology v5e:4x4 --mesh seq=2,model=8`

    `kvjax plan --model llama3.1-70b --context 1M --batch 4 --topology v5p:4x4x4 --json plan.json`

    `kvjax plan --model qwen3-32b --context 128k --topology h200:8`
    """
    with user_errors():
        import jax

        from kvjax.sharding.plan import CompileError, answer, as_dict, ask, parse_number, report

        jax.config.update("jax_platforms", "cpu")  # Nothing runs here, and libtpu would look for its TPU.
        to_stdout = str(json_file) == "-"
        if json_file is not None and not to_stdout and not json_file.parent.is_dir():
            raise ValueError(f"There is no folder {json_file.parent} to write {json_file.name} to.")
        tokens = parse_number("--context", context)
        with notes.status("Checking ..."):
            question, place = ask(model, policy, tokens, batch, topology, mesh, dtype)
    if tokens > question.config.max_length:
        notes.print(
            f"warning: {tokens:,} tokens are beyond the {question.config.max_length:,} that {model} is made for.",
            style="yellow",
            highlight=False,
            soft_wrap=True,
        )
    try:
        with notes.status(f"Compiling for {place} ..."):
            planned = answer(question, place, every_layer=every_layer, prefill=prefill, arithmetic=arithmetic)
    except CompileError as error:
        notes.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(2) from None
    text = json.dumps(as_dict(planned), indent=1)
    if to_stdout:
        print(text)
    else:
        print_wide(report(planned))
    if json_file is not None and not to_stdout:
        write_whole(json_file, text + "\n")
    raise typer.Exit(0 if planned.fits else 1)
