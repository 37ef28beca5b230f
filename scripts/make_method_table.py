"""Writes docs/methods.md, the table of all methods, from the registry: python scripts/make_method_table.py"""

import inspect
from pathlib import Path

import kvjax
from kvjax import convert
from kvjax.policies import parts

PAGE = Path(__file__).parents[1] / "docs" / "methods.md"
HEAD = """# Methods

Made from the registry by `scripts/make_method_table.py`. `kvjax methods NAME` shows a method's parameters.

| policy | what it does | parts | acts | source |
|---|---|---|---|---|
"""
CONVERSIONS = """
Methods that change the model instead of its cache are functions of parameters and config:

| conversion | what it does | source |
|---|---|---|
"""


def table() -> str:
    """The page: one row per registered method."""
    rows = []
    for method in kvjax.methods().values():
        what = parts(method.typical())
        shown = ("score", "reduce", "store", "read")
        made_of = "; ".join(f"{name}: {what[name]}" for name in shown if what[name] not in ("-", "all"))
        cells = [
            f"`{method.signature}`",
            method.summary,
            made_of or "-",
            what["phase"],
            f"[{method.paper}]({method.url})",
        ]
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n")
    return HEAD + "".join(rows) + CONVERSIONS + "".join(conversion(name) for name in convert.__all__)


def conversion(name: str) -> str:
    """A row per function from a model to a model; its module says where it comes from."""
    function = getattr(convert, name)
    title = (inspect.getdoc(inspect.getmodule(function)) or "").split("\n\n")[0].replace("\n", " ")
    summary = (inspect.getdoc(function) or "").split("\n\n")[0].replace("\n", " ")
    return f"| `kvjax.convert.{name}` | {summary} | {title} |\n"


if __name__ == "__main__":
    PAGE.write_text(table())
