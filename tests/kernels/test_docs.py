"""The example at the top of docs/kernels.md runs as written and says what it says there."""

import re
from pathlib import Path

from kvjax.kernels import Choice

PAGE = Path(__file__).parents[2] / "docs" / "kernels.md"


def test_the_example_runs():
    code = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
    assert len(code) == 1
    *lines, shapes, choice = code[0].strip().splitlines()
    names: dict = {}
    exec("\n".join(lines), names)
    said = re.search(r"# (\(.*\)): merge", shapes)
    assert said and eval(shapes, names) == eval(said[1])
    assert eval(choice, names) == eval(choice.partition("# ")[2], {"Choice": Choice})
