"""Ada-KV and DuoAttention against the recorded output of the authors' code."""

import math

import numpy as np
import pytest

from tests.oracles import adakv, duo_attention, keydiff, knorm, snapkv
from tests.oracles.test_golden import PROMPT, close, golden, inputs, reading_inputs


def ada_inputs(kv_heads: int = 4, repeats: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """q [8, 192, 64], k [kv_heads * repeats, 192, 64]: the inputs rolled by 17 tokens, queries times 1.5."""
    q, k, _ = inputs(kv_heads=kv_heads)
    q, k = (np.concatenate([x[:, :1], np.roll(x[:, 1:], 17, axis=1)], axis=1) for x in (q, k))
    return 1.5 * q, np.repeat(k, repeats, axis=0)


MEAN_AVG = {"width": 7, "kind": "avg", "group": "mean"}
# Heads (and how often each is repeated), window, capacity with the window, floor, options of the scores, of the counts.
ADA = {
    "gqa_mean_avg": (4, 1, 32, 64, 0.2, MEAN_AVG, {}),
    "gqa_mean_avg_a0": (4, 1, 32, 64, 0.0, {**MEAN_AVG, "width": 5}, {}),
    "gqa_mean_avg_norm": (4, 1, 32, 64, 0.2, MEAN_AVG, {"normalize": True}),
    "gqa_max_avg_a05": (4, 1, 16, 56, 0.5, {**MEAN_AVG, "group": "max"}, {}),
    "gqa_mean_max": (4, 1, 32, 64, 0.2, {**MEAN_AVG, "kind": "max"}, {}),
    "nogqa_avg": (4, 2, 32, 64, 0.2, MEAN_AVG, {}),
    "nogqa_mha_avg_norm": (8, 1, 32, 64, 0.2, MEAN_AVG, {"normalize": True}),
}


def prefix_kept(data, tag: str, window: int) -> list[np.ndarray]:
    """Tokens before the window that each head kept, ascending."""
    kept = [np.sort(x[x >= 0]) for x in data[f"{tag}_kept"]]
    for x in kept:
        np.testing.assert_array_equal(x[-window:], np.arange(PROMPT - window, PROMPT))
    return [x[:-window] for x in kept]


def check_kept(data, tag: str, scores: np.ndarray, counts: np.ndarray, window: int) -> None:
    found = adakv.ada_snapkv_kept(scores, counts, window)
    for x, want in zip(found, prefix_kept(data, tag, window), strict=True):
        np.testing.assert_array_equal(x[:-window], want)


@pytest.mark.parametrize("tag", ADA)
def test_adakv_authors(tag):
    heads, repeats, window, capacity, floor, options, more = ADA[tag]
    data = golden("eviction_merging/adakv")
    q, k = ada_inputs(heads, repeats)
    scores = adakv.ada_snapkv_scores(q, k, window=window, **options)
    close(scores, data[f"{tag}_scores"][0])
    counts = adakv.blended_counts(scores, capacity - window, floor, **more)
    lens = data[f"{tag}_head_lens"]
    np.testing.assert_array_equal(data[f"{tag}_cu_klen"], np.concatenate([[0], np.cumsum(lens)]))
    if options["kind"] == "avg":
        np.testing.assert_array_equal(counts + window, lens)
        check_kept(data, tag, scores, counts, window)
        return
    # Max pooling makes ties at the cut: a head may win one of them more or less, and which it keeps is chance.
    assert np.abs(counts + window - lens).max() <= 1
    found = adakv.ada_snapkv_kept(scores, lens - window, window)
    for h, want in enumerate(prefix_kept(data, tag, window)):
        close(np.sort(scores[h, found[h][:-window]]), np.sort(scores[h, want]))


@pytest.mark.parametrize("layer", range(4))
def test_adakv_pyramid(layer):
    data, tag = golden("eviction_merging/adakv"), f"pyr_gqa_mean_avg_l{layer}"
    q, k = ada_inputs()
    scores = adakv.ada_snapkv_scores(q, k, **MEAN_AVG)
    close(scores, data[f"{tag}_scores"][0])
    counts = adakv.blended_counts(scores, adakv.pyramid_base(48, layer, 4, PROMPT - 32), 0.2)
    np.testing.assert_array_equal(counts + 32, data[f"{tag}_head_lens"])
    check_kept(data, tag, scores, counts, 32)


def test_adakv_exact_totals():
    """Largest remainders spend what the authors' rounding leaves or overspends, a slot a head at most."""
    q, k = ada_inputs()
    scores = adakv.ada_snapkv_scores(q, k, **MEAN_AVG)
    for base in range(1, 40):
        for floor in (0.0, 0.2, 0.5, 1.0):
            ours, theirs = (adakv.blended_counts(scores, base, floor, exact=exact) for exact in (True, False))
            assert ours.sum() == 4 * base
            assert np.abs(ours - theirs).max() <= 1
            assert (ours >= int(floor * base)).all()


@pytest.mark.parametrize(
    ("tag", "entries", "ratio", "floor"),
    [
        ("snap_w32_r0.6_a0.2", 1, 0.6, 0.2),
        ("snap_w32_r0.7_a0.5_b2", 2, 0.7, 0.5),
        ("knorm_r0.6_a0.2", 1, 0.6, 0.2),
        ("keydiff_r0.6_a0.0", 1, 0.6, 0.0),
    ],
)
def test_adakv_kvpress(tag, entries, ratio, floor):
    data = golden("eviction_merging/adakv_kvpress")
    for entry in range(entries):
        q, k, _ = inputs(entry)
        expected = data[f"{tag}_scores"][entry]
        if tag.startswith("snap"):
            scores = snapkv.snapkv_scores(q, k, window=32, width=5, window_score=expected[0, -1])
        else:
            scores = knorm.knorm_scores(k) if tag.startswith("knorm") else keydiff.keydiff_scores(k)
        close(scores, expected, atol=1e-6)
        keep = adakv.reserved_keep(scores, int(PROMPT * (1 - ratio)), floor)
        np.testing.assert_array_equal(keep, data[f"{tag}_keepmask"][entry] == 1)


# ---------------------------------------------------------------------------------------------------- DuoAttention


def test_duo_attention():
    data = golden("quantization_reading/duo_attention")
    q, k, v = reading_inputs()
    q, rows = q * float(data["query_scale"]), data["rows"]
    np.testing.assert_array_equal(duo_attention.streaming_mask(256, 16, 64), data["streaming_mask"])
    out = duo_attention.gated_attention(
        q[:, rows], k, v, data["gates"], sinks=16, recent=64, scale=1 / math.sqrt(64), q_positions=rows
    )
    close(out.transpose(1, 0, 2), data["mixed_out"], rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("sparsity", [0.5, 0.75])
def test_duo_retrieval_heads(sparsity):
    data = golden("quantization_reading/duo_attention")
    found = duo_attention.retrieval_heads(data["alpha_in"], sparsity)
    np.testing.assert_array_equal(found, data[f"heads_sparsity{sparsity}"] == 1)
    assert not duo_attention.retrieval_heads(data["alpha_in"], 1.0).any()
    assert duo_attention.retrieval_heads(data["alpha_in"], 0.0).all()


def test_duo_decoding_of_the_extremes():
    """All retrieval heads: full attention. All streaming: the mask's rows."""
    q, k, v = (x[:, :24] for x in reading_inputs())
    heads = np.ones(4, bool)
    arguments = {"prompt": 18, "sinks": 2, "recent": 6}
    full = duo_attention.gated_attention(q, k, v, np.ones(4), sinks=2, recent=6)
    streaming = duo_attention.gated_attention(q, k, v, np.zeros(4), sinks=2, recent=6)
    close(duo_attention.duo_decode(q, k, v, heads, **arguments), full[:, 18:])
    close(duo_attention.duo_decode(q, k, v, ~heads, **arguments), streaming[:, 18:])
    mixed = duo_attention.duo_decode(q, k, v, np.array([True, False, False, True]), **arguments)
    close(mixed[:2], full[:2, 18:])
    close(mixed[2:6], streaming[2:6, 18:])
