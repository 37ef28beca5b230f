"""`experiments/train_tiny.py`: what it trains on is what kvjax asks, and what it trains is what kvjax runs."""

import dataclasses
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

import kvjax
from kvjax.checkpoints.packaged import BUNDLED
from kvjax.evaluation import tasks

EXPERIMENTS = Path(__file__).parents[1] / "experiments"


@pytest.fixture(scope="module")
def modules():
    """`tiny_data` and `train_tiny`, found as when the script runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXPERIMENTS)
        import tiny_data
        import train_tiny

        yield tiny_data, train_tiny
    for name in ("tiny_data", "train_tiny"):
        sys.modules.pop(name)


@pytest.fixture(scope="module")
def corpus(modules):
    backend = tokenizers.Tokenizer.from_file(str(BUNDLED["tiny"] / "tokenizer.json"))
    text = modules[0].stream(backend, [tasks.library_text()[:20_000]])
    return backend, modules[0].make_corpus(backend, text, text)


def test_needles_are_those_of_the_task(modules):
    data, _ = modules
    statement, question = data.NEEDLES[0]
    assert tuple(data.CITIES) == tuple(tasks.CITIES)
    assert statement == tasks.NEEDLE.format(city="{key}", number="{value}")
    assert question == tasks.QUESTION.format(city="{key}") + "{value}\n"


def test_pieces_are_what_the_tokenizer_makes_of_the_whole(modules, corpus):
    data, _ = modules
    backend, pieces = corpus
    rng = np.random.default_rng(0)
    for statement, question in data.NEEDLES:
        for text in (statement, question):
            key, value = data.choose(rng, pieces.cities, 1)[0], data.number(pieces, rng, 7)
            ids, weights = data.asked(data.template(backend, text), key, value)
            city, number = backend.decode(key[0].tolist()), backend.decode(value.ids.tolist())
            assert ids.tolist() == data.encode(backend, text.format(key=city, value=number)).tolist()
            if text == question:  # The line break that ends an answer is part of it.
                assert backend.decode(ids[weights > 0].tolist()) == number + "\n"


@pytest.mark.parametrize("length", [256, 1152])
def test_rows(modules, corpus, length):
    """Every task fills its rows; only text counts as text; answers weigh 1 / sqrt(n) each."""
    data, _ = modules
    _, pieces = corpus
    for name in data.NAMES:
        ids, weights, kinds = data.batch(pieces, np.random.default_rng(1), (8, length), {name: 1.0})
        assert ids.shape == weights.shape == (8, length) and (ids[:, 0] == data.BOS_ID).all()
        assert ids.min() >= 0 and ids.max() < pieces.vocab and set(kinds) == {data.NAMES.index(name)}
        assert (weights == 0).any() == (name == "text")
        if name in ("needle", "passkey", "variables"):
            learned = dataclasses.replace(pieces, haystack=0.0)
            again = data.batch(learned, np.random.default_rng(1), (8, length), {name: 1.0})
            np.testing.assert_array_equal(again[0], ids)
            assert (again[1] == 0).any()
        answers = (weights > 0).sum(1)
        np.testing.assert_allclose(np.maximum(weights, 0).sum(1), np.sqrt(answers), rtol=2e-3)
        assert answers.any() != (name == "text")


def test_same_seed_same_rows(modules, corpus):
    data, train = modules
    one, two = (data.batch(corpus[1], np.random.default_rng(7), (8, 256), train.FULL) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, one, two)


def test_what_is_trained_is_what_runs(modules):
    _, train = modules
    config = train.tiny_config(layers=2, hidden=64)
    params = train.start_params(config, jax.random.key(0))
    tokens = jnp.asarray(np.random.default_rng(0).integers(2048, size=(2, 40)), jnp.int32)
    mine = train.logits_of(params, config, tokens, train.attention(None), jnp.float32)
    np.testing.assert_allclose(mine, kvjax.forward(params, config, tokens), atol=2e-5)
    assert train.tiny_config() == kvjax.load("tiny").config


def test_steps_lower_the_loss(modules, corpus):
    """A few steps on the same rows, which a model of one layer can learn by heart."""
    data, train = modules
    config = train.tiny_config(layers=1, hidden=32)
    params = train.start_params(config, jax.random.key(0))
    state, step = train.optimizer().init(params), train.make_step(config, train.attention(None), jnp.float32)
    batch = data.batch(corpus[1], np.random.default_rng(0), (4, 64), {"pairs": 1.0, "text": 1.0})
    answers = []
    for i in range(12):
        params, state, report = step(params, state, jnp.float32(0.01), jnp.uint32(i), *batch)
        answers.append(float(report["answer"]))
    assert answers[-1] < 0.7 * answers[0]


def test_export_is_loaded(modules, tmp_path):
    _, train = modules
    config = train.tiny_config(layers=1, hidden=32)
    params = train.start_params(config, jax.random.key(0))
    train.export(params, config, tmp_path, BUNDLED["tiny"] / "tokenizer.json")
    model = kvjax.load(str(tmp_path))
    assert model.config == config
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(a, b.astype(jnp.bfloat16).astype(jnp.float32)), model.params, params
    )
