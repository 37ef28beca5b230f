"""MiniCache, Quest and TidalDecode oracles against recorded output (tests/data/golden/README.md says whose)."""

import math

import numpy as np
import pytest

from tests.oracles import minicache, quest, tidaldecode
from tests.oracles.attention import attention
from tests.oracles.test_golden import close, golden, reading_inputs

PARALLEL = (10, 11)  # Rows whose directions are the same in both layers.


def pair() -> tuple[np.ndarray, np.ndarray]:
    """Two layers' vectors, [1, 96, 64] each."""
    data = golden("eviction_merging/minicache_slerp")
    return data["X1"][None].astype(np.float64), data["X2"][None].astype(np.float64)


# ------------------------------------------------------------------------------------------------------- MiniCache


@pytest.mark.parametrize("t", [0.5, 0.6])
def test_minicache_directions(t):
    data, (lower, upper) = golden("eviction_merging/minicache_slerp"), pair()
    merged = minicache.merge(lower, upper, t=t)
    close(merged.norms[:, 0], np.stack([data["norm1"], data["norm2"]]))
    expected = data[f"t{t}_g0.05_E"]
    apart = np.delete(np.arange(96), PARALLEL)
    close(merged.direction[0, apart], expected[apart], rtol=1e-4, atol=1e-6)
    # Of parallel rows xKV returns the mean of the vectors themselves, or a direction with the noise of an arc cosine.
    _, unit = minicache.polar(expected[list(PARALLEL)])
    close(merged.direction[0, list(PARALLEL)], unit, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("t", "gamma"), [(0.5, 0.05), (0.6, 0.05), (0.6, 0.5), (0.5, 1.0)])
def test_minicache_threshold(t, gamma):
    """xKV's threshold, counted from the other end of the range."""
    data, (lower, upper) = golden("eviction_merging/minicache_slerp"), pair()
    above = minicache.merge(lower, upper, t=t, gamma=1 - gamma).retained[0]
    np.testing.assert_array_equal(above, data[f"t{t}_g{gamma}_diverge_mask"].astype(bool))


def test_minicache_restored():
    """xKV restores the merged where its mask is set, and leaves the others: `retained` is its complement."""
    data, (lower, upper) = golden("eviction_merging/minicache_slerp"), pair()
    merged = minicache.merge(lower, upper)
    complement = ~data["t0.6_g0.05_diverge_mask"].astype(bool)[None]
    restored = minicache.restore(merged._replace(retained=complement), lower, upper)
    for found, name in zip(restored, ("E1", "E2"), strict=True):
        close(found[0], data[f"t0.6_g0.05_{name}"], rtol=1e-4, atol=1e-5)


def test_minicache_retains_the_most_distinct_and_nothing_is_lost_of_those():
    lower, upper = pair()
    merged = minicache.merge(lower, upper, gamma=0.2)
    angle = minicache.angles(minicache.polar(lower)[1], minicache.polar(upper)[1])
    assert 0 < merged.retained.sum() < 48
    assert angle[merged.retained].min() > angle[~merged.retained].max()
    for found, own in zip(minicache.restore(merged, lower, upper), (lower, upper), strict=True):
        np.testing.assert_array_equal(found[merged.retained], own[merged.retained])
        close(np.linalg.norm(found, axis=-1), np.linalg.norm(own, axis=-1))  # Magnitudes are kept by all.
    assert not minicache.merge(lower, upper, gamma=0.0).retained.any()


def test_minicache_decodes_as_full_attention_where_layers_agree():
    """Keys and values of the upper layer are multiples of the lower's: there is nothing to lose."""
    rng = np.random.default_rng(0)
    q, k, v = rng.normal(size=(4, 12, 8)), rng.normal(size=(2, 12, 8)), rng.normal(size=(2, 12, 8))
    lower, upper = (q, k, v), (q[::-1], 0.5 * k, 3.0 * v)
    for found, layer in zip(minicache.minicache_decode(lower, upper, prompt=7), (lower, upper), strict=True):
        np.testing.assert_allclose(found, attention(*layer)[:, 7:], atol=1e-9)


# ----------------------------------------------------------------------------------------------------------- Quest


@pytest.mark.parametrize(("length", "tokens"), [(256, 64), (251, 64), (251, 16)])
def test_quest(length, tokens):
    data, tag = golden("quantization_reading/quest"), f"n{length}_b{tokens}_c16"
    q, k, v = reading_inputs()
    q, k, v = q[:, length - 1] * float(data["query_scale"]), k[:, :length], v[:, :length]
    scores = np.repeat(quest.page_scores(q, k, 16), 16, axis=-1)[:, :length]
    close(scores, data[f"{tag}_page_score_per_token"], rtol=1e-5, atol=1e-5)
    mask = quest.quest_mask(q, k, tokens=tokens)
    np.testing.assert_array_equal(mask, data[f"{tag}_kept_mask"])
    close(quest.masked_attention(q, k, v, mask, scale=1 / math.sqrt(64)), data[f"{tag}_out"], rtol=1e-4, atol=2e-6)


def test_quest_bounds_are_bounds():
    q, k, _ = reading_inputs()
    bounds = np.repeat(quest.page_scores(q[:, 255], k, 16), 16, axis=-1)
    logits = np.stack([k[h // 2] @ q[h, 255] for h in range(8)])
    assert (bounds >= logits - 1e-9).all()


# ----------------------------------------------------------------------------------------------------- TidalDecode


@pytest.mark.parametrize("top", [16, 64])
def test_tidaldecode(top):
    data = golden("quantization_reading/tidaldecode")
    q, k, v = reading_inputs()
    q = q * float(data["query_scale"])
    turned = q[:, 254], k[::-1], v[::-1]  # Layers 3 and 9 of the record.
    layers = [turned] * 2 + [(q[:, 255], k, v)] + [turned] * 7
    outputs = tidaldecode.tidal_step(layers, top=top, start=2, correction=9)
    np.testing.assert_array_equal(tidaldecode.top_mask(q[:, 255], k, top), data[f"top{top}_mask"])
    np.testing.assert_array_equal(tidaldecode.top_mask(*turned[:2], top), data[f"top{top}_corrected_mask"])
    for layer, name in ((2, "selection"), (3, "sparse"), (9, "correction")):
        close(outputs[layer], data[f"top{top}_{name}_layer_out"], rtol=1e-4, atol=2e-6)


def test_tidaldecode_layers_before_it_starts_are_full_and_correction_renews_the_choice():
    rng = np.random.default_rng(1)
    shapes = (4, 20, 8), (2, 20, 8), (2, 20, 8)
    layers = [(rng.normal(size=shapes[0]), rng.normal(size=shapes[1]), rng.normal(size=shapes[2])) for _ in range(6)]
    outputs = tidaldecode.tidal_decode(layers, prompt=15, top=5, start=1, correction=4)
    full = [attention(*layer)[:, 15:] for layer in layers]
    for layer in (0, 1, 4):
        np.testing.assert_allclose(outputs[layer], full[layer], atol=1e-12)
    for layer, source in ((2, 1), (3, 1), (5, 4)):
        assert np.abs(outputs[layer] - full[layer]).max() > 1e-3
        (chooser, keys, _), (q, k, v) = layers[source], layers[layer]
        mask = tidaldecode.top_mask(chooser[:, 19], keys, 5)
        np.testing.assert_allclose(outputs[layer][:, -1], quest.masked_attention(q[:, 19], k, v, mask), atol=1e-12)
    everything = tidaldecode.tidal_decode(layers, prompt=15, top=20, start=1, correction=4)
    np.testing.assert_allclose(everything, full, atol=1e-12)
