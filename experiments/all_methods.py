"""What does every method keep of the house model's memory, at the same bytes? And does each paper's own ordering hold?

    python experiments/all_methods.py --out docs/measured/all_methods

One number of seven digits among four hidden in 1,000 tokens of Python's manual, kvjax-tiny in float32, every method at
a half, a quarter, an eighth and a sixteenth of the full cache's bytes; methods that only store come with the parameters
below, at the size they have, and methods that only read at that part of the tokens. One prefill feeds all policies; an
interrupted run goes on where it stopped. Writes, per protocol, `results.json` (a row per sample and policy) and
`pareto.png`, and one `table.md`: methods by size, and the orderings of the papers. About 25 minutes on two CPU cores.
The same for a few policies: `kvjax compare --model tiny --context 1000 --needles 4 --policies "cake;
snapkv" --sizes 50,25,12.5,6.25`.

Measured (docs/measured/all_methods/table.md; `--samples 2 --questions 4 --protocols aware`, under an hour), answered of
four questions at a quarter of the bytes:

    keydiff, expected_attention, quest, tidaldecode    4/4
    adakv, locret                                      3/4
    chunkkv, cake                                      2/4
    snapkv, pyramidkv, streaming_llm, window           1/4
    h2o, tova, knorm, d2o, random                      0/4
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

import kvjax
from kvjax.evaluation import (
    Settings,
    answered,
    make_cases,
    make_folder,
    make_task,
    parse_policies,
    plot,
    read_rows,
    resolved_config,
    run,
    servable,
    summarize,
)

MODEL, CONTEXT, NEEDLES = "tiny", 1000, 4
GROUP = 26  # Policies that are compiled at a time.
SIZES = (0.5, 0.25, 0.125, 0.0625)
# Methods whose size is in their parameters, and compositions across kinds.
SIZED = (
    "int8; fp8; int4; int2; kivi(bits=4, residual=32); kivi(bits=2, residual=32)",
    "gear(bits=4); gear(bits=2)",
    "think(0.4); think(0.6)",
    "minicache; minicache | int8; minicache | int4",
    "duo_attention(gates='tiny', retrieval=0.5, sinks=4, recent=60)",
    "duo_attention(gates='tiny', retrieval=0.25, sinks=4, recent=28)",
    "mikv(important=0.2, bits=4, group=32); mikv(important=0.1, bits=2, group=32)",
    "shadowkv(sparse=128, rank=64, outliers=8)",
)
SWEPT = (
    "random; window; streaming_llm; h2o; tova; knorm; keydiff; snapkv; pyramidkv; expected_attention; chunkkv",
    "cake; adakv; d2o; locret(stabilizers=0.4, local=16, chunk=256)",
    "quest; tidaldecode(correction=4)",
    "adakv | kivi(bits=4, residual=32); cake | think(0.4); snapkv | int8; snapkv | think(0.4)",
)
# (better, not better, where the papers say so). Policies of the sweep are compared at every size that both have.
ORDERINGS = (
    ("cake", "snapkv", "CAKE, table 1: above SnapKV, most at small budgets"),
    ("cake", "pyramidkv", "CAKE, table 1: above PyramidKV"),
    ("adakv", "snapkv", "Ada-KV, table 2: Ada-SnapKV above SnapKV"),
    ("d2o", "h2o", "D2O, table 1: above H2O"),
    ("d2o", "streaming_llm", "D2O, table 1: above StreamingLLM"),
    ("locret(stabilizers=0.4, local=16, chunk=256)", "snapkv", "Locret, table 2: above SnapKV"),
    ("tidaldecode(correction=4)", "quest", "TidalDecode, table 1: above Quest at equal tokens read"),
    ("snapkv | think(0.4)", "snapkv", "ThinK, table 1: at equal bytes not below SnapKV"),
    ("gear(bits=2)", "kivi(bits=2, residual=32)", "GEAR, table 1: above KIVI at 2 bits"),
    ("kivi(bits=2, residual=32)", "int2", "KIVI, table 1: above plain rounding at 2 bits"),
)


def labelled(text: str) -> dict[str, str]:
    """Label of a policy in the results -> how it is written in this file, for every policy and size."""
    parts = [part.strip() for part in text.split(";")]
    return {str(policy): part for part in parts for policy in parse_policies(part, SIZES) if str(policy) != "full"}


def grouped(summaries: Sequence[dict[str, Any]], names: dict[str, str]) -> dict[str, dict[float, dict[str, Any]]]:
    """name -> nominal size (or measured, in thousandths) -> summary."""
    full, out = summaries[0]["nbytes"], {}
    for row in summaries[1:]:
        name = names[row["policy"]]
        size = next((size for size in SIZES if f"'{100 * size:g}%B'" in row["policy"]), round(row["nbytes"] / full, 3))
        if "%B" not in row["policy"] and name in ("quest", "tidaldecode(correction=4)"):  # Sized by what is read.
            size = next(size for size in SIZES if f"({size!r}" in row["policy"])
        out.setdefault(name, {})[size] = {**row, "part": row["nbytes"] / full}
    return out


def cell(row: dict[str, Any] | None) -> str:
    return "" if row is None else f"{answered(row)} ({row['nll']:.2f})"


def table(found: dict[str, dict[str, dict[float, dict[str, Any]]]], full: dict[str, dict[str, Any]]) -> str:
    """Markdown: answered (NLL of the answer, nats per token) by method and size, then by fixed size, then orderings."""
    lines = ["Answered (NLL of the answer in nats per token); bytes are measured, of the whole cache.\n"]
    for protocol, methods in found.items():
        swept = {name: rows for name, rows in methods.items() if set(rows) <= set(SIZES)}
        fixed = {name: rows for name, rows in methods.items() if name not in swept}
        lines += [f"\n## Question-{protocol}\n\nThe full cache: {cell(full[protocol])}.\n\n"]
        lines += ["| method | " + " | ".join(f"{100 * size:g} %" for size in SIZES) + " |\n", "|---" * 5 + "|\n"]
        lines += [
            f"| {name.replace('|', chr(92) + '|')} | " + " | ".join(cell(rows.get(size)) for size in SIZES) + " |\n"
            for name, rows in swept.items()
        ]
        lines += ["\n| method | bytes | answered (NLL) | KL to full |\n|---|---|---|---|\n"]
        ordered = sorted(
            ((row["part"], name, row) for name, rows in fixed.items() for row in rows.values()), key=lambda x: x[:2]
        )
        lines += [
            f"| {name.replace('|', chr(92) + '|')} | {100 * part:.1f} % | {cell(row)} | {row['kl']:.3f} |\n"
            for part, name, row in ordered
        ]
    lines += ["\n## Orderings that the papers state\n\nLower NLL is better.\n\n"]
    lines += ["| claim | " + " | ".join(f"{p}, {100 * s:g} %" for p in found for s in SIZES) + " |\n"]
    lines += ["|---" * (1 + len(found) * len(SIZES)) + "|\n"]
    for better, worse, source in ORDERINGS:
        verdicts = []
        for methods in found.values():
            a, b = methods.get(better, {}), methods.get(worse, {})
            single = [next(iter(rows.values())) for rows in (a, b) if rows and not set(rows) <= set(SIZES)]
            for i, size in enumerate(SIZES):
                pair = (a.get(size), b.get(size)) if len(single) < 2 else (tuple(single) if i == 0 else (None, None))
                if None in pair:
                    verdicts.append("")
                    continue
                x, y = pair[0]["nll"], pair[1]["nll"]  # type: ignore[index]
                verdicts.append(f"{'yes' if x <= y + 0.005 else 'no'} {x:.2f} / {y:.2f}")
        lines.append(f"| {source} | " + " | ".join(verdicts) + " |\n")
    return "".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/all_methods"))
    parser.add_argument("--samples", type=int, default=3, help="contexts; each of their four needles is asked for")
    parser.add_argument("--questions", type=int, default=None, help="only the first so many; default: all")
    parser.add_argument("--protocols", default="aware,agnostic")
    args = parser.parse_args()
    text = "; ".join((*SIZED, *SWEPT))
    names = labelled(text)
    task = make_task("needle", context=CONTEXT, count=args.samples, needles=NEEDLES, seed=0)
    model = kvjax.load(MODEL)
    found, full = {}, {}
    for protocol in args.protocols.split(","):
        settings, folder = (
            Settings(policies=parse_policies(text, SIZES), protocol=protocol, speed=False),
            args.out / protocol,
        )
        make_folder(folder)
        cases = make_cases(task, task.samples(model), settings)[: args.questions]
        asked = {case.sample.id for case in cases}
        policies, reasons = servable(model, cases, settings.policies)
        for reason in reasons.values():
            print(f"Left out: {reason}")
        rows: list[dict[str, Any]] = []
        for number in range(1, len(policies), GROUP):  # The full cache comes first in every group.
            some = Settings(policies=policies[:1] + policies[number : number + GROUP], protocol=protocol, speed=False)
            config = resolved_config(MODEL, model.params["embed"].dtype, task, some)
            part = folder / f"policies-{number}"
            make_folder(part)
            say = lambda done, total, what, number=number: print(f"\r{number}: {done}/{total} {what:50}", end="")  # noqa: E731
            found_rows = run(model, task, cases, some, config, part, read_rows(part, config, overwrite=False), say)
            found_rows = [row for row in found_rows if row["sample"] in asked]
            rows += [row for row in found_rows if number == 1 or row["policy"] != "full"]
            jax.clear_caches()  # A process can hold some hundred compiled policies, not more.
        summaries = summarize(rows)
        plot(summaries, folder / "pareto.png", f"kvjax-tiny, needles among four, question-{protocol}")
        found[protocol], full[protocol] = grouped(summaries, names), summaries[0]
    written = table(found, full)
    (args.out / "table.md").write_text(written)
    print("\n" + written)


if __name__ == "__main__":
    main()
