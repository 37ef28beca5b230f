"""Every oracle against the recorded output of the authors' code (tests/data/golden/README.md says whose and which)."""

import functools
import math
from pathlib import Path

import numpy as np
import pytest

from tests.oracles import chunkkv, expected_attention, h2o, keydiff, kivi, knorm, pyramidkv, snapkv, tova
from tests.oracles.attention import attention, rope
from tests.oracles.top_k import top_k

DATA = Path(__file__).parents[1] / "data" / "golden"
PROMPT = 192  # tokens of the eviction inputs before the eight decode tokens


@functools.cache
def golden(name: str) -> dict[str, np.ndarray]:
    """The arrays of one file, e.g. "eviction_merging/snapkv"."""
    with np.load(DATA / f"{name}.npz") as file:
        return {key: file[key] for key in file.files}


def second(x: np.ndarray) -> np.ndarray:
    """Batch entry 1 of the golden inputs: heads rolled by 2, prompt tokens after the first by 61."""
    y = np.roll(x, 2, axis=0)
    y[:, 1:PROMPT] = np.roll(y[:, 1:PROMPT], 61, axis=1)
    return y


def inputs(entry: int = 0, kv_heads: int = 4, decode: bool = False) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """q [8, T, 64], k, v [kv_heads, T, 64] of one batch entry; T is 192, or 200 with the decode tokens."""
    q, k, v = (golden("eviction_merging/inputs")[name][0].astype(np.float64) for name in ("q", "k8", "v8"))
    if entry:
        q, k, v = second(q), second(k), second(v)
    length = None if decode else PROMPT
    step = 8 // kv_heads
    return q[:, :length], k[::step, :length], v[::step, :length]


