"""Oracles of methods with fewer bits or channels: against the authors' recorded output, and against what they must
equal in the limit. (`tests/data/golden/README.md` says whose code was run.)"""

import numpy as np
import pytest

from tests.oracles import gear, h2o, mikv, snapkv, think
from tests.oracles.attention import attention, gather
from tests.oracles.test_golden import close, golden, reading_inputs

GROUP = 32


def half(x: np.ndarray) -> np.ndarray:
    """Rounded to float16, as the authors' `gears_*` return it."""
    return x.astype(np.float16).astype(np.float64)


# ------------------------------------------------------------------------------------------------------------- GEAR


def block(side: str, start=None, **options) -> tuple[np.ndarray, np.ndarray]:
    """A side of the golden inputs, and how it reads back."""
    _, k, v = reading_inputs()
    x, compress = (k, gear.gear_keys) if side == "key" else (v, gear.gear_values)
    return x, compress(x, start, **{"group": GROUP, **options})


@pytest.mark.parametrize("side", ["key", "value"])
def test_gear_backbone(side):
    data = golden("quantization_reading/gear")
    x, found = block(side, sparsity=0)
    close(found[:1, :64], data[f"D_{side}"][0], atol=1e-5)
    column = ("key", "value").index(side)
    for row, bits in enumerate((2, 3, 4)):
        error = np.linalg.norm(block(side, sparsity=0, bits=bits)[1] - x)
        assert error == pytest.approx(float(data["D_fro_error_bits234"][row, column]), rel=1e-4)


@pytest.mark.parametrize("side", ["key", "value"])
def test_gear_outliers(side):
    data = golden("quantization_reading/gear")
    x, found = block(side)
    close(half(found)[:1], data[f"DS_{side}"][0], rtol=1e-3, atol=1e-5)
    column = ("key", "value").index(side)
    for row, (bits, levels) in enumerate(((2, 3), (3, 8), (4, 15))):
        error = np.linalg.norm(half(block(side, bits=bits, levels=levels)[1]) - x)
        assert error == pytest.approx(float(data["DS_fro_error_bits234"][row, column]), rel=1e-4)


def test_gear_counts_outliers_of_keys_by_tokens():
    """Which the authors' code does not: at 256 tokens and 256 channels in all the two counts are the same."""
    data = golden("quantization_reading/gear")
    _, k, _ = reading_inputs()
    assert gear.count_outliers(256, 0.02) == 2 and gear.count_outliers(128, 0.02) == 1
    found = gear.gear_keys(k[:, :128], None, group=GROUP, per_side=2)
    close(half(found)[:1, :64], data["DS_key_T128"][0], rtol=1e-3, atol=1e-5)
    exact = (half(found) == k[:, :128]).sum(1)
    # Some more entries are exact by chance; a rounding of float16 may go either way.
    assert np.abs(exact - data["DS_key_T128_exact_count"][0]).max() <= 2 and exact.min() >= 4


