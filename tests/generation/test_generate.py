"""Prefill, extension, sampling and decoding on a tiny model: every way to the same tokens gives the same tokens."""

import dataclasses

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

import kvjax
from kvjax.generation import sample, stream, with_room
from kvjax.generation.extend import ROOM
from kvjax.generation.sample import filter_logits
from kvjax.model import bucket
from kvjax.models.params import stack_layers
from tests import tiny
from tests.tiny import CONFIG, LENGTHS, QUESTION, QUESTION_LENGTHS, TOKENS

FULL = kvjax.policy("full")
NEW = 8  # Tokens that are generated, everywhere.


@pytest.fixture(scope="module")
def model() -> kvjax.Model:
    return tiny.model()


def greedy(tokens, lengths=None, **options):
    out, count = kvjax.generate(tiny.params(), CONFIG, FULL, tokens, lengths, max_new_tokens=NEW, **options)
    return np.asarray(out), np.asarray(count)


def by_forward(rows: list[list[int]]) -> np.ndarray:
    """Greedy continuations without any cache: the whole text again for every token."""
    rows = [list(row) for row in rows]
    for _ in range(NEW):
        padded = np.zeros((len(rows), 64), np.int32)
        for i, row in enumerate(rows):
            padded[i, : len(row)] = row
        lengths = jnp.asarray([len(row) for row in rows], jnp.int32)
        logits = np.asarray(kvjax.forward(tiny.params(), CONFIG, padded, lengths))
        for i, row in enumerate(rows):
            row.append(int(logits[i, len(row) - 1].argmax()))
    return np.array([row[-NEW:] for row in rows])


# --- Decoding ---------------------------------------------------------------------------------------------------------


def test_generation_is_the_model_again_and_again():
    prompts = [TOKENS[i, :n].tolist() for i, n in enumerate(LENGTHS)]
    out, count = greedy(TOKENS, LENGTHS)
    np.testing.assert_array_equal(out, by_forward(prompts))
    assert count.tolist() == [NEW] * 4


def test_a_question_on_a_cache_is_the_whole_text():
    cache = kvjax.prefill(tiny.params(), CONFIG, FULL, TOKENS, LENGTHS)
    out, _ = greedy(QUESTION, QUESTION_LENGTHS, cache=cache)
    texts = [[*TOKENS[i, :n], *QUESTION[i, :m]] for i, (n, m) in enumerate(zip(LENGTHS, QUESTION_LENGTHS, strict=True))]
    np.testing.assert_array_equal(out, by_forward(texts))


def test_a_cache_answers_many_questions():
    """Extending and generating leave it as it was."""
    cache = kvjax.prefill(tiny.params(), CONFIG, FULL, TOKENS, LENGTHS)
    before = [np.array(leaf) for leaf in jax.tree.leaves(cache)]
    first, _ = greedy(QUESTION, QUESTION_LENGTHS, cache=cache)
    other, _ = greedy(QUESTION[:, ::-1], QUESTION_LENGTHS, cache=cache)
    again, _ = greedy(QUESTION, QUESTION_LENGTHS, cache=cache)
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    for leaf, was in zip(jax.tree.leaves(cache), before, strict=True):
        np.testing.assert_array_equal(leaf, was)


@pytest.mark.parametrize(
    "text", ["full", "h2o(0.5)", "streaming_llm(20)", "snapkv(0.5, window=4) | kivi(group=16, residual=16)"]
)
def test_stream_is_generate(text):
    policy, prompt = kvjax.parse_policy(text), TOKENS[:1]
    want, _ = kvjax.generate(tiny.params(), CONFIG, policy, prompt, max_new_tokens=NEW)
    assert list(stream(tiny.params(), CONFIG, policy, prompt, max_new_tokens=NEW)) == want[0].tolist()
    assert list(stream(tiny.params(), CONFIG, policy, prompt, max_new_tokens=5)) == want[0, :5].tolist()
    # And extending by hand, token by token.
    logits, cache = kvjax.prefill_logits(tiny.params(), CONFIG, policy, prompt)
    cache = with_room(cache, NEW)
    for token in want[0].tolist():
        assert int(logits[0].argmax()) == token
        logits, cache = kvjax.extend(tiny.params(), CONFIG, policy, cache, np.array([[token]]), last_only=True)


