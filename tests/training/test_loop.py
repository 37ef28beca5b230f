"""The loop that all trainers share: it can be killed at any moment, and nothing is done twice or left out."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kvjax.training import TrainingError, load_state, read_log, train

TARGET = jnp.arange(6.0).reshape(2, 3)
OPTIMIZER = optax.adamw(optax.warmup_cosine_decay_schedule(0.0, 0.3, 5, 80))


def first_state():
    params = {"w": jnp.zeros((2, 3)), "b": jnp.zeros(3, jnp.bfloat16)}
    return {"params": params, "optimizer": OPTIMIZER.init(params), "key": jax.random.key(0)}


def batch(i: int):
    return jax.random.normal(jax.random.key(i), (4, 2))


@jax.jit
def step(state, x):
    key, noise = jax.random.split(state["key"])

    def loss(params):
        y = x @ params["w"] + params["b"].astype(jnp.float32)
        return jnp.mean((y - x @ TARGET + 0.01 * jax.random.normal(noise, y.shape)) ** 2)

    value, gradient = jax.value_and_grad(loss)(state["params"])
    updates, optimizer = OPTIMIZER.update(gradient, state["optimizer"], state["params"])
    return {"params": optax.apply_updates(state["params"], updates), "optimizer": optimizer, "key": key}, {
        "loss": value
    }


def run(folder, steps=20, **changes):
    return train(step, first_state(), batch, steps, folder, **{"every": 6, "log_every": 2, "show": False, **changes})


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


def test_it_learns_and_keeps_the_newest_checkpoints(tmp_path):
    run(tmp_path / "a" / "b", 60, keep=3)
    names = sorted(path.name for path in (tmp_path / "a" / "b").iterdir())
    assert names == ["log.jsonl", "step-00000048", "step-00000054", "step-00000060"]
    log = read_log(tmp_path / "a" / "b")
    assert [line["step"] for line in log] == list(range(2, 61, 2)) and log[-1]["loss"] < log[0]["loss"] / 10
    assert all(b["seconds"] >= a["seconds"] for a, b in zip(log, log[1:], strict=False))


@pytest.mark.parametrize("killed_at", [0, 5, 6, 13])
def test_a_run_that_was_killed_ends_with_the_same_bits(tmp_path, killed_at):
    want = run(tmp_path / "whole")

    def broken(i: int):
        if i == killed_at:
            raise KeyboardInterrupt
        return batch(i)

    with pytest.raises(KeyboardInterrupt):
        train(step, first_state(), broken, 20, tmp_path / "killed", every=6, log_every=2, show=False)
    begun = []
    found = train(
        step, first_state(), lambda i: begun.append(i) or batch(i), 20, tmp_path / "killed", every=6, log_every=2
    )
    assert begun[0] == killed_at // 6 * 6  # From the last checkpoint on, not from the start.
    assert_equal(found, want)
    logs = [[(line["step"], line["loss"]) for line in read_log(tmp_path / name)] for name in ("whole", "killed")]
    assert logs[0] == logs[1]
    assert_equal(load_state(tmp_path / "killed", first_state())[1], want)


def test_a_finished_run_is_read_and_can_be_prolonged(tmp_path):
    want = run(tmp_path)

    def never(i: int):
        raise AssertionError("It was finished.")

    assert_equal(train(step, first_state(), never, 20, tmp_path, show=False), want)
    assert load_state(tmp_path, first_state())[0] == 20
    assert_equal(run(tmp_path, 30), run(tmp_path / "at once", 30))


def test_a_line_cut_off_while_writing_is_left_out(tmp_path):
    run(tmp_path)
    with open(tmp_path / "log.jsonl", "a") as log:
        log.write('{"step": 22, "lo')
    assert read_log(tmp_path)[-1]["step"] == 20
    run(tmp_path, 24)
    assert [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()] == list(
        range(2, 25, 2)
    )


def test_a_state_that_is_not_finite_is_never_saved(tmp_path):
    def diverge(state, x):
        state, metrics = step(state, x)
        return state, {"loss": jnp.where(state["optimizer"][0].count > 9, jnp.nan, metrics["loss"])}

    with pytest.raises(TrainingError, match="loss is nan at step 12"):
        train(diverge, first_state(), batch, 20, tmp_path, every=6, log_every=50, show=False)
    assert load_state(tmp_path, first_state())[0] == 6


def test_another_run_does_not_go_on_from_here(tmp_path):
    run(tmp_path, settings={"rate": 0.1})
    with pytest.raises(TrainingError, match=r"trained with.*0\.1.*not with.*0\.2"):
        run(tmp_path, 30, settings={"rate": 0.2})
    with pytest.raises(TrainingError, match="at step 20, and 10 were asked"):
        run(tmp_path, 10, settings={"rate": 0.1})
    other = {"w": jnp.zeros((2, 4)), "b": jnp.zeros(3, jnp.bfloat16)}
    with pytest.raises(TrainingError, match=r"'w'.* is float32\[2, 3\], in this run float32\[2, 4\]"):
        train(step, {**first_state(), "params": other}, batch, 30, tmp_path, settings={"rate": 0.1})
    with pytest.raises(TrainingError, match="another state"):
        train(step, {"params": first_state()["params"]}, batch, 30, tmp_path, settings={"rate": 0.1})
    with pytest.raises(TrainingError, match="holds no checkpoint"):
        load_state(tmp_path / "nowhere", first_state())
    with pytest.raises(ValueError, match="every must be at least 1"):
        run(tmp_path, every=0)


def test_a_corrupt_checkpoint_is_named(tmp_path):
    run(tmp_path)
    (tmp_path / "step-00000020" / "structure" / "metadata").write_text("{")
    with pytest.raises(TrainingError, match="step-00000020.*corrupt.*to go on from the checkpoint before"):
        run(tmp_path, 30)
