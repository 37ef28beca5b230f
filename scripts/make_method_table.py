"""Writes docs/methods.md, the table of all methods, from the registry: python scripts/make_method_table.py"""

from pathlib import Path

import kvjax
from kvjax.policies import parts

PAGE = Path(__file__).parents[1] / "docs" / "methods.md"
HEAD = """# Methods

Made from the registry by `scripts/make_method_table.py`. `kvjax methods NAME` shows a method's parameters.

| policy | what it does | parts | acts | source |
|---|---|---|---|---|
"""


def table() -> str:
    """The page: one row per registered method."""
    rows = []
    for method in kvjax.methods().values():
        what = parts(method.typical())
        made_of = "; ".join(f"{name}: {what[name]}" for name in ("score", "reduce", "store") if what[name] != "-")
        cells = [
            f"`{method.signature}`",
            method.summary,
            made_of or "-",
            what["phase"],
            f"[{method.paper}]({method.url})",
        ]
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n")
    return HEAD + "".join(rows)


if __name__ == "__main__":
    PAGE.write_text(table())
