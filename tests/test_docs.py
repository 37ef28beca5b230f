"""What the documentation says of the code is true."""

import re
import runpy
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import typer.testing

import kvjax
from kvjax.cli import app

ROOT = Path(__file__).parents[1]


def test_method_table_is_up_to_date():
    table = runpy.run_path(str(ROOT / "scripts" / "make_method_table.py"))["table"]
    assert (ROOT / "docs" / "methods.md").read_text() == table(), "run python scripts/make_method_table.py"


def test_every_method_was_measured():
    made = runpy.run_path(str(ROOT / "scripts" / "make_method_table.py"))
    rows = made["measured_rows"]()
    assert [name for name in kvjax.methods() if not made["measured"](name, rows)] == []


def code_blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def test_readme_policies_can_be_built():
    texts = re.findall(r"`([a-z_0-9]+\([^`]*\)(?: \| [a-z_0-9]+\([^`]*\))*)`", (ROOT / "README.md").read_text())
    policies = [text for text in texts if text.split("(")[0] in kvjax.methods()]
    assert policies
    for text in policies:
        kvjax.parse_policy(text.replace("\\|", "|"))


@pytest.mark.slow
def test_commands_of_the_readme_would_run(gemma, tmp_path, monkeypatch):
    """All that compare and evaluate, with what they name, up to the first computation."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(kvjax, "load", lambda name, dtype=None: kvjax.model.load(name) if name == "tiny" else gemma)
    Path("configs").symlink_to(ROOT / "configs")
    shutil.copytree(ROOT / "tests" / "data" / "tasks" / "longbench", "data/longbench")
    ran = 0
    for line in "".join(code_blocks("bash")).splitlines():
        if line.startswith("echo "):
            subprocess.run(line, shell=True, check=True)
        elif line.startswith(("kvjax compare", "kvjax eval")):
            done = typer.testing.CliRunner().invoke(app, [*shlex.split(line.split("  #")[0])[1:], "--dry-run"])
            assert done.exit_code == 0, f"{line}: {done.output}"
            ran += 1
    assert ran > 4


@pytest.mark.slow
def test_first_lines_of_the_readme_run(gemma, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(kvjax, "load", lambda name: gemma)
    exec(code_blocks("python")[0], {})
    size, answers = capsys.readouterr().out.split("\n", 1)
    assert size + ":" in code_blocks("python")[0]  # The comment behind it says what is printed.
    compressed, full = (int(word.replace(",", "")) for word in re.findall(r"[\d,]+", size))
    assert compressed < 0.8 * full
    assert answers.strip()


@pytest.mark.slow
def test_all_python_of_the_readme_runs(monkeypatch, capsys):
    """On the house model; the last block in a Python of its own, as it says."""
    monkeypatch.chdir(ROOT)
    tiny = kvjax.load("tiny")
    monkeypatch.setattr(kvjax, "load", lambda name: tiny)
    *first, last = code_blocks("python")
    first[0] = first[0].replace("read_text()", "read_text()[:2000]")  # What this model can read.
    names: dict = {}
    for block in first:
        exec(block, names)
    assert [len(cache.layers) for cache in names["caches"]] == 2 * [tiny.config.num_layers]
    capsys.readouterr()
    exec(last, {})
    assert capsys.readouterr().out.strip()