def test_stop_tokens_end_a_row():
    free, _ = greedy(TOKENS, LENGTHS)
    # A token that comes up in the middle of a row.
    middle = next(int(free[i, t]) for i in range(4) for t in range(2, NEW - 1) if free[i, t] not in free[i, :t])
    stop = (middle, 127)
    out, count = greedy(TOKENS, LENGTHS, stop=stop)
    for row in range(4):
        ends = [t for t in range(NEW) if free[row, t] in stop]
        n = ends[0] + 1 if ends else NEW
        assert count[row] == n  # The stop token counts.
        np.testing.assert_array_equal(out[row, :n], free[row, :n])
        assert (out[row, n:] == 0).all()
    assert ((count > 1) & (count < NEW)).any() and (count == NEW).any()
    streamed = list(stream(tiny.params(), CONFIG, FULL, TOKENS[:1], max_new_tokens=NEW, stop=stop))
    assert streamed == out[0, : count[0]].tolist()


def test_a_stop_token_is_not_fed_to_the_cache():
    free, _ = greedy(TOKENS, LENGTHS)
    logits, cache = kvjax.prefill_logits(tiny.params(), CONFIG, FULL, TOKENS, LENGTHS)
    _, count, _, done, cache = kvjax.decode(
        tiny.params(), CONFIG, FULL, with_room(cache, NEW), logits, jax.random.key(0), jnp.zeros(4, bool),
        max_new_tokens=NEW, stop=(int(free[0, 2]),),
    )  # fmt: skip
    np.testing.assert_array_equal(cache.seen, LENGTHS + np.asarray(count) - np.asarray(done))


@pytest.mark.parametrize(
    "types, text",
    [
        (("full", "full", "sliding"), "full"),
        (("full", "full", "sliding"), "snapkv(0.5, window=4)"),
        (CONFIG.layer_types, "minicache(start=0)"),  # What layers share comes and goes between them.
    ],
)
def test_stacked_layers_decode_alike(types, text):
    """Like layers under `lax.scan`, those of other kinds one by one."""
    config, policy = dataclasses.replace(CONFIG, layer_types=types), kvjax.parse_policy(text)
    stacked = stack_layers(tiny.params(), config)
    a, _ = kvjax.generate(tiny.params(), config, policy, TOKENS, LENGTHS, max_new_tokens=NEW)
    b, _ = kvjax.generate(stacked, config, policy, TOKENS, LENGTHS, max_new_tokens=NEW)
    np.testing.assert_array_equal(a, b)


def test_extend_in_chunks(monkeypatch):
    from kvjax.generation import extend as module_function
    from kvjax.generation.extend import extend_hidden

    assert module_function is kvjax.extend
    cache = with_room(kvjax.prefill(tiny.params(), CONFIG, FULL, TOKENS, LENGTHS), QUESTION.shape[1])
    valid = np.arange(QUESTION.shape[1]) < QUESTION_LENGTHS[:, None]
    whole, after = extend_hidden(tiny.params(), CONFIG, FULL, cache, QUESTION, valid)
    pieces, chunked = extend_hidden(tiny.params(), CONFIG, FULL, cache, QUESTION, valid, chunk=4)
    np.testing.assert_allclose(np.asarray(pieces)[valid], np.asarray(whole)[valid], atol=2e-5)
    for row in range(4):
        assert tiny.kept(after, row) == tiny.kept(chunked, row)


def test_room_comes_in_blocks():
    cache = kvjax.prefill(tiny.params(), CONFIG, FULL, TOKENS, LENGTHS)
    assert cache.room == 0 and with_room(cache, 0) is cache
    assert with_room(cache, 1).room == ROOM and with_room(cache, ROOM + 1).room == 2 * ROOM
    ring = kvjax.prefill(tiny.params(), CONFIG, kvjax.policy("window", 12), TOKENS, LENGTHS)
    assert ring.room is None and with_room(ring, 999) is ring  # Old tokens make way.


# --- Sampling ---------------------------------------------------------------------------------------------------------

