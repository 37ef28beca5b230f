"""D2O: merge instead of evict; against its oracle and the authors' code."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax.policies import Phase, PolicyError, decide
from kvjax.policies.merge import UNSET
from kvjax.policies.preference import Evenness, Proportional
from tests import tiny
from tests.methods.layer import compress, kept, spec, step, tokens
from tests.methods.test_against_oracles import DIM, LENGTHS, STEPS, TOLERANCE, decode, prompt, rotated
from tests.methods.test_cake import compressed, config_of, see, weights_of
from tests.oracles import d2o as oracle
from tests.oracles.test_golden import PROMPT, golden
from tests.oracles.test_golden_d2o import CASES, LAYER, expanded, sizes

# --- The authors' code ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tag", CASES)
def test_the_authors_layers(tag):
    """They round both halves of a layer's share down and leave layers 0, 1 and 5 whole; we deal out what is left."""
    data, layers = golden("eviction_merging/d2o"), expanded(tag)
    policy = kvjax.policy("d2o", sum(CASES[tag][1:]))
    config = config_of(6, 8, 8, 64)
    observed = see(policy, config, [[layer] for layer in layers], [PROMPT])
    np.testing.assert_allclose(-weights_of(policy, observed)[:, 0], data[f"{tag}_layer_v"], rtol=1e-3)
    _, slots = decide(kvjax.plan(policy, config, PROMPT, jnp.float32), observed)
    want = np.array([sum(size) for size in sizes(tag)])
    assert np.abs(np.asarray(slots)[:, 0, 0] - want).max() <= 2
    assert int(slots.sum()) == int(PROMPT * sum(CASES[tag][1:]) * 6)


@pytest.mark.parametrize("tag", CASES)
def test_the_authors_tokens_and_merging(tag):
    """Their first eviction comes with the first new token: a prompt that is one longer. Then seven more steps."""
    data, row = golden("eviction_merging/d2o"), expanded(tag)[LAYER]
    heavy, recent = sizes(tag)[LAYER]
    policy = kvjax.policy("d2o", heavy + recent, recent=recent)
    cache = compress(policy, spec(64), tokens([row], 0, PROMPT + 1)).reserve(1)
    for t in range(8):
        if t:
            _, cache = step(policy, spec(64), cache, tokens([row], PROMPT + t, PROMPT + t + 1))
        np.testing.assert_array_equal(kept(cache, 0, 8), data[f"{tag}_l2_kept"][t])
        np.testing.assert_allclose(cache.memo[0], data[f"{tag}_l2_thresholds"][t], rtol=1e-3)
        if t in (0, 7):
            for name in "kv":
                found = in_order(cache, getattr(cache, name), 0)[[0, 5]]
                want = data[f"{tag}_l2_merged_{name}_step{t + 1}"][0]
                np.testing.assert_allclose(found, want, rtol=1e-3, atol=1e-5)


def in_order(cache, leaf, row: int) -> np.ndarray:
    """A row's keys or values [H, n, D] by position."""
    pos = np.asarray(cache.pos[row])
    order = np.argsort(np.where(pos < 0, 10**6, pos), -1)[:, : (pos[0] >= 0).sum()]
    return np.take_along_axis(np.asarray(leaf[row]), order[..., None], 1)


# --- The oracle -------------------------------------------------------------------------------------------------------

BUDGET = 12
OPTIONS = [{}, {"weights": "softmax"}, {"alpha": 0.7, "beta": 0.3, "sinks": 2}]


@functools.cache
def by_oracle(option: int, row: int) -> list[oracle.Step]:
    return oracle.d2o_decode(*rotated()[row], prompt=LENGTHS[row], heavy=6, recent=6, **OPTIONS[option])


@pytest.mark.parametrize("option", range(len(OPTIONS)))
def test_against_the_oracle(option):
    """Ragged rows, grouped queries; the last prompt is shorter than the budget, so its first eviction is a step's."""
    policy = kvjax.policy("d2o", BUDGET, **OPTIONS[option])
    first = compress(policy, spec(DIM), prompt(rotated()))
    outputs, caches = decode(policy, first, rotated())
    merges = 0
    for row in range(len(LENGTHS)):
        want = by_oracle(option, row)
        for found, wanted in zip((first, *caches), want, strict=True):
            np.testing.assert_array_equal(kept(found, row), wanted.kept)
            np.testing.assert_allclose(in_order(found, found.k, row), wanted.k, atol=TOLERANCE)
            np.testing.assert_allclose(in_order(found, found.v, row), wanted.v, atol=TOLERANCE)
            if wanted.merged is None:
                assert found.memo[row] == UNSET
            else:
                np.testing.assert_allclose(found.memo[row], wanted.merged.threshold, atol=TOLERANCE)
                merges += np.abs(wanted.k - np.take_along_axis(rotated()[row][1], wanted.kept[..., None], 1)).max() > 0
        out = np.stack([wanted.output for wanted in want[1:] if wanted.output is not None], 1)
        np.testing.assert_allclose(outputs[row], out, atol=TOLERANCE)
    assert merges > STEPS  # Tokens were merged, not only dropped.


def test_a_long_prompt_is_compared_in_blocks(monkeypatch):
    policy = kvjax.policy("d2o", BUDGET)
    whole = compress(policy, spec(DIM), prompt(rotated()))
    monkeypatch.setattr("kvjax.policies.merge.BLOCK", 7)
    other = kvjax.policy("d2o", BUDGET, alpha=0.25)  # Another policy, so that it is compiled anew.
    blocks = compress(other, spec(DIM), prompt(rotated()))
    for x, y in ((whole.k, blocks.k), (whole.v, blocks.v), (whole.memo, blocks.memo)):
        np.testing.assert_allclose(x, y, atol=1e-6)


