"""D2O's oracle against the recorded output of the authors' code (tests/data/golden/README.md says which)."""

import functools

import numpy as np
import pytest

from tests.oracles import d2o
from tests.oracles.test_golden import PROMPT, close, golden
from tests.oracles.test_golden_cake import layers

# KV heads, ratio of heavy hitters, ratio of recent tokens. The authors expand grouped keys to all query heads.
CASES = {"mha_01_01": (8, 0.1, 0.1), "gqa_015_01": (4, 0.15, 0.1)}
LAYER = 2  # The one that is recorded in full.


def sizes(tag: str) -> list[tuple[int, int]]:
    """Heavy and recent slots of every layer, from the recorded ratios: both are of the prompt and its first token."""
    data = golden("eviction_merging/d2o")
    ratios = zip(data[f"{tag}_layer_hh_ratio"], data[f"{tag}_layer_recent_ratio"], strict=True)
    return [(int((PROMPT + 1) * heavy), int((PROMPT + 1) * recent)) for heavy, recent in ratios]


def expanded(tag: str) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(q, k, v [8, 200, 64]) of the six pseudo layers."""
    kv_heads = CASES[tag][0]
    return [
        (q, np.repeat(k, 8 // kv_heads, 0), np.repeat(v, 8 // kv_heads, 0))
        for q, k, v in layers(6, kv_heads=kv_heads, decode=True)
    ]


@functools.cache
def decoded(tag: str) -> list[d2o.Step]:
    heavy, recent = sizes(tag)[LAYER]
    return d2o.d2o_decode(*expanded(tag)[LAYER], prompt=PROMPT + 1, heavy=heavy, recent=recent)


@pytest.mark.parametrize("tag", CASES)
def test_budgets_of_layers(tag):
    data = golden("eviction_merging/d2o")
    _, heavy, recent = CASES[tag]
    variations = [d2o.d2o_variation(q[:, :PROMPT], k[:, :PROMPT]) for q, k, _ in expanded(tag)]
    close(np.array(variations), data[f"{tag}_layer_v"])
    ratios = np.array(d2o.d2o_ratios(variations, heavy + recent))
    close(ratios * heavy / (heavy + recent), data[f"{tag}_layer_hh_ratio"])
    close(ratios * recent / (heavy + recent), data[f"{tag}_layer_recent_ratio"])
    for layer, size in enumerate(data[f"{tag}_sizes"].T.tolist()):
        whole = layer in (0, 1, 5)  # Which the authors leave alone.
        assert size[1:] == ([PROMPT + 1 + t for t in range(8)] if whole else [sum(sizes(tag)[layer])] * 8)


@pytest.mark.parametrize("tag", CASES)
def test_first_eviction(tag):
    data = golden("eviction_merging/d2o")
    q, k, _ = expanded(tag)[LAYER]
    until = PROMPT + 1
    scores = d2o.attention_weights(q[:, :until], k[:, :until]).sum(axis=1)
    recorded = data[f"{tag}_l2_scores_candidates"]
    close(scores[:, 4 : recorded.shape[1]], recorded[:, 4:])
    assert np.isinf(recorded[:, :4]).all()
    merged = decoded(tag)[0].merged
    assert merged is not None
    close(merged.similarity, data[f"{tag}_l2_maxsim"][0])
    np.testing.assert_array_equal(merged.nearest, data[f"{tag}_l2_maxidx"][0])


@pytest.mark.parametrize("tag", CASES)
def test_decode(tag):
    data = golden("eviction_merging/d2o")
    steps = decoded(tag)
    assert len(steps) == 8
    np.testing.assert_array_equal([step.kept for step in steps], data[f"{tag}_l2_kept"])
    close(np.array([step.merged.threshold for step in steps if step.merged]), data[f"{tag}_l2_thresholds"])
    for step, number in ((steps[0], 1), (steps[-1], 8)):
        for x, name in ((step.k, "k"), (step.v, "v")):
            close(x[[0, 5]], data[f"{tag}_l2_merged_{name}_step{number}"][0], atol=2e-6)


def test_merging_of_the_paper():
    """Weights e^cosine, e for the kept one, that add up to one: unlike the code's they leave equal tokens alone."""
    x = np.array([[[1.0, 0.0], [1.0, 0.0], [0.0, 2.0], [0.6, 0.8]]])
    slots = np.array([[0, 2]])
    paper = d2o.merge(x, x, slots, -1.0, alpha=1.0, beta=0.0, weights="softmax")  # Everything is merged.
    np.testing.assert_allclose(paper.similarity, [[1.0, 0.8]])
    np.testing.assert_allclose(paper.k[0, 0], [1, 0])
    share = np.exp(0.8) / (np.e + np.exp(0.8))
    np.testing.assert_allclose(paper.v[0, 1], (1 - share) * x[0, 2] + share * x[0, 3])
    code = d2o.merge(x, x, slots, -1.0, alpha=1.0, beta=0.0)
    np.testing.assert_allclose(code.k[0, 1], (x[0, 2] + 0.8 * x[0, 3]) / 2)
