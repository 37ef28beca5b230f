"""`kvjax compare` and `kvjax eval`: policies on tasks."""

import dataclasses
import json
import pathlib
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvjax.commands.common import console, notes, print_wide, user_errors
from kvjax.commands.options import (
    MODEL,
    ContextOption,
    Dtype,
    DtypeOption,
    JsonOption,
    MeshOption,
    ModelOption,
    NeedlesOption,
    OutOption,
    OverwriteOption,
    Protocol,
    ProtocolOption,
    SamplesOption,
    SeedOption,
    SpeedOption,
    load,
    progress_bar,
)

if TYPE_CHECKING:
    from kvjax.evaluation import Settings, Task
    from kvjax.model import Model

POLICIES = (
    "full; int8; kivi; chunkkv(0.25); chunkkv(0.25) | kivi(bits=4); keydiff(0.5); tova(0.25); streaming_llm(0.25); "
    "snapkv(0.25); random(0.25)"
)


def compare(
    model: ModelOption = MODEL,
    policies: Annotated[
        str, typer.Option(help='Separated by semicolons; "all" is every method. See `kvjax methods`.')
    ] = POLICIES,
    sizes: Annotated[
        str | None,
        typer.Option(help='Such as "50,25": percent of the full cache\'s bytes, for policies without a budget.'),
    ] = None,
    task: Annotated[str, typer.Option(help="needle, ppl, or a file of JSON lines.")] = "needle",
    protocol: ProtocolOption = Protocol.aware,
    context: ContextOption = None,
    samples: SamplesOption = None,
    needles: NeedlesOption = None,
    seed: SeedOption = 0,
    out: OutOption = None,
    overwrite: OverwriteOption = False,
    speed: SpeedOption = True,
    dtype: DtypeOption = None,
    mesh: MeshOption = None,
    as_json: JsonOption = False,
) -> None:
    """Compares policies on one task: one prefill feeds them all.

    Writes `results.json` (a row per sample and policy) and `pareto.png` (quality against bytes). An interrupted run
    goes on where it stopped. The full cache always runs along: it is what the others are measured against.

    **Tasks.** needle: a number hidden in Python's manual is asked for. ppl: perplexity of a text's continuation after
    the text before it was compressed. A file: lines of `{"context": ..., "question": ..., "answers": [...]}`, or of
    `{"context_ids": [...], "question_ids": [...], "answer_ids": [...]}` for token ids.

    **Columns.** answered: greedy decoding writes the answer exactly. NLL: of the answer, nats per token. KL, top-1:
    divergence from the full cache's predictions, and how often the likeliest token is the same, along the full cache's
    own continuation. cache: measured bytes. decoding: the compiled loop, relative to the full cache in the same run.

    **Examples**

    `kvjax compare`

    `kvjax compare --policies "snapkv(0.25); snapkv(512); snapkv(0.25) | kivi(bits=2)" --protocol agnostic`

    `kvjax compare --task ppl --policies "kivi; int4; h2o('24MB')" --context 4000`

    `kvjax compare --model tiny --context 1000 --policies all --sizes 50,25,12.5,6.25`

    `kvjax compare --model ./my-checkpoint --task my.jsonl --out results/mine`
    """
    with user_errors():
        from kvjax.evaluation import Settings, make_task, parse_policies

        chosen_policies = parse_policies(policies, _percentages(sizes))
        settings = Settings(policies=chosen_policies, protocol=protocol.value, speed=speed)
        chosen = make_task(task, context=context, count=samples, needles=needles, seed=seed)
        folder = _folder(out, model, chosen, settings, dtype)
    loaded = load(model, dtype, [folder], mesh)
    ran = _evaluate(loaded, model, [(chosen, folder)], settings, overwrite, what_fits=sizes is not None)
    _report(ran, as_json)


def _percentages(text: str | None) -> tuple[float, ...]:
    """ "50,25" -> (0.5, 0.25)."""
    try:
        return tuple(float(part) / 100 for part in (text or "").split(",") if part.strip())
    except ValueError:
        raise ValueError(f'Cannot read the sizes {text!r}: give percentages such as "50,25,12.5".') from None


