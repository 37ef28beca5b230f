"""docs/add_a_method.md is run as it stands: a method of one's own by copy and paste, and the contract holds for it."""

import re
import sys
import types
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax.policies import registry
from tests import tiny
from tests.tiny import assert_trees_equal

PAGE = (Path(__file__).parents[1] / "docs" / "add_a_method.md").read_text()
ORACLE, METHOD, COMPARISON, USE = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture
def page(monkeypatch):
    """What the page has defined, its oracle as a module; the registry is as before afterwards."""
    oracle = types.ModuleType("tests.oracles.vatp")
    exec(ORACLE, vars(oracle))
    monkeypatch.setitem(sys.modules, oracle.__name__, oracle)
    names: dict = {"__name__": "vatp"}
    exec(METHOD, names)
    yield names
    registry._METHODS.pop("vatp")


def test_it_equals_its_oracle(page):
    exec(COMPARISON, page)


def test_the_registry_knows_it(page):
    assert "vatp" in kvjax.methods()
    policy = kvjax.parse_policy("vatp(0.5, sinks=2) | int8")
    observed = kvjax.observe(tiny.params(), tiny.CONFIG, tiny.TOKENS, tiny.LENGTHS, needs=policy.needs)
    cache = kvjax.prefill(tiny.params(), tiny.CONFIG, policy, tiny.TOKENS, tiny.LENGTHS)
    assert_trees_equal(kvjax.compress(kvjax.plan(policy, tiny.CONFIG, tiny.LENGTHS, jnp.float32), observed), cache)
    for row, length in enumerate(tiny.LENGTHS):
        assert all(
            len(head) == length // 2 and {0, 1} <= set(head) for layer in tiny.kept(cache, row) for head in layer
        )


def test_a_budget_of_everything_is_full_attention(page):
    found, want = (
        kvjax.prefill_logits(tiny.params(), tiny.CONFIG, kvjax.parse_policy(text), tiny.TOKENS, tiny.LENGTHS)[0]
        for text in ("vatp(4096)", "full")
    )
    np.testing.assert_array_equal(found, want)


def test_it_answers_on_the_house_model(page, capsys):
    exec(USE, page)
    assert "48151" in capsys.readouterr().out


def test_the_page_names_what_exists():
    root = Path(kvjax.__file__).parent
    for name in re.findall(r"`((?:policies|cache|convert|training)/[\w.]*)`", PAGE):
        assert (root / name).exists(), name
