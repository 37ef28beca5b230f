"""`kvjax methods`: what there is, and what it is made of."""

import json
from typing import Annotated, Any

import typer

from kvjax.commands import complete
from kvjax.commands.common import console, user_errors
from kvjax.commands.options import JsonOption


def methods(
    name: Annotated[
        str | None, typer.Argument(help="Show all about one method.", autocompletion=complete.method)
    ] = None,
    as_json: JsonOption = False,
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
