"""ThinK against its oracle and against what the authors' code gave."""

import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax.cache import EMPTY
from kvjax.policies import Needs
from tests import tiny
from tests.methods.layer import KV_HEADS, compress, kept, spec, tokens
from tests.methods.test_against_oracles import DIM, LENGTHS, TOLERANCE, decode, prompt, rotated
from tests.oracles import snapkv, think
from tests.oracles.test_golden import golden, reading_inputs


def by_snapkv(q, k, budget):
    return snapkv.snapkv_kept(snapkv.snapkv_scores(q, k, window=6, width=3), window=6, budget=budget)


@pytest.mark.parametrize(
    "text, ratio, values, whole",
    [
        ("think(0.4, whole=5, window=6)", 0.4, 0.0, 5),
        ("snapkv(14, window=6, pool=3) | think(0.6, whole=4, window=6)", 0.6, 0.0, 4),
        ("snapkv(14, window=6, pool=3) | think(0.4, values=0.3, whole=0, window=6)", 0.4, 0.3, 0),
    ],
)
def test_oracle(text, ratio, values, whole):
    """Ragged rows, grouped queries, on all tokens and on what SnapKV leaves; decoded token by token."""
    policy = kvjax.parse_policy(text)
    cache = compress(policy, spec(DIM), prompt(rotated()))
    outputs, _ = decode(policy, cache, rotated())
    for row, n in enumerate(LENGTHS):
        q, k, v = rotated()[row]
        some = by_snapkv(q[:, :n], k[:, :n], 14) if "snapkv" in text else np.tile(np.arange(n), (KV_HEADS, 1))
        np.testing.assert_array_equal(kept(cache, row), some)
        options = {"ratio": ratio, "value_ratio": values, "recent": whole, "window": 6}
        want = think.think_decode(q, k, v, some, prompt=n, **options)
        np.testing.assert_allclose(outputs[row], want, atol=5 * TOLERANCE)


@pytest.mark.parametrize("kind, policy", [("snap", "snapkv(96)"), ("h2o", "snapkv(96, pool=1)")])
def test_authors(kind, policy):
    """Multi-head, as they run it. Their H2O sums over the last 32 queries only: SnapKV without pooling."""
    data = golden("quantization_reading/think")
    q, k, v = reading_inputs()
    k, v = (np.repeat(x, 2, axis=0) for x in (k, v))
    policy = kvjax.parse_policy(f"{policy} | think(0.4, whole=32)")
    thin, whole = compress(policy, spec(64, scale=1 / 8), tokens([(q, k, v)], 0, 256)).tiers
    mask = data[f"{kind}_keep_mask"][0]
    np.testing.assert_array_equal(thin.lens.index[0], np.stack([np.flatnonzero(row) for row in mask]))
    assert thin.inner.k.shape == (1, 8, 64, 39) and whole.k.shape == (1, 8, 32, 64)
    pruned = data["snap_key_pruned" if kind == "snap" else "h2o_key_pruned_h0_1"][0]
    for head, want in enumerate(pruned):  # They keep tokens in order of their scores.
        assert {row.tobytes() for row in np.asarray(thin.inner.k[0, head])} == {row.tobytes() for row in want}
    if kind == "snap":
        np.testing.assert_array_equal(whole.k[0, 0], data["snap_key_recent_h0"][0, 0])
        values = np.concatenate([thin.inner.v[0], whole.v[0]], 1)
        for head, want in enumerate(data["snap_values_h0_1"][0]):
            assert {row.tobytes() for row in values[head]} == {row.tobytes() for row in want}


def test_authors_ratios():
    data = golden("quantization_reading/think")
    q, k, v = reading_inputs()
    row = (q, np.repeat(k, 2, axis=0), np.repeat(v, 2, axis=0))
    for ratio in (0.4, 0.5):
        thin, _ = compress(kvjax.policy("think", ratio), spec(64), tokens([row], 0, 256)).tiers
        mask = data[f"keep_mask_r{ratio}"][0]
        np.testing.assert_array_equal(thin.lens.index[0], np.stack([np.flatnonzero(head) for head in mask]))


def test_channels_are_gone():
    """Dropped channels take no bytes; the newest tokens, and those that come, have all of theirs."""
    policy = kvjax.policy("think", 0.5, values=0.25, whole=8, window=6)
    cache = compress(policy, spec(DIM), prompt(rotated()))
    thin, whole = cache.tiers
    assert thin.inner.k.shape == (3, KV_HEADS, 32, 8) and thin.inner.v.shape == (3, KV_HEADS, 32, 12)
    assert whole.k.shape == whole.v.shape == (3, KV_HEADS, 8, DIM)
    pos, keys, values = (np.asarray(x) for x in cache.held(spec(DIM)))
    for row, n in enumerate(LENGTHS):
        for x, full in ((keys, rotated()[row][1]), (values, rotated()[row][2])):
            for head in range(KV_HEADS):
                slots = {int(p): x[row, head, s] for s, p in enumerate(pos[row, head]) if p != EMPTY}
                assert sorted(slots) == list(range(n))
                old = np.stack([slots[p] for p in range(max(n - 8, 0))] or [np.zeros(DIM)])
                assert ((old == 0).all(0)).sum() >= (8 if x is keys else 4)
                for p in range(max(n - 8, 0), n):
                    np.testing.assert_array_equal(slots[p], full[head, p].astype(np.float32))


def test_padding_scores_nothing():
    """A row's channels are the same whatever stands beside it, and however few queries it has."""
    policy = kvjax.policy("think", 0.5, whole=2, window=16)
    together = compress(policy, spec(DIM), prompt(rotated()))
    for row, n in enumerate(LENGTHS):
        alone = compress(policy, spec(DIM), tokens([rotated()[row]], 0, n))
        np.testing.assert_array_equal(together.tiers[0].lens.index[row], alone.tiers[0].lens.index[0])
        want = think.kept_channels(think.channel_scores(*(x[:, :n] for x in rotated()[row][:2]), window=16), 0.5)
        np.testing.assert_array_equal(alone.tiers[0].lens.index[0], np.stack([np.flatnonzero(x) for x in want]))


def test_only_its_own_window_scores():
    """One observation feeds many policies, some of which ask for more queries."""
    policy = kvjax.policy("think", 0.5, whole=2, window=4)
    alone, beside = (
        kvjax.compress(
            kvjax.plan(policy, tiny.CONFIG, tiny.LENGTHS, jnp.float32),
            kvjax.observe(tiny.params(), tiny.CONFIG, tiny.TOKENS, tiny.LENGTHS, needs=Needs(window=window)),
        )
        for window in (4, 12)
    )
    np.testing.assert_array_equal(alone.layers[0].tiers[0].lens.index, beside.layers[0].tiers[0].lens.index)


@pytest.mark.parametrize(
    "text, message",
    [
        ("think(1.0)", "Shares of channels"),
        ("think(0.4, values=-0.1)", "Shares of channels"),
        ("think(0.4, window=0)", "window positive"),
        ("h2o(0.5) | think(0.4)", "evicts while decoding"),
        ("think(0.4) | snapkv(0.5)", "evict first, then store"),
        ("think(0.4) | kivi", "a token is stored once"),
    ],
)
def test_bad_input(text, message):
    with pytest.raises(kvjax.PolicyError, match=message):
        kvjax.parse_policy(text)
