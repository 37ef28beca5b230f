"""CAKE's oracle against the recorded output of the authors' code (tests/data/golden/README.md says which)."""

import functools

import numpy as np
import pytest

from tests.oracles import cake
from tests.oracles.test_golden import PROMPT, close, golden, inputs

LAYER_SCALE = (0.875, 1.0, 1.125, 1.25, 0.75, 1.375)
CASES = {  # size, window, tau1, tau2
    "c64_w32_tau1.6_0.4": (64, 32, 1.6, 0.4),
    "c64_w32_tau1_1": (64, 32, 1.0, 1.0),
    "c64_w32_casc": (64, 32, 1.6, 0.4),
    "c80_w16_casc": (80, 16, 1.0, 1.0),
    "c80_w16": (80, 16, 1.0, 1.0),
}


def pseudo_layer(x: np.ndarray, layer: int, *, queries: bool = False) -> np.ndarray:
    """x [heads, T, 64] as it is in a later layer: prompt tokens after the first rolled by 17, queries scaled."""
    y = x.copy()
    y[:, 1:PROMPT] = np.roll(x[:, 1:PROMPT], 17 * layer, axis=1)
    return y * LAYER_SCALE[layer] if queries else y


@functools.cache
def layers(
    number: int, entry: int = 0, kv_heads: int = 4, decode: bool = False
) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(q [8, T, 64], k, v [kv_heads, T, 64]) of every pseudo layer."""
    q, k, v = inputs(entry, kv_heads, decode)
    return [(pseudo_layer(q, i, queries=True), pseudo_layer(k, i), pseudo_layer(v, i)) for i in range(number)]


@pytest.mark.parametrize(("tag", "entries"), [("w32_g200", 1), ("w32_g200_b2", 2)])
def test_scores_and_statistics(tag, entries):
    data = golden("eviction_merging/cake")
    for layer in range(4):
        statistics = []
        for entry in range(entries):
            q, k, _ = layers(4, entry)[layer]
            close(cake.cake_scores(q, k), data[f"{tag}_evict_scores"][layer, entry])
            statistics.append(cake.cake_statistics(q, k))
        entropy, shift = np.sum(statistics, axis=0)  # The authors sum over the batch.
        close(np.array(cake.cake_preference(entropy, shift)), data[f"{tag}_pref_tau1"][layer])


@pytest.mark.parametrize("tag", CASES)
def test_prefill(tag):
    data = golden("eviction_merging/cake")
    size, window, tau1, tau2 = CASES[tag]
    stack = [(q, k) for q, k, _ in layers(4)]
    for (q, k), expected in zip(stack, data[f"{tag}_pref_scores"], strict=True):
        statistics = cake.cake_statistics(q, k, window=window)
        close(np.array(cake.cake_preference(*statistics, tau1=tau1, tau2=tau2)), expected)
    budgets, kept = cake.cake_prefill(stack, size=size, window=window, tau1=tau1, tau2=tau2)
    recorded = data[f"{tag}_budgets_after_each_layer"]
    assert budgets[-1] == recorded[-1].tolist()
    if "casc" in tag:
        assert budgets == [[budget for budget in row if budget >= 0] for row in recorded.tolist()]
    for layer in range(4):
        np.testing.assert_array_equal(kept[layer], data[f"{tag}_kept_l{layer}"][0])


def test_prefill_of_a_batch():
    data = golden("eviction_merging/cake")
    preferences = data["c64_w32_b2_pref_scores"].tolist()
    for entry in range(2):
        stack = [(q, k) for q, k, _ in layers(4, entry)]
        budgets, kept = cake.cake_prefill(stack, size=64, tau1=1.6, tau2=0.4, preferences=preferences)
        assert budgets[-1] == data["c64_w32_b2_budgets_after_each_layer"][-1].tolist()
        for layer in range(4):
            np.testing.assert_array_equal(kept[layer], data[f"c64_w32_b2_kept_l{layer}"][entry])


def test_budgets():
    """Case 4 gets more than a layer can hold: that is the authors' rule, not ours."""
    data = golden("eviction_merging/cake")
    names = ("adjust_in", "adjust_total", "adjust_seqlen", "adjust_out")
    for shares, total, most, expected in zip(*(data[name].tolist() for name in names), strict=True):
        assert cake.settle(shares, total, most) == expected


@pytest.mark.parametrize("layer", range(4))
def test_decode(layer):
    data = golden("eviction_merging/cake")
    q, k, _ = layers(4, decode=True)[layer]
    prompt = data[f"c64_w32_tau1.6_0.4_kept_l{layer}"][0]
    expected = data[f"c64_w32_tau1.6_0.4_decode_kept_l{layer}"][:, 0]
    for found, want in zip(cake.cake_decode(q, k, prompt, prompt=PROMPT), expected, strict=True):
        np.testing.assert_array_equal(found, want)


def test_decode_by_position():
    """Pooling over the text's neighbours, not over ranks, evicts others: one token a step, so at most eight here."""
    data = golden("eviction_merging/cake")
    shares = []
    for layer, (q, k, _) in enumerate(layers(4, decode=True)):
        prompt = data[f"c64_w32_tau1.6_0.4_kept_l{layer}"][0]
        expected = data[f"c64_w32_tau1.6_0.4_decode_kept_l{layer}"][:, 0]
        for found, want in zip(cake.cake_decode(q, k, prompt, prompt=PROMPT, by_position=True), expected, strict=True):
            shares += [len(set(a) & set(b)) / len(b) for a, b in zip(found, want, strict=True)]
    assert 0.95 < np.mean(shares) < 0.97
