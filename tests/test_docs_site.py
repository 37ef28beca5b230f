"""What the pages of docs/ say runs as it stands: Python blocks in order, commands as they are written.

A block of text behind one of Python is what that prints, on a CPU, exactly.
"""

import contextlib
import io
import re
import shlex
from pathlib import Path

import pytest
import typer
import yaml

from kvjax.cli import app

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
RUN = ["index.md", "tour.md", "concepts.md", "how_to/own_model.md", "how_to/lm_eval.md"]
ELSEWHERE = ["add_a_method.md", "kernels.md"]  # Have tests of their own.
SKETCHES = ["models/tiny/README.md", "scaling.md", "tasks.md"]  # Name texts or machines that are not here.
PAGES = sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))


def blocks(page: str) -> list[tuple[str, str]]:
    """(language, content) of a page's code blocks."""
    return re.findall(r"^```(\w+)\n(.*?)^```$", (DOCS / page).read_text(), re.DOTALL | re.MULTILINE)


def test_every_page_with_code_is_run():
    with_code = {page for page in PAGES if any(language == "python" for language, _ in blocks(page))}
    assert with_code <= {*RUN, *ELSEWHERE, *SKETCHES}


@pytest.mark.slow
@pytest.mark.parametrize("page", RUN)
def test_code_runs(page, monkeypatch, tmp_path):
    if page.endswith("lm_eval.md"):
        pytest.importorskip("lm_eval", reason='needs pip install -e ".[eval]"')
        monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        monkeypatch.setenv("HF_HOME", str(tmp_path))
    names: dict = {}
    printed, compared = None, 0
    for language, content in blocks(page):
        if language == "python":
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec(compile(content, page, "exec"), names)
            printed = out.getvalue()
        elif language == "text" and printed is not None:
            assert [line.rstrip() for line in printed.splitlines()] == [line.rstrip() for line in content.splitlines()]
            compared += 1
    assert page != "tour.md" or compared == sum(language == "text" for language, _ in blocks(page)) > 5


def commands() -> list[tuple[str, str]]:
    """(page, command) of every call of `kvjax` in a block for the shell."""
    lines = [
        (page, line)
        for page in ["../README.md", *PAGES]
        for language, content in blocks(page)
        if language == "bash"
        for line in content.replace("\\\n", " ").splitlines()
    ]
    calls = [(page, re.sub(r"^(?:\w+=\S+ )+", "", line)) for page, line in lines]
    return [(page, line.split("  #")[0]) for page, line in calls if line.startswith("kvjax ")]


@pytest.mark.parametrize("page, command", commands())
def test_commands_and_their_options_exist(page, command):
    words, found = shlex.split(command)[1:], typer.main.get_command(app)
    while words and words[0] in getattr(found, "commands", {}):
        found, words = found.commands[words[0]], words[1:]  # type: ignore[attr-defined]
    assert found.name in command and found is not typer.main.get_command(app), f"{page}: {command}"
    known = {name for parameter in found.params for name in (*parameter.opts, *parameter.secondary_opts)}
    assert {word.split("=")[0] for word in words if word.startswith("--")} <= known, f"{page}: {command}"


def test_the_sites_pages_exist():
    class Loader(yaml.SafeLoader): ...

    def pages(entry) -> list[str]:
        values = [entry] if isinstance(entry, str) else entry if isinstance(entry, list) else entry.values()
        return values if isinstance(entry, str) else [page for value in values for page in pages(value)]

    site = yaml.load((ROOT / "mkdocs.yml").read_text(), Loader)
    found = [page for entry in site["nav"] for page in pages(entry)]
    assert len(found) == len(set(found)) and set(found) <= set(PAGES)
