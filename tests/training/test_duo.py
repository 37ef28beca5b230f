"""DuoAttention's gates: the attention they mix, the loss against its oracle, the data; and training finds heads."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.cache import EMPTY, LayerSpec, Tokens
from kvjax.models.transformer import forward, unembed
from kvjax.training import TrainingError
from kvjax.training.duo import (
    Passkeys,
    duo_loss,
    gated_attention,
    hidden_states,
    load_gates,
    save_gates,
    schedule,
    streaming_attention,
    train_gates,
)
from tests import tiny
from tests.oracles import duo_attention as oracle
from tests.oracles.attention import attention
from tests.oracles.test_golden import close, golden, reading_inputs
from tests.tiny import CONFIG, LENGTHS, TOKENS

TASK = Passkeys(
    start=(2,),
    haystack=tuple(range(10, 100)),
    end=(3, 4),
    needles=((110, 111), (110, 112)),
    questions=((120, 111), (120, 112)),
    separator=(5,),
    words=((50,), (60, 61), (70,)),
    size=2,
    least=36,
    length=48,
    batch=2,
    seed=3,
)


def as_tokens(q, k, v, lengths=None) -> Tokens:
    """Of one sequence q [H, T, D], k, v [Hk, T, D]; or of several, stacked."""
    q, k, v = (jnp.asarray(x, jnp.float32) for x in (q, k, v))
    q, k, v = (x[None] if x.ndim == 3 else x for x in (q, k, v))
    pos = jnp.broadcast_to(jnp.arange(q.shape[2], dtype=jnp.int32), (q.shape[0], q.shape[2]))
    pos = pos if lengths is None else jnp.where(pos < lengths[:, None], pos, EMPTY)
    return Tokens(q=q, k=k, v=v, q_raw=q, k_raw=k, pos=pos)


# The attention of gated heads


@pytest.mark.parametrize("block", [8, 16, 256])
@pytest.mark.parametrize(("sinks", "recent"), [(2, 6), (4, 1), (20, 9), (1, 64)])
def test_streaming_attention_is_the_oracles(rng, sinks, recent, block):
    q, k, v = (rng.normal(size=(2, heads, 45, 16)) for heads in (4, 2, 2))
    lengths = jnp.array([45, 31])
    spec = LayerSpec(scale=0.3, softcap=5.0)
    found = streaming_attention(spec, as_tokens(q, k, v, lengths), sinks=sinks, recent=recent, block=block)
    for row, n in enumerate(lengths):
        want = attention(
            q[row, :, :n], k[row, :, :n], v[row, :, :n], scale=0.3, softcap=5.0, sinks=sinks, window=recent
        )
        np.testing.assert_allclose(found[row, :, :n], want, atol=2e-5)
    assert np.isfinite(found).all()


def test_gated_attention_of_the_authors():
    """Their two-way forward; gates outside [0, 1] are cut there, here they cannot be."""
    data = golden("quantization_reading/duo_attention")
    q, k, v = reading_inputs()
    new = as_tokens(q * float(data["query_scale"]), k, v)
    gates = jnp.clip(jnp.asarray(data["gates"]), 0, 1)
    out = gated_attention(LayerSpec(scale=1 / math.sqrt(64)), new, gates, sinks=16, recent=64)
    close(np.asarray(out[0]).transpose(1, 0, 2)[data["rows"]], data["mixed_out"], rtol=1e-3, atol=1e-5)


# The loss


def states(gates, targets=(None,) * 3, **options):
    options = {"sinks": 2, "recent": 6, **options}
    x, outputs = hidden_states(tiny.params(), CONFIG, gates, TOKENS, LENGTHS, targets, **options)
    return np.asarray(x), outputs


def test_without_gates_it_is_the_model():
    x, _ = states(None)
    # `unembed` norms once more, which is what makes the comparison need a model with a norm of ones.
    assert (np.asarray(tiny.params()["final_norm"]) == 1).all()
    want = forward(tiny.params(), CONFIG, TOKENS, LENGTHS)
    valid = np.arange(TOKENS.shape[1]) < LENGTHS[:, None]
    np.testing.assert_allclose(np.asarray(unembed(tiny.params(), CONFIG, x))[valid], np.asarray(want)[valid], atol=1e-3)
    np.testing.assert_allclose(states(jnp.ones((2, 2)))[0][valid], x[valid], atol=1e-5)


@pytest.mark.parametrize("full", ["teacher", "student"])
def test_loss_is_the_oracles(full):
    gates = jnp.array([[0.2, 1.0], [0.0, 0.7]])
    labelled = jnp.arange(48) >= LENGTHS[:, None] - 8
    labelled &= jnp.arange(48) < LENGTHS[:, None]
    arguments = {"sinks": 2, "recent": 6, "weight": 0.05, "full": full}
    loss, parts = duo_loss(tiny.params(), CONFIG, gates, TOKENS, LENGTHS, labelled, **arguments)
    teacher, outputs = states(None)
    student, _ = states(gates, outputs if full == "teacher" else (None,) * 3)
    flat = [np.asarray(x, np.float64).reshape(-1, x.shape[-1]) for x in (teacher, student)]
    distill, penalty = oracle.duo_loss(*flat, np.asarray(labelled).ravel(), np.asarray(gates), 0.05)
    assert distill > 1e-4
    np.testing.assert_allclose([parts["distill"], loss], [distill, distill + penalty], rtol=1e-4)


def test_teachers_and_students_attention_differ():
    """Below the first gated layer they have the same inputs, above it not."""
    gates = jnp.zeros((2, 2)).at[1].set(1.0)
    teacher, outputs = states(None)
    by_teacher, by_student = states(gates, outputs)[1], states(gates)[1]
    np.testing.assert_array_equal(by_teacher[0], by_student[0])
    assert np.abs(by_teacher[2] - by_student[2]).max() > 1e-3
    np.testing.assert_array_equal(by_teacher[2], outputs[2])


def test_schedule():
    rates = [float(schedule(0.02, 100)(i)) for i in range(101)]
    np.testing.assert_allclose(rates[:3], [0.002, 0.002, 0.003])
    np.testing.assert_allclose([rates[i] for i in (19, 50, 80, 90, 100)], [0.02, 0.02, 0.02, 0.01, 0.002], rtol=1e-6)


# The task


def test_passkeys_are_in_the_context_and_asked_for():
    tokens, lengths, labelled = (np.asarray(x) for x in TASK(0))
    assert tokens.shape == (2, 48) and (36 - 10 <= lengths).all() and (lengths <= 48).all()
    for row in range(2):
        ids = tokens[row, : lengths[row]].tolist()
        asked = [i for i in range(48) if labelled[row, i]]
        assert asked == list(range(asked[0], lengths[row]))  # Questions and answers, to the end.
        context, questions = ids[: asked[0]], ids[asked[0] :]
        assert context[0] == 2 and context[-2:] == [3, 4]
        for ordinal in (111, 112):
            start = questions.index(ordinal) + 1
            answer = questions[start : questions.index(5, start)]
            assert 2 <= len(answer) <= 4
            where = context.index(ordinal)
            assert context[where - 2 : where + 1] == [5, 110, ordinal]
            assert context[where + 1 : where + 1 + len(answer)] == answer


def test_batches_depend_on_the_step_alone():
    for x, y in zip(TASK(7), TASK(7), strict=True):
        np.testing.assert_array_equal(x, y)
    assert not np.array_equal(TASK(7)[0], TASK(8)[0])
    assert not np.array_equal(TASK(7)[0], dataclasses.replace(TASK, seed=4)(7)[0])
    lengths = {int(n) for step in range(20) for n in TASK(step)[1]}
    assert len(lengths) > 5


def test_passkeys_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="have no room"):
        dataclasses.replace(TASK, least=20)
    with pytest.raises(ValueError, match="The text has 9 tokens, and a prompt of 48 needs"):
        dataclasses.replace(TASK, haystack=TASK.haystack[:9])


# Training


def forgetful_params():
    """The tiny model, whose last layer makes nothing of what its first KV head reads."""
    params = tiny.params()
    last = dict(params["layers"][2])
    last["o_proj"] = last["o_proj"].at[: 2 * CONFIG.head_dim].set(0.0)
    return {**params, "layers": (*params["layers"][:2], last)}


def train(folder, steps=30, **changes):
    options = {"rate": 0.1, "weight": 0.02, "sinks": 1, "recent": 4, "every": 10, "show": False, **changes}
    return train_gates(forgetful_params(), CONFIG, TASK, folder, steps=steps, **options)


def test_training_finds_the_head_that_nobody_needs(tmp_path):
    gates = train(tmp_path / "whole")
    assert gates.shape == (2, 2) and (gates >= 0).all() and (gates <= 1).all()
    assert gates[1, 0] == 0.0
    assert np.delete(gates.ravel(), 2).min() > 0.1
    # Stopped and started again, it ends at the same gates.
    count = 0

    def batches(step):
        nonlocal count
        count += 1
        if step == 14 and count == 15:
            raise KeyboardInterrupt
        return TASK(step)

    run = {"steps": 30, "rate": 0.1, "weight": 0.02, "sinks": 1, "recent": 4, "every": 10, "show": False}
    with pytest.raises(KeyboardInterrupt):
        train_gates(forgetful_params(), CONFIG, batches, tmp_path / "halves", **run)
    np.testing.assert_array_equal(train_gates(forgetful_params(), CONFIG, batches, tmp_path / "halves", **run), gates)
    assert count == 15 + 20
    with pytest.raises(TrainingError, match="was trained with"):
        train(tmp_path / "whole", weight=0.5)
    np.testing.assert_array_equal(load_gates(tmp_path / "whole", CONFIG), gates)
    with pytest.raises(TrainingError, match=r"is float32\[2, 2\], in this run float32\[2, 1\]"):
        load_gates(tmp_path / "whole", dataclasses.replace(CONFIG, num_kv_heads=1))


def test_what_cannot_be_trained_is_refused(tmp_path):
    with pytest.raises(ValueError, match="sinks and recent must be positive"):
        train(tmp_path, recent=0)
    sliding = dataclasses.replace(CONFIG, layer_types=("sliding",) * 3)
    with pytest.raises(ValueError, match="has none"):
        train_gates(tiny.params(), sliding, TASK, tmp_path)


def test_saved_gates_are_lines_of_numbers(tmp_path):
    save_gates(tmp_path / "gates.tsv", [[0.25, 1], [0, 0.5]])
    assert (tmp_path / "gates.tsv").read_text() == "0.250000\t1.000000\n0.000000\t0.500000\n"
    with pytest.raises(ValueError, match="finite numbers"):
        save_gates(tmp_path / "bad.tsv", [[math.nan]])
