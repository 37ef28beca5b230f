"""Puts the page together: one file that asks for nothing else, whatever the data say."""

import html
import json
import re
from collections.abc import Mapping
from importlib import resources
from typing import Any

SCRIPTS = ("core", "export", "board", "scatter", "heat", "maps", "drift", "kept", "main")  # In this order.


def make_page(data: Mapping[str, Any]) -> str:
    """The HTML of a page.

    Args:
      data: Of `page_data`.
    """
    here = resources.files(__package__ or "")
    script = "\n".join((here / f"{name}.js").read_text(encoding="utf-8") for name in SCRIPTS)
    parts = {
        "title": html.escape(str(data["title"])),
        "style": (here / "page.css").read_text(encoding="utf-8"),
        "script": script,
        "data": inlined(data),
    }
    # In one pass: what the data say is never taken for a place to fill.
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], (here / "page.html").read_text(encoding="utf-8"))


def inlined(data: Any) -> str:
    """JSON that may stand in a script element: no `<`, so nothing in it can end the element or begin another."""
    return json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
