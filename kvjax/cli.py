"""The command line: `kvjax compare | eval | generate | bench | bench kernels | plan | methods`.

Results go to stdout, progress and remarks to stderr. What the user got wrong is one line, `error: ...`, and exit code
2, before anything is computed where it can be known before.
"""

import contextlib
import dataclasses
import enum
import json
import pathlib
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvjax.commands.common import console, notes, print_wide, user_errors
from kvjax.commands.plan import plan

if TYPE_CHECKING:
    from kvjax.evaluation import Settings, Task
    from kvjax.model import Model

MODEL = "gemma3-270m"
POLICIES = (
    "full; int8; kivi; chunkkv(0.25); chunkkv(0.25) | kivi(bits=4); keydiff(0.5); tova(0.25); streaming_llm(0.25); "
    "snapkv(0.25); random(0.25)"
)

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown"
)


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
    str, typer.Option("--model", help=f"{MODEL}, tiny, a Hugging Face or Orbax folder, a .gguf file, or a hub name.")
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
ContextOption = Annotated[int | None, typer.Option(help="Tokens of the context. Default: 2000 (needle), 2048 (ppl).")]
SamplesOption = Annotated[
    int | None, typer.Option(help="Contexts, or rows of a file. Default: 12 (needle), 4 (ppl), all rows.")
]
NeedlesOption = Annotated[int | None, typer.Option(help="Needles per context; each is asked for. Default: 1.")]
SeedOption = Annotated[int, typer.Option(help="Of everything that is drawn at random.")]
OutOption = Annotated[
    pathlib.Path | None, typer.Option(help="Folder for results. Default: one below results/ per configuration.")
]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace results instead of continuing them.")]
SpeedOption = Annotated[bool, typer.Option(help="Time decoding at the compressed size.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def main() -> None:
    """What the command `kvjax` calls."""
    app()


@app.callback()
def _about() -> None:
    """KV-cache compression in JAX: real bytes, real quality, real speed.

    Start with `kvjax compare`: ten policies on Gemma 3 270M, in a few minutes on a laptop.
    """


# compare, eval


@app.command()
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
    loaded = _load(model, dtype, [folder], mesh)
    ran = _evaluate(loaded, model, [(chosen, folder)], settings, overwrite, what_fits=sizes is not None)
    _report(ran, as_json)


def _percentages(text: str | None) -> tuple[float, ...]:
    """ "50,25" -> (0.5, 0.25)."""
    try:
        return tuple(float(part) / 100 for part in (text or "").split(",") if part.strip())
    except ValueError:
        raise ValueError(f'Cannot read the sizes {text!r}: give percentages such as "50,25,12.5".') from None


@app.command(name="eval")
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
    ran = _evaluate(_load(model, dtype, folders, mesh), model, pairs, settings, overwrite)
    _report(ran, as_json)


def _folder(
    out: pathlib.Path | None, model: str, task: "Task", settings: "Settings", dtype: Dtype | None
) -> pathlib.Path:
    """The folder of results; the default is the same for the same configuration."""
    from kvjax.evaluation import config_hash, resolved_config

    config = resolved_config(model, dtype.value if dtype else "float32", task, settings)
    return out or pathlib.Path("results") / f"{pathlib.PurePath(task.name).stem}-{config_hash(config)[:8]}"


def _load(name: str, dtype: Dtype | None, folders: list[pathlib.Path], mesh: str | None) -> "Model":
    """The model, on the mesh that the command then runs on, once it is sure that results can be written."""
    with user_errors():
        import jax

        import kvjax
        from kvjax.evaluation import make_folder

        for folder in folders:
            make_folder(folder)
        _cache_compilations()
        if mesh:
            jax.set_mesh(kvjax.sharding.make_mesh(mesh))
        with notes.status(f"Loading {name} ..."):
            return kvjax.load(name, dtype=dtype.value if dtype else None)


def _cache_compilations() -> None:
    """The next run of the same kind compiles little, unless the user has other plans for that."""
    import os

    import jax

    from kvjax.checkpoints.packaged import cache_dir

    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "jax"))


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
            with _progress(task.name) as advance:
                ran.append(_Ran(run(model, task, cases, settings, config, folder, rows, advance), folder))
        except KeyboardInterrupt:
            notes.print(f"Stopped. The same command goes on where it stopped ({folder}).", highlight=False)
            raise typer.Exit(130) from None
    return ran


