"""kvjax under EleutherAI's harness: the full policy says what the model says, and what is compressed is asked."""

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax

pytest.importorskip("lm_eval", reason='needs pip install -e ".[eval]"')
from lm_eval.api.instance import Instance
from lm_eval.api.registry import Registry, get_model

from kvjax.lm_eval import KVJax
from tests import quick

ROOT = Path(__file__).parents[2]
ROWS = [json.loads(line) for line in (ROOT / "tests" / "data" / "lm_eval" / "codes.jsonl").read_text().splitlines()]
QUESTION = "{text}\nWhat is the secret code of {city}?\nAnswer:"
CONTEXTS = [QUESTION.format(**row) for row in ROWS[:2]]
POLICY = "knorm(0.25)"
BLOCK = 256  # Tokens of a text that are predicted from one cache.


@pytest.fixture(scope="module")
def model():
    return kvjax.load("tiny")


def requests(kind: str, arguments: list[tuple]) -> list:
    return [Instance(kind, {}, args, i) for i, args in enumerate(arguments)]  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def choices(model) -> list:
    """What the model writes, and for each context the right code and a shorter one; and one without a context."""
    pairs = [(CONTEXTS[0], model.generate(CONTEXTS[0], max_new_tokens=4))]
    pairs += [(context, f" {end}") for context, row in zip(CONTEXTS, ROWS, strict=False) for end in (row["code"], "4")]
    return requests("loglikelihood", [*pairs, ("", ROWS[0]["code"])])


def of_logits(logits, ids) -> tuple[float, bool]:
    """Log-likelihood of ids [T] and whether they are greedy, from the logits [T, vocab] that predict them."""
    log_p = jax.nn.log_softmax(logits)[jnp.arange(len(ids)), jnp.asarray(ids)]
    return float(log_p.sum()), bool((logits.argmax(-1) == jnp.asarray(ids)).all())


def directly(model, context: str, after: str) -> tuple[float, bool]:
    """By the model's forward pass over the whole text, without any cache."""
    start, ids = len(model.tokenizer.encode(context)), model.tokenizer.encode(context + after)
    return of_logits(forward(model, ids)[start - 1 : len(ids) - 1], ids[start:])


def forward(model, ids):
    """Logits [512, vocab]; padding behind a text changes nothing before it."""
    tokens = jnp.asarray([[*ids, *[0] * (512 - len(ids))]])
    return kvjax.forward(model.params, model.config, tokens)[0]


def on_compressed(model, context: str, after: str, policy: str = POLICY) -> tuple[float, bool]:
    """By the model's own methods: all but the last token of the context compressed, the rest fed."""
    ids, tail = model.tokenizer.encode(context), model.tokenizer.encode(after, add_bos=False)
    logits, _ = model.extend(model.prefill(ids[:-1], policy), [ids[-1], *tail[:-1]])
    return of_logits(logits[0], tail)


def test_full_likelihoods_are_the_models(model, choices):
    found = KVJax(model, batch_size=2).loglikelihood(choices, disable_tqdm=True)
    for request, (log, greedy) in zip(choices, found, strict=True):
        want, most_likely = directly(model, *request.args)
        assert log == pytest.approx(want, abs=2e-3) and greedy == most_likely
    assert {greedy for _, greedy in found} == {True, False}


def test_every_token_is_predicted_from_the_compressed_cache(model, choices):
    asked, lm = choices[:-1], KVJax(model, POLICY, batch_size=2)
    found = lm.loglikelihood(asked, disable_tqdm=True)
    for request, (log, greedy) in zip(asked, found, strict=True):
        want, most_likely = on_compressed(model, *request.args)
        assert log == pytest.approx(want, abs=2e-3) and greedy == most_likely
        assert abs(log - directly(model, *request.args)[0]) > 0.05
    info = lm.get_model_info()
    assert info["kv_cache_policy"] == POLICY
    quarter = 0.25 if model.params["embed"].dtype == jnp.bfloat16 else 0.5  # Against bfloat16.
    assert info["kv_cache_compression"] == pytest.approx(1 / quarter, rel=0.02)


@pytest.mark.parametrize("policy", ["knorm('25%B')", "cake('30%B')"])
def test_a_part_of_the_bytes_is_of_every_contexts_own(model, policy):
    """Beside longer ones too, and with padding."""
    ends = CONTEXTS[0][200:]
    asked = requests("loglikelihood", [(CONTEXTS[0], " 41"), (ends, " 41")])
    lm = KVJax(model, policy, batch_size=2)
    found = lm.loglikelihood(asked, disable_tqdm=True)
    for request, (log, _) in zip(asked, found, strict=True):
        assert log == pytest.approx(on_compressed(model, *request.args, policy)[0], abs=2e-3)
    against_bfloat16 = model.params["embed"].dtype.itemsize / 2
    assert lm.get_model_info()["kv_cache_compression"] * against_bfloat16 > 3.3


