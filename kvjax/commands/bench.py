"""`kvjax bench` and `kvjax bench kernels`: how fast it really is."""

import json
import pathlib
from typing import Annotated, Any

import typer

from kvjax.commands import complete
from kvjax.commands.common import console, print_wide, user_errors
from kvjax.commands.options import (
    MODEL,
    DtypeOption,
    Implementation,
    JsonOption,
    MeshOption,
    ModelOption,
    load,
    numbers,
    progress_bar,
)

bench_app = typer.Typer(rich_markup_mode="markdown")


@bench_app.callback(invoke_without_command=True)
def bench(
    call: typer.Context,
    model: ModelOption = MODEL,
    policies: Annotated[
        str,
        typer.Option(
            help="Separated by semicolons; the full cache always runs along.", autocompletion=complete.policies
        ),
    ] = "full; snapkv(512); streaming_llm(512); kivi(bits=4)",
    contexts: Annotated[str, typer.Option(help="Lengths of prompts in tokens, separated by commas.")] = "512,2048,4096",
    batch: Annotated[int, typer.Option(help="Sequences at once.")] = 1,
    tokens: Annotated[int, typer.Option(help="Tokens decoded per measurement.")] = 32,
    repeats: Annotated[int, typer.Option(help="The fastest of so many counts.")] = 3,
    dtype: DtypeOption = None,
    mesh: MeshOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measures prefill time, decoding speed and cache bytes, warm, on random tokens.

    Ratios are to the full cache at the same context in the same run: above 1 is faster, or smaller.

    **Examples**

    `kvjax bench`

    `kvjax bench --policies "snapkv(256); snapkv(256) | kivi" --contexts 2048,8192 --batch 8`

    `kvjax bench kernels` measures attention over stored tokens alone, without a model.
    """
    if call.invoked_subcommand:
        _refuse_options(call)
        return
    with user_errors():
        from kvjax.evaluation import bench as measure, bench_table, parse_policies

        chosen = parse_policies(policies)
        lengths = numbers("--contexts", contexts)
        for name, value in (("--batch", batch), ("--tokens", tokens), ("--repeats", repeats)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
    loaded = load(model, dtype, [], mesh)
    with user_errors():
        measured = measure(loaded, chosen, lengths, batch=batch, tokens=tokens, repeats=repeats)
    rows = []
    with progress_bar("bench") as advance:
        total = len(lengths) * len(chosen)
        for row in measured:
            rows.append(row)
            advance(len(rows), total, f"{row['policy']} at {row['context']:,}")
    if as_json:
        print(json.dumps(rows, indent=1))
    else:
        heading = f"{pathlib.PurePath(model).name} ({loaded.params['embed'].dtype}) · batch {batch}"
        print_wide(bench_table(rows, heading))


def _refuse_options(call: typer.Context) -> None:
    """Options of a command that stand before the name of its subcommand would be ignored."""
    given = [name for name in call.params if getattr(call.get_parameter_source(name), "name", "") == "COMMANDLINE"]
    with user_errors():
        if given:
            name = given[0].removeprefix("as_").replace("_", "-")
            raise ValueError(f"--{name} belongs to `kvjax bench`; options of {call.invoked_subcommand} come after it.")


@bench_app.command(name="kernels")
def bench_kernels(
    kinds: Annotated[str, typer.Option(help="Kinds of store, separated by commas. Default: all.")] = "",
    contexts: Annotated[str, typer.Option(help="Stored tokens. Default: what suits the machine.")] = "",
    batch: Annotated[str, typer.Option(help="Sequences at once; several are separated by commas.")] = "",
    dim: Annotated[int, typer.Option(help="Channels of a head: 64, 128, 256.")] = 128,
    heads: Annotated[int, typer.Option(help="KV heads.")] = 8,
    group: Annotated[int, typer.Option(help="Query heads for each KV head.")] = 4,
    implementation: Annotated[
        Implementation, typer.Option(help="Of the attention. auto: the one for this machine that can serve each case.")
    ] = Implementation.auto,
    json_file: Annotated[
        pathlib.Path | None, typer.Option("--json", metavar="FILE", help='Write rows as JSON; "-": to stdout.')
    ] = None,
) -> None:
    """Measures decode attention over every kind of store, in a minute or two, on random content.

    The default shape is that of Llama 3.1 8B. A step has to read every stored byte once, so **of copy** compares bytes
    read per second with what a plain copy moves in this run; a star marks stores that may fit the chip's cache, where
    that says nothing. **vs dense** is the time of plain attention over keys and values in full precision (float32 on
    CPUs, bfloat16 elsewhere) by the kernel's, **vs bf16** that of the same kernel over a bfloat16 store: above 1 is
    faster.

    **Examples**

    `kvjax bench kernels`

    `kvjax bench kernels --kinds int8,kivi2 --contexts 4096,65536 --batch 1,8 --json rows.json`
    """
    with user_errors():
        import jax

        from kvjax.evaluation import kernels
        from kvjax.kernels import choose

        names = [part.strip() for part in kinds.split(",") if part.strip()] or list(kernels.KINDS)
        shape = {"dim": dim, "heads": heads, "group": group}
        cases = kernels.kernel_cases(names, numbers("--contexts", contexts), numbers("--batch", batch), **shape)
        asked: Any = implementation.value
        kernels.check_implementation(cases, asked)
    rows = []
    with progress_bar("kernels") as advance:
        bandwidth = kernels.copy_bandwidth()
        for row in kernels.bench_kernels(cases, asked, bandwidth=bandwidth):
            rows.append(row)
            advance(len(rows), len(cases), f"{row['kind']} at {row['context']:,}")
    device = choose.device_kind()
    text = json.dumps({"device": device, "jax": jax.__version__, "copy_bytes_per_s": bandwidth, "rows": rows}, indent=1)
    if str(json_file) == "-":
        print(text)
        return
    if json_file is not None:
        json_file.write_text(text + "\n")
    heading = (
        f"{device} · a copy moves {bandwidth / 1e9:.1f} GB/s · {heads} KV heads, {group} queries each, {dim} channels"
    )
    print_wide(kernels.kernel_table(rows, heading))
    for reason in kernels.reasons(rows):
        console.print(reason, style="dim", markup=False, highlight=False, soft_wrap=True)