# --- What makes it D2O ------------------------------------------------------------------------------------------------


def test_layers_that_attend_evenly_get_more():
    """Layer 1 looks at all tokens alike in most heads, layer 0 at few."""
    rng = np.random.default_rng(5)
    q, k, v = (rng.normal(size=(heads, 40, 16)) for heads in (4, 2, 2))
    sharp = q * np.array([3.0, 3.0, 3.0, 0.0])[:, None, None]
    even = q * np.array([0.0, 0.0, 0.0, 3.0])[:, None, None]
    policy, config = kvjax.policy("d2o", 12), config_of(2, 4, 2, 16)
    cache = compressed(policy, see(policy, config, [[(sharp, k, v)], [(even, k, v)]], [40]))
    slots = [kept(layer, 0).shape[1] for layer in cache.layers]
    assert sum(slots) == 24 and slots[1] > slots[0]


def test_a_twin_is_merged_and_a_stranger_is_dropped():
    """Of two evicted tokens one has an equal that stays, the other is like nothing there."""
    rng = np.random.default_rng(6)
    k, v = rng.normal(size=(1, 12, 16)), rng.normal(size=(1, 12, 16))
    k[0, 5] = k[0, 0]  # The twin of a sink,
    k[0, 6] = -k[0].mean(0)  # and a stranger.
    q = np.zeros((1, 12, 16))  # Attention is even: the oldest heavy hitters stay.
    policy = kvjax.policy("d2o", 10, recent=5)
    cache = compress(policy, spec(16), tokens([(q, k, v)], 0, 12))
    np.testing.assert_array_equal(kept(cache, 0, 1)[0], [0, 1, 2, 3, 4, 7, 8, 9, 10, 11])
    np.testing.assert_allclose(in_order(cache, cache.v, 0)[0, 0], (v[0, 0] + v[0, 5]) / 2, rtol=1e-5)
    np.testing.assert_allclose(in_order(cache, cache.v, 0)[0, 1:], v[0, [1, 2, 3, 4, 7, 8, 9, 10, 11]], rtol=1e-5)


def test_merged_tokens_are_stored_rounded():
    """`d2o | int8`: what is merged while decoding is written by the codec, too."""
    plain = kvjax.policy("d2o", BUDGET)
    rounded = kvjax.parse_policy(f"d2o({BUDGET}) | int8")
    found, want = (decode(p, compress(p, spec(DIM), prompt(rotated())), rotated())[1][3] for p in (rounded, plain))
    assert jnp.int8 in [leaf.dtype for leaf in jax.tree.leaves(found.k)]
    for row in (0, 1):
        np.testing.assert_array_equal(kept(found, row), kept(want, row))
        decoded = in_order(found, found.codec.decode(found.k), row)
        np.testing.assert_allclose(decoded, in_order(want, want.k, row), atol=0.1)


def test_a_row_alone_is_the_row_in_a_batch():
    policy = kvjax.policy("d2o", BUDGET)
    cache = compress(policy, spec(DIM), prompt(rotated()))
    alone = compress(policy, spec(DIM), tokens(rotated()[1:2], 0, LENGTHS[1]))
    np.testing.assert_allclose(in_order(alone, alone.k, 0), in_order(cache, cache.k, 1), atol=1e-6)
    np.testing.assert_allclose(alone.memo[0], cache.memo[1], atol=1e-6)


def test_a_share_of_layers_goes_with_any_score():
    """What layers are weighed by is observed whatever the tokens are chosen by."""
    stage = kvjax.policy("knorm", 0.5).stages[0]
    policy = kvjax.Policy(stages=(dataclasses.replace(stage, allocate=Proportional(Evenness())),))
    assert policy.needs.column_spread and not policy.needs.column_sums
    cache = kvjax.prefill(tiny.params(), tiny.CONFIG, policy, tiny.TOKENS, tiny.LENGTHS)
    held = np.stack([np.asarray((layer.pos >= 0).sum(-1).max(-1)) for layer in tiny.full_layers(cache)])
    np.testing.assert_array_equal(held.sum(0), tiny.LENGTHS)  # Half of each of two layers.
    assert (held[0] != held[1]).any()


# --- Bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, message",
    [
        ({"recent": 1.5}, "share below 1"),
        ({"weights": "mean"}, "softmax"),
        ({"alpha": -1.0}, "not negative"),
        ({"phase": "never"}, "phase"),
    ],
)
def test_what_makes_no_sense_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        kvjax.policy("d2o", 0.5, **options)


def test_compositions_and_budgets_that_cannot_be():
    with pytest.raises(PolicyError, match="overwrites single ones"):
        kvjax.parse_policy("d2o(0.5) | kivi")
    kvjax.parse_policy("d2o(0.5, phase='prompt') | kivi")
    with pytest.raises(PolicyError, match="needs at least 5"):
        kvjax.plan(kvjax.policy("d2o", 4), tiny.CONFIG, 48, jnp.float32)
    with pytest.raises(ValueError, match="every=1"):
        stage = kvjax.policy("d2o", 0.5).stages[0]
        dataclasses.replace(stage, phase=Phase("step", every=4))


def test_merging_and_keeping_what_is_merged_do_not_go_together():
    with pytest.raises(PolicyError, match="merges the tokens"):
        kvjax.Policy(stages=kvjax.policy("d2o", 0.5).stages, store=kvjax.policy("mikv").store)
