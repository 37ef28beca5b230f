"""The house model "tiny": it loads without a network and finds what it is asked for in 1,024 tokens."""

import math
import random
import re
import socket

import jax
import jax.numpy as jnp
import pytest

import kvjax
from kvjax.evaluation import make_task
from kvjax.evaluation.tasks import library_text

CONTEXT, SAMPLES = 1024, 10


@pytest.fixture(scope="module")
def tiny():
    return kvjax.load("tiny")


def share_right(model, questions):
    """Of (prompt with its question, answer), how many are answered to the last digit: greedy, with the full cache."""
    written = model.generate(
        [prompt for prompt, _ in questions], max_new_tokens=max(len(answer) for _, answer in questions), stop=()
    )
    right = [out[: len(answer)] == answer for out, (_, answer) in zip(written, questions, strict=True)]
    return sum(right) / len(right)


def test_loads_without_network(monkeypatch):
    def refuse(*_):
        raise AssertionError("The house model needs no network.")

    monkeypatch.setattr(socket, "socket", refuse)
    model = kvjax.load("tiny", dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(model.params)} == {jnp.dtype("bfloat16")}
    assert (model.config.num_heads, model.config.num_kv_heads, model.config.num_layers) == (8, 4, 6)
    assert set(model.config.layer_types) == {"full"}
    assert model.tokenizer is not None and model.tokenizer.vocab_size == model.config.vocab_size == 2048
    text = "def f(x):\n    return x * 1234  # naïve"
    assert model.tokenizer.decode(model.tokenizer.encode(text), skip_special=True) == text
    assert len(model.tokenizer.encode("1234", add_bos=False)) == 4  # Digits stand alone: numbers are copied by digits.


def test_finds_needles(tiny):
    samples = make_task("needle", context=CONTEXT, count=SAMPLES, needles=1, seed=0).samples(tiny)
    assert share_right(tiny, [([*s.context_ids, *s.question_ids], list(s.answers[0])) for s in samples]) >= 0.95


def test_finds_pairs(tiny):
    """Lines "word: 12345" fill the context; one of the words is begun again."""
    words = sorted(set(re.findall(r"\b[a-z]{4,8}\b", library_text())))
    questions = []
    for i in range(SAMPLES):
        chance = random.Random(f"pairs/{i}")
        lines, ids = [], [tiny.config.bos_id]
        for word in chance.sample(words, len(words)):
            line = (word, str(chance.randrange(10_000, 100_000)))
            more = tiny.tokenizer.encode("{}: {}\n".format(*line), add_bos=False)
            if len(ids) + len(more) > CONTEXT:
                break
            lines.append(line)
            ids += more
        word, value = chance.choice(lines)
        asked, answer = (tiny.tokenizer.encode(text, add_bos=False) for text in (f"{word}: {value}", value))
        questions.append((ids + asked[: -len(answer)], answer))
    assert share_right(tiny, questions) >= 0.95


def test_answers_end(tiny):
    """An answer is followed by a line break, so that it can be told from what comes after."""
    prompt = (
        "The library keeps its records in order, and every visitor may ask for them.\n"
        "The secret code of Helsinki is 90417.\nSome visitors ask twice.\n"
        "Question: What is the secret code of Helsinki?\nAnswer: "
    )
    assert tiny.generate(prompt, max_new_tokens=6) == "90417\n"


def test_knows_its_language(tiny):
    """Of text that it was not trained on: this one."""
    text = (
        "The module provides a function that returns the value of the given object. If the argument is not a string, "
        "a TypeError is raised. The default value is None, which means that the list will be empty. When the method "
        "is called with a sequence, it returns a new instance of the class, and the items of the sequence are used "
        "as the arguments of the function.\n"
    )
    ids = jnp.asarray([tiny.tokenizer.encode(text)], jnp.int32)
    logs = jax.nn.log_softmax(kvjax.forward(tiny.params, tiny.config, ids)[0, :-1])
    loss = -float(jnp.take_along_axis(logs, ids[0, 1:, None], -1).mean())
    assert math.exp(loss) < 30  # A model that knows nothing: 2,048.
