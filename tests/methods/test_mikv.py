"""MiKV against its oracle."""

import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax.cache import EMPTY
from kvjax.policies import Needs
from tests import tiny
from tests.methods.layer import KV_HEADS, compress, kept, spec
from tests.methods.test_against_oracles import DIM, LENGTHS, STEPS, TOLERANCE, decode, prompt, rotated
from tests.oracles import mikv
from tests.oracles.attention import attention


def important(cache, row: int) -> np.ndarray:
    return kept(cache.high, row)


@pytest.mark.parametrize("bits, balance, recent", [(2, True, 6), (4, True, 3), (2, False, 6)])
def test_oracle(bits, balance, recent):
    """Ragged rows, grouped queries, budget in tokens: who is demoted when, what is stored of him, what queries get."""
    policy = kvjax.policy("mikv", 12, bits=bits, balance=balance, recent=recent, scale_dtype="float32")
    cache = compress(policy, spec(DIM), prompt(rotated()))
    outputs, caches = decode(policy, cache, rotated())
    for row, length in enumerate(LENGTHS):
        q, k, v = rotated()[row]
        want = mikv.mikv_decode(q, k, v, prompt=length, heavy=12 - recent, recent=recent, bits=bits, balance=balance)
        np.testing.assert_allclose(outputs[row], want.outputs, atol=5 * TOLERANCE)
        for step, now in enumerate((cache, *caches)):
            np.testing.assert_array_equal(important(now, row), want.important[step])
        pos, *found = (np.asarray(x[row]) for x in caches[-1].held(spec(DIM)))
        order = np.argsort(np.where(pos == EMPTY, 10**6, pos), -1)[:, : length + STEPS]
        np.testing.assert_array_equal(np.take_along_axis(pos, order, 1), np.tile(np.arange(length + STEPS), (2, 1)))
        for x, y in zip(found, (want.keys[-1], want.values[-1]), strict=True):
            np.testing.assert_allclose(np.take_along_axis(x, order[..., None], 1), y, atol=5 * TOLERANCE)


def test_a_share_is_of_the_prompt():
    policy = kvjax.policy("mikv", 0.25)
    cache = compress(policy, spec(DIM), prompt(rotated()))
    _, caches = decode(policy, cache, rotated())
    for now in (cache, caches[-1]):
        assert np.asarray(now.high.count).max(-1).tolist() == [10, 6, 2]
    assert cache.low.inner.capacity == 30 and cache.low.inner.k.codes.shape == (3, KV_HEADS, 30, 1)


def test_better_than_eviction():
    """The paper's point: at the same important tokens, a few bits of the others beat none."""
    q, k, v = rotated()[0]
    full = attention(q, k, v)[:, LENGTHS[0] :]
    errors = []
    for text in ("h2o(8)", "mikv(8, bits=2)", "mikv(8, bits=4)", "mikv(8, bits=8)"):
        policy = kvjax.parse_policy(text)
        outputs, _ = decode(policy, compress(policy, spec(DIM), prompt(rotated())), rotated())
        errors.append(np.abs(outputs[0] - full).mean())
    assert errors == sorted(errors, reverse=True) and errors[1] < 0.7 * errors[0] and errors[3] < 0.02


def test_balancer_helps_outlier_channels():
    """One key channel thirty times the others spoils its group, unless the query's share of it is taken over."""
    sequences = []
    for q, k, v in rotated():
        k, q = k.copy(), q.copy()
        k[..., 3], q[..., 3] = 30 * k[..., 3], q[..., 3] / 30
        sequences.append((q, k, v))
    full = attention(*sequences[0])[:, LENGTHS[0] :]
    errors = []
    for balance in (True, False):
        policy = kvjax.policy("mikv", 8, bits=4, balance=balance)
        outputs, _ = decode(policy, compress(policy, spec(DIM), prompt(sequences)), sequences)
        errors.append(np.abs(outputs[0] - full).mean())
    assert errors[0] < 0.5 * errors[1]


def test_important_tokens_in_more_bits():
    policy = kvjax.policy("mikv", 12, bits=2, important_bits=8)
    cache = compress(policy, spec(DIM), prompt(rotated()))
    assert cache.high.k.bits == 8
    rough, _ = decode(policy, cache, rotated())
    policy = kvjax.policy("mikv", 12, bits=2)
    exact, _ = decode(policy, compress(policy, spec(DIM), prompt(rotated())), rotated())
    assert 0 < np.abs(rough - exact).mean() < 0.05


def test_padding_balances_nothing():
    policy = kvjax.policy("mikv", 12)
    together = compress(policy, spec(DIM), prompt(rotated()))
    for row, n in enumerate(LENGTHS):
        q, k, _ = rotated()[row]
        np.testing.assert_allclose(together.low.lens.factor[row], mikv.balancer(q[:, :n], k[:, :n]), rtol=1e-5)


def test_unbalanced_whatever_was_observed():
    """One observation feeds many policies: that it holds extremes does not mean that this one asked for them."""
    needs = Needs(column_sums=True, extremes=True)
    observed = kvjax.observe(tiny.params(), tiny.CONFIG, tiny.TOKENS, tiny.LENGTHS, needs=needs)
    for balance in (True, False):
        policy = kvjax.policy("mikv", 8, balance=balance)
        cache = kvjax.compress(kvjax.plan(policy, tiny.CONFIG, tiny.LENGTHS, jnp.float32), observed)
        assert bool((cache.layers[0].low.lens.factor == 1).all()) != balance


def test_everything_important_is_full_attention():
    answers = []
    for policy in (kvjax.policy("mikv", 4096), kvjax.policy("full")):
        cache = kvjax.prefill(tiny.params(), tiny.CONFIG, policy, tiny.TOKENS, tiny.LENGTHS)
        logits, _ = kvjax.extend(tiny.params(), tiny.CONFIG, policy, cache, tiny.QUESTION, tiny.QUESTION_LENGTHS)
        answers.append(np.asarray(logits)[np.arange(6) < tiny.QUESTION_LENGTHS[:, None]])
    np.testing.assert_allclose(*answers, atol=2e-5)


def test_bytes_bound_it():
    """A budget in bytes counts the demoted tokens too."""
    full = kvjax.prefill(tiny.params(), tiny.CONFIG, kvjax.policy("full"), tiny.TOKENS[:1])
    policy = kvjax.policy("mikv", kvjax.Budget(bytes=int(0.8 * full.nbytes)))
    cache = kvjax.prefill(tiny.params(), tiny.CONFIG, policy, tiny.TOKENS[:1])
    assert 0.75 * full.nbytes < cache.reserve(1).nbytes <= 0.8 * full.nbytes
    with pytest.raises(kvjax.PolicyError, match="too few"):
        kvjax.plan(kvjax.policy("mikv", "2KiB"), tiny.CONFIG, 40, jnp.float32)


@pytest.mark.parametrize(
    "text, message",
    [
        ("mikv(0.2, bits=3)", "bits are 2, 4 or 8"),
        ("mikv(0.2, bits=4, important_bits=4)", "must be more than bits=4"),
        ("mikv(0.2, recent=1.5)", "recent is a share below 1"),
        ("mikv(0.2) | kivi", "a token is stored once"),
        ("mikv(0.2) | snapkv(0.1)", "evict first"),
    ],
)
def test_bad_input(text, message):
    with pytest.raises(kvjax.PolicyError, match=message):
        kvjax.parse_policy(text)
