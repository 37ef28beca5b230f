"""Writes docs/methods.md, all methods of the registry with what was measured: python scripts/make_method_table.py"""

import inspect
import json
import statistics
from pathlib import Path
from typing import Any

import kvjax
from kvjax import convert
from kvjax.policies import parts
from kvjax.policies.registry import without_budget

DOCS = Path(__file__).parents[1] / "docs"
PAGE, MEASURED = DOCS / "methods.md", DOCS / "measured" / "all_methods" / "aware"
BUDGETS = (None, "25%B", "0.25")
HEAD = """# Methods

Made by `scripts/make_method_table.py` from the registry and from [what was measured](measured/all_methods/table.md).
`kvjax methods NAME` shows a method's parameters.

**Measured**: bytes of the whole cache as a part of the full one's, needles that are answered, and in brackets the
negative log-likelihood of the answer (nats per token; the full cache's is {full}). kvjax-tiny, one context of 1,000
tokens, {count} questions of which each is known while the context is compressed, jax {jax} on a {device}. Methods with
a budget have a quarter of the bytes, those that read sparsely read a quarter of the tokens, the rest is as the
parameters say. So few questions tell methods apart that lose almost nothing or almost all; the
[leaderboards](measured/leaderboards/README.md) ask more.

| policy | what it does | measured | parts | acts | source |
|---|---|---|---|---|---|
"""
CONVERSIONS = """
Methods that change the model instead of its cache are functions of parameters and config:

| conversion | what it does | source |
|---|---|---|
"""


def table() -> str:
    """The page: one row per registered method."""
    rows, recorded = [], measured_rows()
    about = {"jax": recorded[0]["versions"]["jax"], "device": recorded[0]["device"].upper()}
    full = [row for row in recorded if row["policy"] == "full"]
    count = len({row["sample"] for row in full})
    head = HEAD.format(full=f"{mean(full, 'nll'):.2f}", count=count, **about)
    for method in kvjax.methods().values():
        what = parts(method.typical())
        shown = ("score", "reduce", "store", "read")
        made_of = "; ".join(f"{name}: {what[name]}" for name in shown if what[name] not in ("-", "all"))
        cells = [
            f"`{method.signature}`",
            method.summary,
            measured(method.name, recorded) or "-",
            made_of or "-",
            what["phase"],
            f"[{method.paper}]({method.url})",
        ]
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n")
    return head + "".join(rows) + CONVERSIONS + "".join(conversion(name) for name in convert.__all__)


def measured_rows() -> list[dict[str, Any]]:
    """Of the questions that all policies were asked."""
    runs = [json.loads(path.read_text()) for path in sorted(MEASURED.glob("*/results.json"))]
    asked = set.intersection(*({row["sample"] for row in rows} for rows in runs))
    return [row for rows in runs for row in rows if row["sample"] in asked]


def measured(name: str, recorded: list[dict[str, Any]]) -> str:
    """What the method did by itself, as it was given: a line for each choice of parameters."""
    full = mean([row for row in recorded if row["policy"] == "full"], "nbytes")
    lines = []
    for policy in dict.fromkeys(row["policy"] for row in recorded):
        without, budget = without_budget(policy)
        if without.partition("(")[0] != name or "|" in policy or budget not in BUDGETS:
            continue
        rows = [row for row in recorded if row["policy"] == policy]
        right = {row["sample"] for row in rows if row["correct"]}
        of = len({row["sample"] for row in rows})
        size, nll = mean(rows, "nbytes") / full, mean(rows, "nll")
        shown = "" if policy in (name, "full") or budget and without == name else f"`{policy}`: "
        lines.append(f"{shown}{100 * size:.1f} %, {len(right)}/{of} ({nll:.2f})")
    return "<br>".join(lines)


def mean(rows: list[dict[str, Any]], key: str) -> float:
    return statistics.fmean(row[key] for row in rows)


def conversion(name: str) -> str:
    """A row per function from a model to a model; its module says where it comes from."""
    function = getattr(convert, name)
    title = (inspect.getdoc(inspect.getmodule(function)) or "").split("\n\n")[0].replace("\n", " ")
    summary = (inspect.getdoc(function) or "").split("\n\n")[0].replace("\n", " ")
    return f"| `kvjax.convert.{name}` | {summary} | {title} |\n"


if __name__ == "__main__":
    PAGE.write_text(table())