@contextlib.contextmanager
def _progress(what: str) -> Iterator[Any]:
    """A progress bar on stderr; yields `advance(done, total, text)`."""
    from rich import progress

    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(),
        progress.TextColumn("{task.fields[last]}", style="dim"),
    )
    with progress.Progress(*columns, console=notes, transient=True) as bar:
        task = bar.add_task(what, total=None, last="compiling; the first sample takes longest")
        yield lambda done, total, text: bar.update(task, completed=done, total=total, last=text)


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


# generate


@app.command()
def generate(
    prompt: Annotated[str | None, typer.Argument(help='The prompt; "-" or none reads stdin.')] = None,
    file: Annotated[pathlib.Path | None, typer.Option(help="Read the prompt from a file.")] = None,
    policy: Annotated[str, typer.Option(help="See `kvjax methods`.")] = "full",
    model: ModelOption = MODEL,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", help="At most so many.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Only the k likeliest tokens; 0: all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Only the likeliest tokens that reach this probability together.")] = 1.0,
    min_p: Annotated[float, typer.Option(help="Only tokens this likely, relative to the likeliest.")] = 0.0,
    seed: SeedOption = 0,
    dtype: DtypeOption = None,
    mesh: MeshOption = None,
) -> None:
    """Continues a prompt, token by token, on a compressed cache.

    The text goes to stdout; prompt, cache bytes and speed to stderr.

    **Examples**

    `kvjax generate "The three laws of robotics are"`

    `kvjax generate --file paper.txt --policy "snapkv(512) | kivi(bits=4)" -n 200`

    `cat notes.txt | kvjax generate --policy "streaming_llm(1024)" --temperature 0.8 --top-p 0.95 --seed 1`
    """
    with user_errors():
        import jax

        import kvjax
        from kvjax.generation import prefill_logits, stream_on

        if prompt is not None and file is not None:
            raise ValueError("Give the prompt as an argument or with --file, not both.")
        chosen = kvjax.parse_policy(policy)
        sampler = kvjax.Sampler(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
        if max_new_tokens < 1:
            raise ValueError(f"--max-new-tokens must be at least 1, got {max_new_tokens}.")
        text = _prompt(prompt, file)
        if not text:
            raise ValueError("The prompt is empty: give at least one token.")
    loaded = _load(model, dtype, [], mesh)
    with user_errors():
        tokens, lengths = loaded.encode(text)
        length, config = int(lengths[0]), loaded.config
        if length + max_new_tokens > config.max_length:
            raise ValueError(
                f"A prompt of {length} tokens and {max_new_tokens} new ones exceed the model's context of "
                f"{config.max_length}."
            )
        kvjax.plan(chosen, config, length, loaded.params["embed"].dtype)
    assert loaded.tokenizer is not None
    logits, cache = prefill_logits(loaded.params, config, chosen, tokens, lengths)
    size = f"{cache.nbytes / 1e6:.2f} MB, {cache.compression:.2f}x compression against a full bfloat16 cache"
    ids = stream_on(
        loaded.params,
        config,
        cache.policy,
        cache,
        logits,
        max_new_tokens=max_new_tokens,
        sampler=sampler,
        key=jax.random.key(seed),
        stop=config.eos_ids,
    )
    count, start = 0, time.perf_counter()

    def counted() -> Iterator[int]:
        nonlocal count
        for token in ids:
            if token not in config.eos_ids:
                count += 1
                yield token

    for piece in loaded.tokenizer.stream(counted()):
        sys.stdout.write(piece)
        sys.stdout.flush()
    print()
    seconds = time.perf_counter() - start
    notes.print(
        f"{length:,} tokens of prompt · cache after them: {size} ({chosen}) · {count} new tokens in {seconds:.1f} s, "
        "compilation included",
        style="dim",
        highlight=False,
        soft_wrap=True,
    )


def _prompt(prompt: str | None, file: pathlib.Path | None) -> str:
    if file is not None:
        return file.read_text(encoding="utf-8")
    if prompt is None or prompt == "-":
        if sys.stdin.isatty():
            notes.print("Reading the prompt from the terminal; end it with Ctrl-D.", style="dim")
        return sys.stdin.read()
    return prompt


# bench

bench_app = typer.Typer(rich_markup_mode="markdown")
app.add_typer(bench_app, name="bench")


@bench_app.callback(invoke_without_command=True)
def bench(
    call: typer.Context,
    model: ModelOption = MODEL,
    policies: Annotated[str, typer.Option(help="Separated by semicolons; the full cache always runs along.")] = (
        "full; snapkv(512); streaming_llm(512); kivi(bits=4)"
    ),
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
        lengths = _numbers("--contexts", contexts)
        for name, value in (("--batch", batch), ("--tokens", tokens), ("--repeats", repeats)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
    loaded = _load(model, dtype, [], mesh)
    with user_errors():
        measured = measure(loaded, chosen, lengths, batch=batch, tokens=tokens, repeats=repeats)
    rows = []
    with _progress("bench") as advance:
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


def _numbers(option: str, text: str) -> list[int]:
    """ "512,2048" -> [512, 2048]."""
    try:
        return [int(part) for part in text.replace(",", " ").split()]
    except ValueError:
        raise ValueError(f"{option} are numbers separated by commas, got {text!r}.") from None


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
        cases = kernels.kernel_cases(names, _numbers("--contexts", contexts), _numbers("--batch", batch), **shape)
        asked: Any = implementation.value
        kernels.check_implementation(cases, asked)
    rows = []
    with _progress("kernels") as advance:
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


# plan, methods

app.command()(plan)


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(help="Show all about one method.")] = None, as_json: JsonOption = False
) -> None:
    """Lists every registered method: how it is written, when it acts, its parts and its paper.

    **Examples**

    `kvjax methods`

    `kvjax methods snapkv`

    Methods compose: `snapkv(0.25) | kivi(bits=2)` evicts, then packs what is left. A budget is tokens (`512`), a share
    that is kept (`0.25`), or bytes of the whole cache (`'24MB'`).
    """
    with user_errors():
        import kvjax
        from kvjax.policies import PolicyError, parts
        from kvjax.policies.registry import nearest

        known = kvjax.methods()
        if name is not None and name not in known:
            raise PolicyError(f"Unknown method {name!r}. {nearest(name, known)}")
    rows = [
        {
            "name": method.name,
            "signature": method.signature,
            "summary": method.summary,
            "paper": method.paper,
            "url": method.url,
            "example": str(method.typical()),
            **parts(method.typical()),
        }
        for method in known.values()
        if name in (None, method.name)
    ]
    if as_json:
        print(json.dumps(rows if name is None else rows[0], indent=1))
    elif name is None:
        _print_methods(rows)
    else:
        _print_method(rows[0], known[name].build)


def _print_methods(rows: list[dict[str, Any]]) -> None:
    from rich.table import Table

    out = Table(box=None, header_style="bold", pad_edge=False)
    for column in ("method", "acts", "parts", "paper"):
        out.add_column(column, no_wrap=column == "acts", overflow="fold")
    for row in rows:
        made_of = [row[part] for part in ("score", "reduce") if row[part] != "-"]
        made_of += [] if row["store"] == "full precision" else [row["store"]]
        name = f"[bold]{row['name']}[/]{row['signature'][len(row['name']) :]}"
        out.add_row(name, row["phase"], "; ".join(made_of), f"{row['paper']}\n[dim]{row['url']}[/]\n")
    console.print(out, highlight=False)
    hint = "`kvjax methods NAME` tells more. Policies compose: snapkv(0.25) | kivi(bits=2)"
    console.print(hint, style="dim", highlight=False)


def _print_method(row: dict[str, Any], build: Any) -> None:
    import inspect

    shown = {"paper": f"{row['paper']}, {row['url']}", "example": row["example"]}
    shown |= {part: row[part] for part in ("score", "budget", "reduce", "store", "read", "phase")}
    print(f"{row['signature']}\n\n{inspect.getdoc(build)}\n")
    print("\n".join(f"{key:8} {value}" for key, value in shown.items()))
    module = inspect.getmodule(build)
    print(f"\n{inspect.getdoc(module) or ''}")