LOGITS = st.lists(st.floats(-8, 8, width=32, allow_subnormal=False), min_size=6, max_size=6, unique=True).map(np.array)
allowed = jax.jit(filter_logits, static_argnums=1)


@pytest.mark.parametrize(
    "top_k, top_p, min_p", [(3, 1.0, 0.0), (0, 0.7, 0.0), (0, 1.0, 0.2), (4, 0.5, 0.01), (99, 1.0, 0.0), (1, 0.9, 1.0)]
)
@given(LOGITS)
@settings(max_examples=30)
def test_what_a_sampler_allows(top_k, top_p, min_p, logits):
    sampler = kvjax.Sampler(temperature=0.5, top_k=top_k, top_p=top_p, min_p=min_p)
    found = np.asarray(allowed(jnp.asarray(logits, jnp.float32), sampler))
    want = np.asarray(logits, np.float32).astype(np.float64) / 0.5
    order = np.argsort(-want)
    keep = set(order[: top_k or 6].tolist())
    p = np.exp(want - want.max())
    keep &= {i for i in range(6) if p[i] >= min_p - 1e-6}
    slack = {i for i in range(6) if abs(p[i] - min_p) < 1e-5}  # At the edge a last bit decides.
    if top_p < 1:  # Of what is left, renormalized.
        mass, chosen = 0.0, set()
        left = [i for i in order.tolist() if i in keep]
        total = sum(p[i] for i in left)
        for i in left:
            if mass < top_p:
                chosen.add(i)
            slack |= {i} if abs(mass - top_p) < 1e-5 else set()
            mass += p[i] / total
        keep = chosen
    got = set(np.flatnonzero(np.isfinite(found)).tolist())
    assert got ^ keep <= slack and int(order[0]) in got
    np.testing.assert_allclose(found[sorted(got)], want[sorted(got)], rtol=1e-6)


def test_samples_follow_the_probabilities():
    logits = jnp.log(jnp.asarray([0.5, 0.3, 0.15, 0.05]))
    draws = np.asarray(sample(jnp.tile(logits, (4000, 1)), jax.random.key(0), kvjax.Sampler(temperature=1.0)))
    np.testing.assert_allclose(np.bincount(draws) / 4000, [0.5, 0.3, 0.15, 0.05], atol=0.03)
    cold = np.asarray(sample(jnp.tile(logits, (4000, 1)), jax.random.key(0), kvjax.Sampler(temperature=0.5)))
    want = np.array([0.5, 0.3, 0.15, 0.05]) ** 2
    np.testing.assert_allclose(np.bincount(cold, minlength=4) / 4000, want / want.sum(), atol=0.03)
    top = np.asarray(sample(jnp.tile(logits, (500, 1)), jax.random.key(1), kvjax.Sampler(temperature=1.0, top_k=2)))
    assert set(top.tolist()) == {0, 1}
    assert np.asarray(sample(logits, jax.random.key(1), kvjax.Sampler())) == 0


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"temperature": -1.0}, "temperature must be 0"),
        ({"top_k": -1}, "top_k must be 0"),
        ({"top_p": 0.0}, "top_p must be above 0"),
        ({"top_p": 1.1}, "top_p must be above 0"),
        ({"min_p": 1.5}, "min_p must be between"),
    ],
)
def test_a_sampler_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        kvjax.Sampler(**fields)


def test_randomness_comes_from_the_key_alone():
    sampler = kvjax.Sampler(temperature=1.0)
    with pytest.raises(ValueError, match=r"needs a key: pass key=jax.random.key\(seed\)"):
        greedy(TOKENS, LENGTHS, sampler=sampler)
    with pytest.raises(ValueError, match="needs a key"):
        next(stream(tiny.params(), CONFIG, FULL, TOKENS[:1], sampler=sampler))
    one, two, other = (greedy(TOKENS, LENGTHS, sampler=sampler, key=jax.random.key(s))[0] for s in (0, 0, 1))
    np.testing.assert_array_equal(one, two)
    assert (one != other).any()


# --- The model's own methods ------------------------------------------------------------------------------------------


