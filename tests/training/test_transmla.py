"""Tuning after conversion: nearer to the teacher, and nothing else moves."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax.training.transmla import TRAINED, distill, divergence
from tests import tiny


def batches(step: int):
    rng = np.random.default_rng(step)
    return jnp.asarray(rng.integers(2, 128, tiny.TOKENS.shape), jnp.int32), jnp.asarray(tiny.LENGTHS)


def test_distillation_comes_nearer(tmp_path):
    teacher = tiny.params(), tiny.CONFIG
    sizes = {"rank": 16, "rope_dim": 16, "freqfold": 2}
    params, config = kvjax.convert.transmla(*teacher, *batches(99), **sizes)
    tokens, lengths = batches(98)
    target = kvjax.forward(*teacher, tokens, lengths)
    tuned = distill(teacher, (params, config), batches, tmp_path, steps=60, rate=3e-3, every=60, show=False)
    before, after = (divergence(target, kvjax.forward(p, config, tokens, lengths), lengths) for p in (params, tuned))
    assert after < 0.85 * before  # Measured: 0.78, with random weights on random tokens.
    for old, new in zip(params["layers"], tuned["layers"], strict=True):
        assert old.keys() == new.keys()
        for name in old:
            assert (name in TRAINED) != bool(np.array_equal(old[name], new[name]))
    # A run that is done is not done again.
    again = distill(teacher, (params, config), batches, tmp_path, steps=60, rate=3e-3, every=60, show=False)
    tiny.assert_trees_equal(tuned, again)


def test_padding_does_not_count(rng):
    one, two = (jnp.asarray(rng.normal(size=(2, 5, 7)), jnp.float32) for _ in range(2))
    lengths = jnp.array([5, 2])
    junk = jnp.where((jnp.arange(5) < lengths[:, None])[..., None], two, 100.0)
    assert divergence(one, two, lengths) == divergence(one, junk, lengths) > 0
    assert np.isclose(divergence(one, one, lengths), 0, atol=1e-6)


def test_bad_input(tmp_path):
    teacher = tiny.params(), tiny.CONFIG
    with pytest.raises(ValueError, match="convert the teacher"):
        distill(teacher, teacher, batches, tmp_path, steps=100)
    student = tiny.params(), dataclasses.replace(tiny.CONFIG, mla=kvjax.models.Mla(16, 16))
    with pytest.raises(ValueError, match="warmup"):
        distill(teacher, student, batches, tmp_path, steps=10)