@pytest.mark.parametrize("side", ["key", "value"])
def test_gear_low_rank(side):
    data = golden("quantization_reading/gear")
    start = data[f"gear_{side}_p_init"][0]
    x, found = block(side, start)
    # Not rounded in between as theirs is: within the house's tolerance.
    assert np.abs(found[0] - data[f"gear_{side}"][0, 0]).max() < 1e-3 * np.abs(x[0]).max()
    rounded = half(block(side)[1])
    found = rounded + gear.low_rank(x - rounded, start, 3)
    close(found[:1], data[f"gear_{side}"][0], rtol=1e-5, atol=1e-5)
    close(np.linalg.norm(found - x, axis=-1), data[f"gear_{side}_err_norm"][0], rtol=1e-5, atol=1e-6)
    x, found = block(side, data[f"gearL_{side}_p_init"][0], sparsity=0)
    close(found[:1, :64], data[f"gearL_{side}"][0], rtol=1e-5, atol=1e-5)
    close(np.linalg.norm(found - x, axis=-1), data[f"gearL_{side}_err_norm"][0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("side", ["key", "value"])
def test_gear_one_group_for_a_vector(side):
    data = golden("quantization_reading/gear")
    x, found = block(side, group=0, sparsity=0)
    close(np.linalg.norm(found - x, axis=-1), data[f"kcvt_{side}_err_norm"][0], rtol=1e-4, atol=1e-5)
    if side == "key":
        close(found[:1, :64], data["kcvt_key_t64"][0], atol=1e-5)


def test_gear_blocks():
    """Every part brings the cache nearer to what it stands for, and blocks come and go when they should."""
    q, k, v = (x[:, :100] for x in reading_inputs())
    rng = np.random.default_rng(0)
    first, later = (rng.random((2, 4, 64, 2)) for _ in range(2))
    starts = {"starts": tuple(first), "later": tuple(later)}
    options = {"prompt": 70, "buffer": 32, "group": GROUP, "sparsity": 0.07, **starts}
    keys, values = gear.gear_cache(k, v, **options)
    for x, y in ((keys, k), (values, v)):
        assert ((x == y).all((0, 2)) == (np.arange(100) >= 96)).all()
    none = {"starts": (None, None), "later": (None, None)}
    plain, _ = gear.gear_cache(k, v, **{**options, **none, "sparsity": 0})
    sparse, _ = gear.gear_cache(k, v, **{**options, **none})
    errors = [np.linalg.norm(x - k) for x in (plain, sparse, keys)]
    assert errors[0] > errors[1] > errors[2]
    full = attention(q, k, v)[:, 70:]
    rough, fine = (np.abs(gear.gear_decode(q, k, v, bits=bits, **options) - full).max() for bits in (2, 8))
    assert rough > fine and fine < 0.03


# ------------------------------------------------------------------------------------------------------------ ThinK


def test_think_channels():
    data = golden("quantization_reading/think")
    q, k, _ = reading_inputs()
    scores = think.channel_scores(q, k, per_query_head=True)
    close(scores, data["channel_score"][0], rtol=1e-5)
    for ratio in (0.4, 0.5):
        np.testing.assert_array_equal(think.kept_channels(scores, ratio), data[f"keep_mask_r{ratio}"][0])


def after_eviction(kind: str):
    """Keys and values that SnapKV or H2O has left to every query head, and the mask of their channels."""
    q, k, v = reading_inputs()
    k, v = (np.repeat(x, 2, axis=0) for x in (k, v))
    width = 5 if kind == "snap" else 1
    votes = snapkv.snapkv_scores(q, k, window=32, width=width, votes="sum", per_query_head=True, window_score=0.0)
    kept = snapkv.snapkv_kept(votes, window=32, budget=96)
    keys, values = gather(k, kept), gather(v, kept)
    return keys, values, think.kept_channels(think.channel_scores(q, keys), 0.4)


@pytest.mark.parametrize("kind", ["snap", "h2o"])
def test_think_after_eviction(kind):
    """They keep tokens in order of their scores: sets of vectors are compared."""
    data = golden("quantization_reading/think")
    keys, values, mask = after_eviction(kind)
    np.testing.assert_array_equal(mask, data[f"{kind}_keep_mask"][0])
    pruned = data["snap_key_pruned" if kind == "snap" else "h2o_key_pruned_h0_1"][0]
    for head, want in enumerate(pruned):
        found = think.think_keys(keys, mask, 32)[head, :64][:, mask[head]]
        close(np.sort(found, axis=0), np.sort(want, axis=0), rtol=0, atol=0)
        assert {row.tobytes() for row in found.astype(np.float32)} == {row.tobytes() for row in want}
    if kind == "snap":
        close(think.think_keys(keys, mask, 32)[:1, 64:], data["snap_key_recent_h0"][0], rtol=0, atol=0)
        for head, want in enumerate(data["snap_values_h0_1"][0]):
            assert {row.tobytes() for row in values[head].astype(np.float32)} == {row.tobytes() for row in want}


def test_think_limits():
    q, k, v = (x[:, :60] for x in reading_inputs())
    q = 0.3 * q
    everything = np.tile(np.arange(48), (4, 1))
    full = attention(q, k, v)[:, 48:]
    np.testing.assert_allclose(think.think_decode(q, k, v, everything, prompt=48, ratio=0.0), full)
    np.testing.assert_allclose(think.think_decode(q, k, v, everything, prompt=48, ratio=0.9, recent=48), full)
    some, many = (
        np.abs(think.think_decode(q, k, v, everything, prompt=48, ratio=r, recent=8) - full).mean() for r in (0.4, 0.9)
    )
    assert 0 < some < many
    of_values = think.think_decode(q, k, v, everything, prompt=48, ratio=0.0, value_ratio=0.5, recent=0)
    dropped = ~think.kept_channels(
        think.value_scores(q[:, :48], k[:, :48], v[:, :48], q_positions=np.arange(16, 48)), 0.5
    )
    only_new = attention(q, k, np.where((np.arange(60) < 48)[:, None] & dropped[:, None], 0.0, v))[:, 48:]
    np.testing.assert_allclose(of_values, only_new)


# ------------------------------------------------------------------------------------------------------------- MiKV


def test_mikv_balancer():
    """The balancer changes no product, and evens out the channels of keys and queries."""
    q, k, _ = reading_inputs()
    b = mikv.balancer(q, k)
    np.testing.assert_allclose((q[::2] / b[:, None]) @ np.swapaxes(k * b[:, None], 1, 2), q[::2] @ np.swapaxes(k, 1, 2))
    top_q = np.abs(q).max(1).reshape(4, 2, 64).max(1)
    np.testing.assert_allclose(top_q / b, np.abs(k).max(1) * b)
    assert (mikv.balancer(0 * q, k) == 1).all()
    error = [np.abs((mikv.rounded(k * s, 2, 32) / s - k) @ np.swapaxes(q[::2], 1, 2)).mean() for s in (b[:, None], 1)]
    assert error[0] < 0.7 * error[1]


def test_mikv_limits():
    q, k, v = (x[:, :64] for x in reading_inputs())
    q = 0.3 * q
    full = attention(q, k, v)[:, 48:]
    np.testing.assert_allclose(mikv.mikv_decode(q, k, v, prompt=48, heavy=64, recent=0, bits=2).outputs, full)
    fine = mikv.mikv_decode(q, k, v, prompt=48, heavy=6, recent=6, bits=24)
    np.testing.assert_allclose(fine.outputs, full, atol=1e-5)
    rough = mikv.mikv_decode(q, k, v, prompt=48, heavy=6, recent=6, bits=2)
    evicted = h2o.h2o_decode(q, k, v, prompt=48, heavy=6, recent=6)
    np.testing.assert_array_equal(rough.important[0], evicted.kept[0])  # Demoted is what H2O evicts ...
    assert np.abs(rough.outputs - full).mean() < np.abs(evicted.outputs - full).mean()  # ... and that costs less.
    for before, after in zip(rough.important[:-1], rough.important[1:], strict=True):
        for head in range(4):
            assert set(after[head][:-1]) <= set(before[head]) and after.shape == (4, 12)
    held = (rough.keys[-1] == k).all(-1)
    for head in range(4):
        np.testing.assert_array_equal(np.flatnonzero(held[head]), rough.important[-1][head])
