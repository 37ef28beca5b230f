"""`kvjax compare` and `kvjax eval`: policies on tasks."""

import dataclasses
import json
import pathlib
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvjax.commands import complete
from kvjax.commands.common import console, notes, plain_table, print_wide, user_errors
from kvjax.commands.grid import run_file
from kvjax.commands.options import (
    MODEL,
    ContextOption,
    DryRunOption,
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
    SetOption,
    SpeedOption,
    load,
    parameters,
    progress_bar,
)

if TYPE_CHECKING:
    from kvjax.evaluation import Settings, Task
    from kvjax.evaluation.cases import Case
    from kvjax.model import Model

POLICIES = (
    "full; int8; kivi; chunkkv(0.25); chunkkv(0.25) | kivi(bits=4); keydiff(0.5); tova(0.25); streaming_llm(0.25); "
    "snapkv(0.25); random(0.25)"
)


def compare(
    model: ModelOption = MODEL,
    policies: Annotated[
        str,
        typer.Option(
            help='Separated by semicolons; "all" is every method. See `kvjax methods`.',
            autocompletion=complete.policies,
        ),
    ] = POLICIES,
    sizes: Annotated[
        str | None,
        typer.Option(help='Such as "50,25": percent of the full cache\'s bytes, for policies without a budget.'),
    ] = None,
    task: Annotated[
        str, typer.Option(help="One of `kvjax tasks`, or a file of JSON lines.", autocompletion=complete.tasks)
    ] = "needle",
    protocol: ProtocolOption = Protocol.aware,
    context: ContextOption = None,
    samples: SamplesOption = None,
    needles: NeedlesOption = None,
    seed: SeedOption = 0,
    set_: SetOption = None,
    out: OutOption = None,
    overwrite: OverwriteOption = False,
    speed: SpeedOption = True,
    dtype: DtypeOption = None,
    mesh: MeshOption = None,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Compares policies on one task: one prefill feeds them all.

    Writes `results.json` (a row per sample and policy) and `pareto.png` (quality against bytes). An interrupted run
    goes on where it stopped. The full cache always runs along: it is what the others are measured against.

    **Tasks.** needle: a number hidden in Python's manual is asked for. ppl: perplexity of a text's continuation after
    the text before it was compressed. RULER's and many more: see `kvjax tasks`. A file: lines of
    `{"context": ..., "question": ..., "answers": [...]}`, or of
    `{"context_ids": [...], "question_ids": [...], "answer_ids": [...]}` for token ids.

    **Columns.** answered: greedy decoding writes the answer exactly; or the score of what it writes, where the task has
    one. NLL: of the answer, nats per token. KL, top-1: divergence from the full cache's predictions, and how often the
    likeliest token is the same, along the full cache's own continuation. cache: measured bytes. decoding: the compiled
    loop, relative to the full cache in the same run.

    **Examples**

    `kvjax compare`

    `kvjax compare --policies "snapkv(0.25); snapkv(512); snapkv(0.25) | kivi(bits=2)" --protocol agnostic`

    `kvjax compare --task ppl --policies "kivi; int4; h2o('24MB')" --context 4000`

    `kvjax compare --model tiny --context 1000 --policies all --sizes 50,25,12.5,6.25`

    `kvjax compare --model ./my-checkpoint --task my.jsonl --out results/mine`

    `kvjax compare --task longbench_qasper --set path=data/longbench --context 8000`
    """
    with user_errors():
        from kvjax.evaluation import Settings, make_task, parse_policies

        chosen_policies = parse_policies(policies, _percentages(sizes))
        settings = Settings(policies=chosen_policies, protocol=protocol.value, speed=speed)
        given = _once({"context": context, "count": samples, "needles": needles, "seed": seed}, parameters(set_))
        chosen = make_task(task, **given)
        folder = _folder(out, model, chosen, settings, dtype)
    loaded = load(model, dtype, [] if dry_run else [folder], mesh)
    prepared = _prepare(loaded, model, [(chosen, folder)], settings, overwrite, what_fits=sizes is not None)
    if dry_run:
        _print_plans(loaded, prepared, as_json)
        return
    _report(_run(loaded, prepared), as_json)


def _percentages(text: str | None) -> tuple[float, ...]:
    """ "50,25" -> (0.5, 0.25)."""
    try:
        return tuple(float(part) / 100 for part in (text or "").split(",") if part.strip())
    except ValueError:
        raise ValueError(f'Cannot read the sizes {text!r}: give percentages such as "50,25,12.5".') from None


def evaluate(
    call: typer.Context,
    policy: Annotated[
        str,
        typer.Argument(
            metavar="POLICY|GRID.yaml",
            help='Such as "snapkv(0.25) | kivi(bits=4)"; or a file.',
            autocompletion=complete.policies_or_grids,
        ),
    ],
    model: ModelOption = MODEL,
    tasks: Annotated[
        str,
        typer.Option(
            help="Tasks or groups of `kvjax tasks`, or files of JSON lines, separated by semicolons.",
            autocompletion=complete.tasks,
        ),
    ] = "needle; ppl",
    protocol: ProtocolOption = Protocol.aware,
    context: ContextOption = None,
    samples: SamplesOption = None,
    seed: SeedOption = 0,
    set_: SetOption = None,
    out: OutOption = None,
    overwrite: OverwriteOption = False,
    speed: SpeedOption = True,
    dtype: DtypeOption = None,
    mesh: MeshOption = None,
    devices: Annotated[int, typer.Option(help="Of a grid: jobs that run side by side, each on its own device.")] = 1,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Evaluates one policy on several tasks, next to the full cache; or a whole grid from a YAML file.

    Results of each task go to a folder of its own; see `kvjax compare` for what they mean. A grid (models x policies x
    sizes x tasks x lengths x protocols) makes a leaderboard and a page, `report.html`. It goes on where it stopped, and
    the same command in several terminals, or on several machines with one folder (whose file system has locks), shares
    the work.

    **Examples**

    `kvjax eval "chunkkv(0.25)"`

    `kvjax eval "snapkv(1024)" --tasks "needle; my.jsonl" --protocol agnostic`

    `kvjax eval "kivi" --tasks "ruler" --set path=data/ruler --context 8000`

    `kvjax eval configs/experiments/leaderboard_tiny.yaml`
    """
    if pathlib.PurePath(policy).suffix in (".yaml", ".yml"):
        with user_errors():
            _refuse(call, "the grid says so itself", keep=("policy", "out", "overwrite", *GRID_OPTIONS))
        path = pathlib.Path(policy)
        run_file(path, out=out, overwrite=overwrite, devices=devices, mesh=mesh, dry_run=dry_run, as_json=as_json)
        return
    with user_errors():
        if devices > 1:
            raise ValueError("--devices is for grids. --mesh spreads one policy's work over devices.")
        from kvjax.evaluation import Settings, parse_policies

        settings = Settings(policies=parse_policies(policy), protocol=protocol.value, speed=speed)
        names = [name.strip() for name in tasks.split(";") if name.strip()]
        if not names:
            raise ValueError("No tasks given: needle, ppl or files of JSON lines, separated by semicolons.")
        chosen = _tasks(names, {"context": context, "count": samples, "seed": seed}, parameters(set_))
        folders = [_folder(out and out / task.name, model, task, settings, dtype) for task in chosen]
        if len(set(folders)) < len(folders):
            raise ValueError("Two tasks have the same name, and so would their results.")
    pairs = list(zip(chosen, folders, strict=True))
    loaded = load(model, dtype, [] if dry_run else folders, mesh)
    prepared = _prepare(loaded, model, pairs, settings, overwrite)
    if dry_run:
        _print_plans(loaded, prepared, as_json)
        return
    _report(_run(loaded, prepared), as_json)


def _once(options: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """Parameters of a task from options of their own and from --set."""
    if twice := [name for name in given if options.get(name) is not None and name != "seed"]:
        raise ValueError(f"{twice[0]} is given twice, by an option of its own and by --set.")
    return options | given


def _tasks(names: list[str], options: dict[str, Any], given: dict[str, Any]) -> "list[Task]":
    """Of names, groups and files; what --set says goes to all that have such a parameter."""
    from kvjax.evaluation.tasks import TASKS, groups, make_tasks

    options, found, heard = _once(options, given), [], set()
    for name in names:
        members = groups().get(name, (name,)) if name not in TASKS else (name,)
        known = {key for member in members if member in TASKS for key in TASKS[member].parameters}
        fitting = {key: value for key, value in options.items() if key in known or key in ("count", "seed")}
        heard |= set(fitting)
        found += make_tasks(name, **fitting)
    if deaf := [name for name in given if name not in heard]:
        raise ValueError(f"--set {deaf[0]}: none of {', '.join(names)} has such a parameter; see `kvjax tasks NAME`.")
    return found


GRID_OPTIONS = ("mesh", "devices", "dry_run", "as_json")


def _refuse(call: typer.Context, why: str, keep: tuple[str, ...]) -> None:
    """Options that would be ignored are errors."""
    for name in call.params:
        if name not in keep and getattr(call.get_parameter_source(name), "name", "") == "COMMANDLINE":
            raise ValueError(f"--{name.replace('_', '-')} does not go with a grid: {why}.")


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


@dataclasses.dataclass(frozen=True)
class _Prepared:
    """A task that can be run."""

    task: "Task"
    folder: pathlib.Path
    settings: "Settings"
    config: dict[str, Any]
    cases: "list[Case]"
    rows: list[dict[str, Any]]


def _prepare(
    model: "Model",
    name: str,
    tasks: "list[tuple[Task, pathlib.Path]]",
    settings: "Settings",
    overwrite: bool,
    what_fits: bool = False,
) -> list[_Prepared]:
    """Checks all tasks before the first is run; with `what_fits`, policies that cannot serve the model or be so small
    are left out, and named."""
    from kvjax.evaluation import check, make_cases, read_rows, resolved_config, servable

    prepared = []
    with user_errors():
        for task, folder in tasks:
            cases, asked = make_cases(task, task.samples(model), settings), settings
            if what_fits:
                fit, reasons = servable(model, cases, settings.policies)
                asked = dataclasses.replace(settings, policies=fit)
                for reason in reasons.values():
                    notes.print(f"Left out: {reason}", style="dim", markup=False, highlight=False)
            config = resolved_config(name, model.params["embed"].dtype, task, asked)
            check(model, cases, asked)
            prepared.append(_Prepared(task, folder, asked, config, cases, read_rows(folder, config, overwrite)))
    return prepared


def _run(model: "Model", prepared: list[_Prepared]) -> list[_Ran]:
    from kvjax.evaluation import run

    ran = []
    for one in prepared:
        if one.rows:
            notes.print(f"Going on with {one.folder}: {len(one.rows)} rows are there.", highlight=False)
        try:
            with progress_bar(one.task.name) as advance:
                rows = run(model, one.task, one.cases, one.settings, one.config, one.folder, one.rows, advance)
                ran.append(_Ran(rows, one.folder))
        except KeyboardInterrupt:
            notes.print(f"Stopped. The same command goes on where it stopped ({one.folder}).", highlight=False)
            raise typer.Exit(130) from None
    return ran


def _print_plans(model: "Model", prepared: list[_Prepared], as_json: bool) -> None:
    """What would be run, and how large every cache would be; nothing is computed."""
    from kvjax.evaluation.caches import sizes
    from kvjax.evaluation.report import megabytes
    from kvjax.policies import plan

    dtype, printed = model.params["embed"].dtype, []
    for one in prepared:
        length = max(len(case.prompt) for case in one.cases)
        plans = {str(policy): plan(policy, model.config, length, dtype) for policy in one.settings.policies}
        nbytes = {name: sizes([planned], model.config, dtype)[0] for name, planned in plans.items()}
        about = {"task": one.task.name, "folder": str(one.folder), "prompt_tokens": length, "nbytes": nbytes}
        total = len(one.cases) * len(plans)
        left = total - len(one.rows)
        printed.append(about | {"rows": total, "rows_left": left})
        if as_json:
            continue
        heading = f"{one.task.name}: {len(one.cases)} questions, at most {length:,} tokens to compress"
        out = plain_table(heading, "policy", "cache", "smaller")
        full = next(iter(nbytes.values()))
        for name, size in nbytes.items():
            out.add_row(name, megabytes(size), f"{full / size:.2f}x")
        print_wide(out)
        left_text = f"{left:,} of {total:,} rows are left to run in {one.folder}. Nothing was run."
        console.print(f"\n{left_text}\n", highlight=False, soft_wrap=True)
    if as_json:
        print(json.dumps(printed, indent=1))


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