def test_whole_texts(model):
    text = ROWS[0]["text"]
    ids = model.tokenizer.encode(text)
    logits = forward(model, ids)[: len(ids)]
    want, _ = of_logits(logits[:-1], ids[1:])
    asked = requests("loglikelihood_rolling", [(text,)])
    (found,) = KVJax(model).loglikelihood_rolling(asked, disable_tqdm=True)
    assert found == pytest.approx(want, rel=1e-4)

    first, _ = of_logits(logits[:BLOCK], ids[1 : BLOCK + 1])  # Nothing stands before the first block.
    block = ids[BLOCK + 1 :]
    out, _ = model.extend(model.prefill(ids[:BLOCK], POLICY), [ids[BLOCK], *block[:-1]])
    rest, _ = of_logits(out[0], block)
    (found,) = KVJax(model, POLICY).loglikelihood_rolling(asked, disable_tqdm=True)
    assert found == pytest.approx(first + rest, rel=1e-4)
    assert found < want - 1


def test_answers_are_written_on_the_cache(model):
    options = {"until": ["\n"], "max_gen_toks": 20}
    contexts = [f"{context} " for context in CONTEXTS]
    asked = requests("generate_until", [(context, options) for context in contexts])
    found = KVJax(model, POLICY, batch_size=2).generate_until(asked, disable_tqdm=True)
    for context, text in zip(contexts, found, strict=True):
        ids = model.tokenizer.encode(context)
        (ids,) = model.generate([ids[-1:]], cache=model.prefill(ids[:-1], POLICY), max_new_tokens=20)
        assert text == model.tokenizer.decode(ids).split("\n")[0]
    (whole,) = KVJax(model).generate_until(asked[:1], disable_tqdm=True)
    assert whole.startswith(ROWS[0]["code"]) and not found[0].startswith(ROWS[0]["code"])


def test_drawn_answers_differ(model):
    options = {"until": [], "max_gen_toks": 12, "do_sample": True, "temperature": 1.5}
    np.random.seed(0)
    asked = requests("generate_until", [(CONTEXTS[0], options)] * 2)
    first, second = KVJax(model).generate_until(asked, disable_tqdm=True)
    assert first != second


def test_short_contexts_are_refused_or_stay_whole(model):
    asked = requests("loglikelihood", [("One two three", " four")])
    with pytest.raises(kvjax.PolicyError, match="whole_below=N"):
        KVJax(model, "snapkv(0.25)").loglikelihood(asked, disable_tqdm=True)
    lm = KVJax(model, "snapkv(0.25)", whole_below=32)
    assert lm.loglikelihood(asked, disable_tqdm=True) == KVJax(model).loglikelihood(asked, disable_tqdm=True)


def test_long_contexts_lose_their_beginning(model):
    ids, after = model.tokenizer.encode(CONTEXTS[0])[-61:], model.tokenizer.encode(" 41", add_bos=False)
    lm = KVJax(model, max_length=len(ids) + len(after) - 1)  # The last token is predicted, not fed.
    ((found, _),) = lm.loglikelihood(requests("loglikelihood", [(CONTEXTS[0], " 41")]), disable_tqdm=True)
    logits = forward(model, ids + after)[len(ids) - 1 : len(ids) + len(after) - 1]
    assert found == pytest.approx(of_logits(logits, after)[0], abs=2e-3)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"batch_size": "auto"}, "batch_size"),
        ({"block": 0}, "block"),
        ({"max_length": 10**6}, "max_length"),
        ({"policy": "snapvk(0.25)"}, "snapkv"),
    ],
)
def test_wrong_arguments_are_refused(model, options, message):
    with pytest.raises(ValueError, match=message):
        KVJax(model, **options)


def test_the_harness_finds_it():
    """By name once `kvjax.lm_eval` is imported, and by the entry point that newer harnesses look at."""
    assert get_model("kvjax") is KVJax and get_model("dummy")
    (entry,) = importlib.metadata.entry_points(group="lm_eval.models", name="kvjax")
    newer = Registry("model")
    newer.register("kvjax", target=entry)
    assert newer.get("kvjax") is KVJax


@pytest.mark.slow
def test_the_command(tmp_path):
    command = [sys.executable, "-m", "kvjax.lm_eval", "--model", "kvjax", "--model_args"]
    command += ["pretrained=tiny,policy=snapkv(0.25)", "--include_path", "tests/data/lm_eval", "--limit", "3"]
    command += ["--tasks", "kvjax_codes_written,kvjax_codes_chosen,kvjax_codes_read", "--output_path", str(tmp_path)]
    offline = {"HF_HOME": str(tmp_path / "cache"), "HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1"}
    environment = os.environ | quick.ENVIRONMENT | offline
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "kvjax_codes_written" in done.stdout
    (path,) = tmp_path.glob("*/results*.json")
    results = json.loads(path.read_text())
    assert results["config"]["kv_cache_policy"] == "snapkv(0.25)"
    assert results["results"]["kvjax_codes_written"]["exact_match,none"] > 0.5
    assert results["results"]["kvjax_codes_chosen"]["acc,none"] == 1.0
    assert results["results"]["kvjax_codes_read"]["word_perplexity,none"] > 1000