def test_prompts_are_what_people_have(model):
    rows = [TOKENS[i, :n].tolist() for i, n in enumerate(LENGTHS)]
    tokens, lengths = model.encode(rows)
    assert tokens.shape == (4, bucket(48)) and lengths.tolist() == LENGTHS.tolist()
    assert [tokens[i, :n].tolist() for i, n in enumerate(lengths)] == rows
    for prompt in (rows[0], np.array(rows[0]), np.array([rows[0]]), jnp.asarray(rows[0]), [np.array(rows[0])]):
        np.testing.assert_array_equal(model.encode(prompt)[0], tokens[:1])
    single = model.generate(rows[0], max_new_tokens=NEW, stop=())
    batch = model.generate(rows, max_new_tokens=NEW, stop=())
    assert isinstance(single[0], int) and batch[0] == single and len(batch) == 4
    assert batch == greedy(TOKENS, LENGTHS)[0].tolist()
    assert list(model.stream(rows[0], max_new_tokens=NEW)) == [t for t in single if t not in CONFIG.eos_ids][:NEW]


def test_the_question_comes_after_compression(model):
    cache = model.prefill(TOKENS[0], "snapkv(0.5, window=4)")
    logits, after = model.extend(cache, QUESTION[0])
    assert logits.shape == (1, 6, CONFIG.vocab_size) and after.seen.tolist() == [54] and cache.seen.tolist() == [48]
    answer = model.generate(QUESTION[0], cache=cache, max_new_tokens=NEW, stop=())
    assert answer[0] == int(logits[0, -1].argmax())
    assert list(model.stream(QUESTION[0], cache=cache, max_new_tokens=4)) == answer[:4]
    stopped = model.generate(QUESTION[0], cache=cache, max_new_tokens=NEW, stop=(answer[3],))
    assert stopped == answer[: answer.index(answer[3])]  # Without the stop token.


@pytest.mark.parametrize("prompt", ["", [], [[]], [[3], []], np.zeros((0,), np.int32), [""]], ids=repr)
def test_an_empty_prompt_is_refused(model, prompt):
    with pytest.raises(ValueError, match="prompt is empty|no tokenizer"):
        model.encode(prompt)


@pytest.mark.parametrize(
    "prompt, message",
    [
        ([3, 128], "Token id 128 is out of range: this model's ids are 0 to 127"),
        ([[3], [-1]], "Token id -1 is out of range"),
        ([5] * 513, "The prompt has 513 tokens; this model's context is 512"),
        (np.zeros(3), "Token ids are integers, got float64"),
        ("text", "no tokenizer: give token ids"),
    ],
)
def test_a_prompt_is_refused_before_anything_is_computed(model, prompt, message):
    for call in (model.encode, model.prefill, model.generate, lambda prompt: list(model.stream(prompt))):
        with pytest.raises(ValueError, match=message):
            call(prompt)


def test_what_else_is_refused(model):
    cache = model.prefill(TOKENS[0])
    with pytest.raises(ValueError, match="one of cache and policy"):
        model.generate([3], cache=cache, policy="full")
    with pytest.raises(ValueError, match="max_new_tokens must be at least 1, got 0"):
        model.generate([3], max_new_tokens=0)
    with pytest.raises(ValueError, match="2 prompts on a cache of 1 sequences"):
        model.extend(cache, [[3], [4]])
    with pytest.raises(ValueError, match="500 tokens and 64 new ones exceed this model's context of 512"):
        model.generate([3] * 500)
    with pytest.raises(ValueError, match="498 tokens and 64 new ones exceed"):
        model.generate([3] * 450, cache=cache)
    with pytest.raises(ValueError, match="548 tokens and 0 new ones"):
        model.extend(cache, [3] * 500)
    with pytest.raises(kvjax.PolicyError, match="Unknown method"):
        model.prefill([3], "snapvk(0.5)")


def test_buckets():
    assert [bucket(n) for n in (1, 64, 65, 512, 513, 2000)] == [64, 64, 128, 512, 640, 2048]
    assert all(n <= bucket(n) <= max(64, n * 1.25 + 64) and bucket(bucket(n)) == bucket(n) for n in range(1, 5000))