def evaluate(
    policy: Annotated[str, typer.Argument(help='Such as "snapkv(0.25) | kivi(bits=4)".')],
    model: ModelOption = MODEL,
    tasks: Annotated[
        str, typer.Option(help="Separated by semicolons: needle, ppl, files of JSON lines.")
    ] = "needle; ppl",
    protocol: ProtocolOption = Protocol.aware,
    context: ContextOption = None,
    samples: SamplesOption = None,
    seed: SeedOption = 0,
    out: OutOption = None,
    overwrite: OverwriteOption = False,
    speed: SpeedOption = True,
    dtype: DtypeOption = None,
    mesh: MeshOption = None,
    as_json: JsonOption = False,
) -> None:
    """Evaluates one policy on several tasks, next to the full cache.

    Results of each task go to a folder of its own; see `kvjax compare` for what they mean.

    **Examples**

    `kvjax eval "chunkkv(0.25)"`

    `kvjax eval "snapkv(1024)" --tasks "needle; my.jsonl" --protocol agnostic`
    """
    with user_errors():
        from kvjax.evaluation import Settings, make_task, parse_policies

        settings = Settings(policies=parse_policies(policy), protocol=protocol.value, speed=speed)
        names = [name.strip() for name in tasks.split(";") if name.strip()]
        if not names:
            raise ValueError("No tasks given: needle, ppl or files of JSON lines, separated by semicolons.")
        chosen = [
            make_task(name, context=context if name in ("needle", "ppl") else None, count=samples, seed=seed)
            for name in names
        ]
        folders = [_folder(out and out / task.name, model, task, settings, dtype) for task in chosen]
        if len(set(folders)) < len(folders):
            raise ValueError("Two tasks have the same name, and so would their results.")
    pairs = list(zip(chosen, folders, strict=True))
    ran = _evaluate(load(model, dtype, folders, mesh), model, pairs, settings, overwrite)
    _report(ran, as_json)


def _folder(
    out: pathlib.Path | None, model: str, task: "Task", settings: "Settings", dtype: Dtype | None
) -> pathlib.Path:
    """The folder of results; the default is the same for the same configuration."""
    from kvjax.evaluation import config_hash, resolved_config

    config = resolved_config(model, dtype.value if dtype else "float32", task, settings)
    return out or pathlib.Path("results") / f"{pathlib.PurePath(task.name).stem}-{config_hash(config)[:8]}"


@dataclasses.dataclass(frozen=True)
class _Ran:
    """What one task gave, and where it lies."""

    rows: list[dict[str, Any]]
    folder: pathlib.Path


def _evaluate(
    model: "Model",
    name: str,
    tasks: "list[tuple[Task, pathlib.Path]]",
    settings: "Settings",
    overwrite: bool,
    what_fits: bool = False,
) -> list[_Ran]:
    """Runs tasks; with `what_fits`, policies that cannot serve the model or be so small are left out, and named."""
    from kvjax.evaluation import check, make_cases, read_rows, resolved_config, run, servable

    with user_errors():  # All tasks are checked before the first is run.
        prepared = []
        for task, folder in tasks:
            cases = make_cases(task, task.samples(model), settings)
            if what_fits:
                fit, reasons = servable(model, cases, settings.policies)
                settings = dataclasses.replace(settings, policies=fit)
                for reason in reasons.values():
                    notes.print(f"Left out: {reason}", style="dim", markup=False, highlight=False)
            config = resolved_config(name, model.params["embed"].dtype, task, settings)
            check(model, cases, settings)
            prepared.append((task, folder, config, cases, read_rows(folder, config, overwrite)))
    ran = []
    for task, folder, config, cases, rows in prepared:
        if rows:
            notes.print(f"Going on with {folder}: {len(rows)} rows are there.", highlight=False)
        try:
            with progress_bar(task.name) as advance:
                ran.append(_Ran(run(model, task, cases, settings, config, folder, rows, advance), folder))
        except KeyboardInterrupt:
            notes.print(f"Stopped. The same command goes on where it stopped ({folder}).", highlight=False)
            raise typer.Exit(130) from None
    return ran


def _report(ran: list[_Ran], as_json: bool) -> None:
    from kvjax.evaluation import plot, summarize, table, title

    printed = []
    for result in ran:
        summaries, heading = summarize(result.rows), title(result.rows)
        picture, file = result.folder / "pareto.png", result.folder / "results.json"
        plot(summaries, picture, heading)
        printed.append({"title": heading, "summary": summaries, "results": str(file), "plot": str(picture)})
        if not as_json:
            print_wide(table(summaries, heading))
            console.print(f"\n{file}   {picture}\n", style="dim", highlight=False, soft_wrap=True)
    if as_json:
        print(json.dumps(printed[0] if len(printed) == 1 else printed, indent=1))
