"""`drift` and `stream` from the task to the rows, against plain ways to compute them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax.checkpoints import Tokenizer
from kvjax.evaluation import Settings, check, make_cases, make_task, parse_policies, resolved_config, run, runner
from kvjax.evaluation.ask import CURVE
from kvjax.evaluation.score import write
from kvjax.generation import Sampler
from kvjax.generation.extend import with_room
from tests import tiny
from tests.evaluation.letters import Letters


class FewLetters(Letters):
    """The test model has 128 tokens; Python's manual has a few letters more."""

    def encode(self, text, add_special_tokens=False):
        return type("Encoding", (), {"ids": [ord(letter) % 128 for letter in text]})


@pytest.fixture(scope="module")
def model():
    tokenizer = Tokenizer(FewLetters(), bos_id=1, eos_ids=())  # type: ignore[arg-type]
    return kvjax.Model(tiny.params(), tiny.CONFIG, tokenizer)


def go(model, task, policies, folder):
    """Rows by policy of the task's first sample, and that sample."""
    settings = Settings(policies=parse_policies(policies), speed=False, tokens=4)
    cases = make_cases(task, task.samples(model)[:1], settings)
    check(model, cases, settings)
    rows = run(model, task, cases, settings, resolved_config("tiny", np.float32, task, settings), folder)
    assert [row["policy"] for row in rows] == list(map(str, settings.policies))
    return rows, cases[0].sample


def log_p(model, sample, after):
    """Log-probabilities [len(after), vocab] of what follows context and question, by a pass without a cache."""
    tokens = jnp.asarray([[*sample.context_ids, *sample.question_ids, *after]])
    logits = kvjax.forward(model.params, model.config, tokens)[0]
    return np.asarray(jax.nn.log_softmax(logits, -1), np.float64)[-len(after) - 1 : -1]


@pytest.fixture(scope="module")
def drifted(model, tmp_path_factory):
    task = make_task("drift", context=64, count=1, tokens=96)
    return go(model, task, "full; knorm(0.25)", tmp_path_factory.mktemp("drift"))


def test_the_full_cache_does_not_drift(drifted):
    (full, compressed), _ = drifted
    assert full["kl"] == pytest.approx(0, abs=1e-6) and full["top1"] == 1 and full["agrees_until"] == 96
    assert compressed["kl"] > 1e-3 and compressed["top1"] < 1
    for row in (full, compressed):
        assert "score" not in row and len(row["kl_curve"]) == len(row["top1_curve"]) == CURVE  # Of 3 tokens each.
        assert np.mean(row["kl_curve"]) == pytest.approx(row["kl"], abs=1e-9)
        assert np.mean(row["top1_curve"]) == pytest.approx(row["top1"])


def test_drift_is_measured_along_a_text_of_the_full_cache(model, drifted):
    (_, row), sample = drifted
    logits, cache = model.extend(model.prefill(sample.context_ids, "full"), sample.question_ids)
    path = write(model, with_room(cache, 96), logits[:, -1], 96, Sampler(temperature=1.0))
    before = log_p(model, sample, path)
    ids = [*sample.question_ids, *path]
    logits, _ = model.extend(model.prefill(sample.context_ids, "knorm(0.25)"), ids)
    after = np.asarray(jax.nn.log_softmax(logits[0, -97:-1], -1), np.float64)
    same = before.argmax(-1) == after.argmax(-1)
    kl = (np.exp(before) * (before - after)).sum(-1)
    assert row["agrees_until"] == same.argmin() and row["top1"] == same.mean()
    assert row["kl"] == pytest.approx(kl.mean(), abs=1e-4)
    assert row["kl_curve"] == pytest.approx(kl.reshape(CURVE, -1).mean(-1), abs=1e-4)


def test_a_stream_goes_on_beyond_the_models_context(model, tmp_path):
    task = make_task("stream", context=64, continuation=641)
    (full, window), sample = go(model, task, "full; streaming_llm(0.5)", tmp_path)
    (stream,) = sample.answers
    assert len(stream) == 640 > model.config.max_length
    wanted = log_p(model, sample, stream)[np.arange(640), stream]
    assert full["nll"] == pytest.approx(-wanted.mean(), abs=1e-4)
    assert full["nll_curve"] == pytest.approx(-wanted.reshape(CURVE, -1).mean(-1), abs=1e-3)
    for row in (full, window):
        assert np.isfinite(row["perplexity"]) and row["perplexity"] == pytest.approx(np.exp(row["nll"]))
        assert len(row["nll_curve"]) == CURVE and np.mean(row["nll_curve"]) == pytest.approx(row["nll"])
    assert window["nll"] != full["nll"]
    with pytest.raises(ValueError, match="model's context is 512"):  # As a text that is no stream it is refused.
        go(model, make_task("ppl", context=64, count=1, continuation=641), "full", tmp_path)


@pytest.mark.slow
def test_a_drift_of_a_thousand_tokens(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "TOGETHER", 0)  # Nothing is run once more to be compiled beforehand.
    task = make_task("drift", context=256, count=1, tokens=1024)
    (full, window), _ = go(kvjax.load("tiny"), task, "full; streaming_llm(0.25)", tmp_path)
    assert full["kl"] == pytest.approx(0, abs=1e-6) and full["agrees_until"] == 1024
    assert 0 < window["agrees_until"] < 1024 and 0.01 < window["kl"] < 5 and 0.3 < window["top1"] < 1
    assert np.mean(window["kl_curve"]) == pytest.approx(window["kl"])