def short24() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The multi-head inputs cut to a prompt of 24 and 40 decode tokens."""
    q, k, v = inputs(kv_heads=8)
    return q[:, :64], k[:, :64], v[:, :64]


def close(actual: np.ndarray, expected: np.ndarray, rtol: float = 2e-5, atol: float = 1e-7) -> None:
    """The golden arrays are float32, the oracles float64."""
    np.testing.assert_allclose(actual, expected, rtol=rtol, atol=atol)


def same_tokens(actual: np.ndarray, expected: np.ndarray) -> None:
    """Kept sets are equal in every row."""
    np.testing.assert_array_equal(actual, np.sort(expected, axis=-1))


# ---------------------------------------------------------------------------------------------------------- SnapKV


@pytest.mark.parametrize(
    ("tag", "entries", "kv_heads", "window", "capacity", "width", "kind"),
    [
        ("avg_b1_gqa", 1, 4, 32, 64, 5, "avg"),
        ("avg_b2_gqa", 2, 4, 32, 64, 5, "avg"),
        ("max_b1_gqa", 1, 4, 32, 64, 7, "max"),
        ("max_b1_mha", 1, 8, 32, 64, 7, "max"),
        ("avg_b1_mha_w16", 1, 8, 16, 48, 5, "avg"),
    ],
)
def test_snapkv_authors(tag, entries, kv_heads, window, capacity, width, kind):
    data = golden("eviction_merging/snapkv")
    for entry in range(entries):
        q, k, _ = inputs(entry, kv_heads)
        scores = snapkv.snapkv_prefix_scores(
            q, k, window=window, width=width, kind=kind, votes="sum", per_query_head=True
        )
        expected = data[f"{tag}_scores"][entry]
        close(scores, expected)
        kept = snapkv.snapkv_kept(np.pad(scores, ((0, 0), (0, window))), window=window, budget=capacity)
        expected_kept = np.sort(data[f"{tag}_kept"][entry], axis=-1)
        if kind == "avg":
            same_tokens(kept, expected_kept)
            continue
        # Max pooling makes exact ties at the cut: compare the scores of the kept prefix tokens, not the set.
        prefix = capacity - window
        ours, theirs = (np.take_along_axis(expected, x[:, :prefix], axis=1) for x in (kept, expected_kept))
        close(np.sort(ours, axis=-1), np.sort(theirs, axis=-1))


def test_snapkv_kvpress():
    data = golden("eviction_merging/snapkv_kvpress")
    for tag, entries in (("w32_k5_b1_r0.6", 1), ("w32_k5_b2_r0.6", 2)):
        for entry in range(entries):
            q, k, _ = inputs(entry)
            expected = data[f"{tag}_scores"][entry]
            scores = snapkv.snapkv_scores(q, k, window=32, width=5, window_score=expected[0, -1])
            close(scores, expected)
            same_tokens(snapkv.snapkv_kept(scores, window=32, budget=76), data[f"{tag}_kept"][entry])
            if entries == 1:
                close(snapkv.snapkv_scores(q, k, window=32, width=5), expected)


# ------------------------------------------------------------------------------------------------------- PyramidKV


def test_pyramidkv_budgets():
    data = golden("eviction_merging/pyramidkv")
    names = [name for name in data if name.startswith("budget_")]
    assert len(names) == 12
    for name in names:
        parts = dict((part.rstrip("0123456789."), part) for part in name.split("_")[1:])
        ratio, window = float(parts["r"][1:]), int(parts["w"][1:])
        beta = float(parts["beta"][4:]) if "beta" in parts else 20
        length, layers = (int(parts["T"][1:]), int(parts["L"][1:])) if "T" in parts else (PROMPT, 4)
        budgets = pyramidkv.pyramidkv_budgets(layers, length, length * (1 - ratio), window=window, beta=beta)
        assert budgets == data[name].tolist(), name


@pytest.mark.parametrize(("tag", "ratio", "window", "beta"), [("r0.6_w8_beta5", 0.6, 8, 5), ("r0.5_w32", 0.5, 32, 20)])
def test_pyramidkv_kept(tag, ratio, window, beta):
    data = golden("eviction_merging/pyramidkv")
    q, k, _ = inputs()
    close(snapkv.snapkv_scores(q, k, window=window), data[f"{tag}_l0_scores"][0])
    budgets = pyramidkv.pyramidkv_budgets(4, PROMPT, PROMPT * (1 - ratio), window=window, beta=beta)
    for layer in range(4):
        same_tokens(pyramidkv.pyramidkv_kept(q, k, layer, budgets, window=window), data[f"{tag}_l{layer}_kept"][0])


# ------------------------------------------------------------------------------------------------------------- H2O


@pytest.mark.parametrize(
    ("tag", "heavy", "recent"), [("hh20_rec20", 20, 20), ("hh40_rec8", 40, 8), ("short24_hh6_rec6", 6, 6)]
)
def test_h2o_real_drop(tag, heavy, recent):
    data = golden("eviction_merging/h2o_realdrop")
    short = tag.startswith("short24")
    q, k, v = short24() if short else inputs(kv_heads=8, decode=True)
    prompt = 24 if short else PROMPT
    candidates = h2o.h2o_scores(q[:, :prompt], k[:, :prompt])[:, : prompt - recent]
    close(candidates, data[f"{tag}_prefill_scores_candidates"])
    steps = h2o.h2o_decode(q, k, v, prompt=prompt, heavy=heavy, recent=recent)
    np.testing.assert_array_equal(np.stack(steps.kept), data[f"{tag}_kept"])
    close(np.stack(steps.scores), data[f"{tag}_scores"])


@pytest.mark.parametrize(("tag", "heavy", "recent"), [("r10", 19, 19), ("r25_12", 48, 23), ("short24_r25", 6, 6)])
def test_h2o_simulation(tag, heavy, recent):
    data = golden("eviction_merging/h2o_sim")
    short = tag.startswith("short24")
    q, k, v = short24() if short else inputs(kv_heads=8, decode=True)
    prompt = 24 if short else PROMPT
    close(h2o.h2o_scores(q[:, :prompt], k[:, :prompt])[:, : prompt - recent], data[f"{tag}_raw_prefill_scores"])
    scores, masks, outputs = h2o.h2o_sim(q, k, v, prompt=prompt, heavy=heavy, recent=recent)
    for step, (score, mask, output) in enumerate(zip(scores, masks, outputs, strict=True)):
        n = prompt + step
        close(score, data[f"{tag}_scores"][step][:, :n])
        np.testing.assert_array_equal(mask, data[f"{tag}_mask_next"][step][:, : n + 1])
        close(output, data[f"{tag}_last_out"][step], rtol=1e-4, atol=2e-6)


# ------------------------------------------------------------------------------------- TOVA, Knorm, KeyDiff (kvpress)


@pytest.mark.parametrize(("tag", "entries", "kv_heads"), [("b1_r0.6", 1, 4), ("b2_r0.75", 2, 4), ("b1_mha_r0.6", 1, 8)])
def test_tova(tag, entries, kv_heads):
    data = golden("eviction_merging/tova")
    for entry in range(entries):
        q, k, _ = inputs(entry, kv_heads)
        expected, kept = data[f"{tag}_scores"][entry], data[f"{tag}_kept"][entry]
        scores = tova.tova_scores(q, k, last_score=expected[0, -1])
        close(scores, expected)
        same_tokens(tova.tova_kept(scores, kept.shape[-1]), kept)
        if entries == 1:
            close(tova.tova_scores(q, k), expected)


@pytest.mark.parametrize("score", [knorm.knorm_scores, keydiff.keydiff_scores])
@pytest.mark.parametrize(("tag", "entries"), [("b1_r0.6", 1), ("b2_r0.75", 2)])
def test_key_scores(score, tag, entries):
    data = golden(f"eviction_merging/{score.__name__.removesuffix('_scores')}")
    for entry in range(entries):
        _, k, _ = inputs(entry)
        close(score(k), data[f"{tag}_scores"][entry], atol=1e-6)
        kept = data[f"{tag}_kept"][entry]
        same_tokens(top_k(score(k), kept.shape[-1]), kept)


# ---------------------------------------------------------------------------------------------- Expected Attention


@pytest.mark.parametrize(
    ("tag", "entries", "options"),
    [
        ("default", 1, {}),
        ("b2", 2, {}),
        ("nocov", 1, {"use_covariance": False}),
        ("novnorm", 1, {"use_vnorm": False}),
        ("nf128_eps", 1, {"future": 128, "epsilon": 0.01}),
        ("sink8", 1, {"sinks": 8}),
    ],
)
def test_expected_attention(tag, entries, options):
    data = golden("eviction_merging/expected_attention")
    for entry in range(entries):
        q, k, v = inputs(entry)
        expected = data[f"{tag}_scores"][entry]
        known = {name: value for name, value in options.items() if name in ("sinks", "future")}
        close(expected_attention.query_statistics(q, **known).mean, data[f"{tag}_mu"][entry], atol=1e-5)
        scores = expected_attention.expected_attention_scores(q, k, v, sink_score=expected[0, 0], **options)
        close(scores, expected, rtol=1e-4)
        same_tokens(expected_attention.expected_attention_kept(scores, 76), data[f"{tag}_kept"][entry])
        if entries == 1:
            close(expected_attention.expected_attention_scores(q, k, v, **options), expected, rtol=1e-4)


def test_expected_attention_statistics():
    data = golden("eviction_merging/expected_attention")
    covariance = expected_attention.query_statistics(inputs()[0]).covariance
    close(covariance[0], data["default_cov_h0"][0], rtol=1e-4, atol=1e-5)
    close(np.stack([np.diag(c) for c in covariance]), data["cov_diag"][0], rtol=1e-4, atol=1e-5)


def test_rope_angles():
    """The mean of cos and sin over positions 192..703, recovered from rotated unit vectors."""
    data = golden("eviction_merging/expected_attention")
    rotated = rope(np.tile(np.eye(64)[:32, None], (1, 512, 1)), np.arange(192, 704)).mean(axis=1)  # [32, 64]
    close(rotated[np.arange(32), np.arange(32)], data["avg_cos"][:32], atol=2e-5)
    close(rotated[np.arange(32), np.arange(32) + 32], data["avg_sin"][:32], atol=2e-5)


# --------------------------------------------------------------------------------------------------------- ChunkKV


@pytest.mark.parametrize(
    ("tag", "entries", "chunk", "ratio", "inner"),
    [
        ("snap_c20_r0.6", 1, 20, 0.6, functools.partial(snapkv.snapkv_scores, window=32)),
        ("snap_c16_r0.7", 1, 16, 0.7, functools.partial(snapkv.snapkv_scores, window=16)),
        ("snap_c10_r0.8_b2", 2, 10, 0.8, functools.partial(snapkv.snapkv_scores, window=32)),
        ("knorm_c20_r0.5", 1, 20, 0.5, lambda q, k: knorm.knorm_scores(k)),
    ],
)
def test_chunkkv(tag, entries, chunk, ratio, inner):
    data = golden("eviction_merging/chunkkv")
    for entry in range(entries):
        q, k, _ = inputs(entry)
        expected = data[f"{tag}_scores"][entry]
        options = {"window_score": expected[0, -1]} if entries > 1 else {}
        scores = inner(q, k, **options)
        close(scores, expected, atol=1e-6)
        close(chunkkv.chunk_scores(scores, chunk), data[f"{tag}_chunk_scores"][entry], atol=1e-6)
        chunks = chunkkv.chunks_for_ratio(PROMPT, chunk, ratio)
        kept = chunkkv.chunkkv_kept(scores, chunk=chunk, chunks=chunks)
        # kvpress gives entry 1 the chunks of entry 0; here these are the last three of the window for both.
        same_tokens(kept, np.tile(data[f"{tag}_kept"][entry], (4, 1)))


def test_chunkkv_of_each_entry():
    """With more chunks the two entries part: each follows its own (recorded) chunk scores."""
    recorded = golden("eviction_merging/chunkkv")["snap_c10_r0.8_b2_chunk_scores"]
    kept = []
    for entry in range(2):
        q, k, _ = inputs(entry)
        kept.append(chunkkv.chunkkv_kept(snapkv.snapkv_scores(q, k, window=32), chunk=10, chunks=9)[0])
        np.testing.assert_array_equal(np.unique(kept[entry] // 10), np.sort(np.argsort(-recorded[entry])[:9]))
    assert not np.array_equal(*kept)


# ------------------------------------------------------------------------------------------------------------ KIVI


def reading_inputs() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """q [8, 256, 64], k, v [4, 256, 64] of the quantization and reading methods."""
    names = (("inputs_q", "query"), ("inputs", "key"), ("inputs_v", "value"))
    q, k, v = (golden(f"quantization_reading/{file}")[name][0].astype(np.float64) for file, name in names)
    return q, k, v


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("side", ["k", "v"])
def test_kivi(side, bits):
    data = golden("quantization_reading/kivi")
    _, k, v = reading_inputs()
    x, axis = (k, -2) if side == "k" else (v, -1)
    quantized = (kivi.quantize_keys if side == "k" else kivi.quantize_values)(x, bits)
    expected = {name: data[f"{side}{bits}_{name}"][0] for name in ("codes", "scale", "zero")}
    close(quantized.scale, expected["scale"], rtol=1e-6)
    close(quantized.zero, expected["zero"], rtol=0, atol=0)
    # float64 and float32 round a value differently only when it lies on a tie between two codes.
    exact = (x - np.repeat(quantized.zero, 32, axis)) / np.repeat(quantized.scale, 32, axis)
    differ = quantized.codes != expected["codes"]
    assert np.abs(exact[differ] % 1 - 0.5).max(initial=0.0) < 1e-4
    assert differ.mean() < 1e-3
    dequantized = data[f"{side}{bits}_dequant_h0"][0, 0]
    length = len(dequantized)
    step = np.where(differ[0, :length], np.repeat(quantized.scale, 32, axis)[0, :length], 0.0)
    assert (np.abs(kivi.dequantize(quantized, 32, axis)[0, :length] - dequantized) <= step + 1e-5).all()


def test_kivi_packing():
    data = golden("quantization_reading/kivi")
    np.testing.assert_array_equal(kivi.pack(data["k2_codes"], 2)[:, :1], data["k2_packed_int32_h0"])


# ------------------------------------------------------------------------------------------------------- attention


def test_attention():
    """DuoAttention's record of full attention, and of sinks (16) beside a window (64) at original positions."""
    data = golden("quantization_reading/duo_attention")
    q, k, v = reading_inputs()
    q = q * float(data["query_scale"])
    rows = data["rows"]
    for name, options in (("full_out", {}), ("streaming_out", {"window": 64, "sinks": 16})):
        out = attention(q[:, rows], k, v, scale=1 / math.sqrt(64), q_positions=rows, **options)
        close(out.transpose(1, 0, 2), data[name], rtol=1e-4, atol=2e-6)
