"""Notebooks run from top to bottom, on the tiny model, and are stored without what they print."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests import quick

NOTEBOOKS = sorted((Path(__file__).parents[1] / "experiments" / "colab").glob("*.ipynb"))


def cells(path: Path) -> list[dict]:
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_stored_clean(path):
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells(path))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_kvjax_is_installed_from_what_lies_beside(path, tmp_path, monkeypatch):
    """From nowhere else: no registry is asked for a package of this name."""
    install = "".join(cells(path)[0]["source"]).partition("\n\nMODEL")[0]
    found = []
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(subprocess, "run", lambda command, check: found.append(command[-1].removesuffix("[gemma]")))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="pip wheel --no-deps"):
        exec(install, {})
    (tmp_path / "kvjax" / "kvjax" / "methods").mkdir(parents=True)
    exec(install, {})
    (tmp_path / "kvjax-1.0-py3-none-any.whl").touch()
    exec(install, {})
    monkeypatch.chdir(path.parent)
    exec(install, {})
    places = tmp_path / "kvjax", tmp_path / "kvjax-1.0-py3-none-any.whl", path.parents[2]
    assert found == [str(place) for place in places]


@pytest.mark.slow
def test_the_sharded_long_context(tmp_path):
    """As one script, in a process of its own: it has its own number of devices."""
    (path,) = (path for path in NOTEBOOKS if path.stem == "sharded_long_context")
    script = tmp_path / "notebook.py"
    script.write_text("\n\n".join("".join(cell["source"]) for cell in cells(path)))
    environment = os.environ | quick.ENVIRONMENT | {"KVJAX_MODEL": "tiny", "KVJAX_CONTEXT": "300"}
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    answer = re.search(r"right answer: (.*)", done.stdout)
    assert answer and "4 x cpu" in done.stdout
    full, small = (float(size) for size in re.findall(r"([\d.]+) MB, ", done.stdout))
    assert full > 2 * small > 0
    spread, alone = re.findall(r"snapkv\(0.25\) \| kivi\(bits=4\).*: (.*)", done.stdout)
    assert spread == alone


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, right",
    [("first_steps", r"keydiff\(0.25\).*answer: 41190"), ("write_your_own_method", r"keydiff\(0.5\).*answer: 41190")],
)
def test_small_ones(name, right, tmp_path):
    (path,) = (path for path in NOTEBOOKS if path.stem == name)
    script = tmp_path / "notebook.py"
    script.write_text("\n\n".join("".join(cell["source"]) for cell in cells(path)))
    environment = os.environ | quick.ENVIRONMENT | {"MPLBACKEND": "svg"}
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert re.search(right, done.stdout), done.stdout
