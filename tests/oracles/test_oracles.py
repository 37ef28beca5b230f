"""What no golden file covers: limits in which an oracle must equal something simpler."""

import ml_dtypes
import numpy as np
import pytest

from tests.oracles import chunkkv, h2o, keydiff, kivi, round_to_nearest, snapkv, streaming_llm, tova, window
from tests.oracles.attention import attention, attention_weights, gather, rope
from tests.oracles.random_keep import random_kept
from tests.oracles.top_k import top_k

H, HK, T, D = 4, 2, 24, 8


def draw(seed: int = 0, dim: int = D) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Random q [H, T, D], k, v [HK, T, D]."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(H, T, dim)), rng.normal(size=(HK, T, dim)), rng.normal(size=(HK, T, dim))


def test_attention_is_causal_and_windowed():
    q, k, v = draw()
    weights = attention_weights(q, k, window=5, sinks=2)
    i, j = np.indices((T, T))
    visible = (j <= i) & ((i - j < 5) | (j < 2))
    assert ((weights > 0) == visible).all()
    np.testing.assert_allclose(weights.sum(-1), 1)
    np.testing.assert_allclose(attention(q[:, -3:], k, v), attention(q, k, v)[:, -3:])
    np.testing.assert_allclose(attention(q, k, v, softcap=1e6), attention(q, k, v), atol=1e-8)
    kept = np.array([[0, 2, 23], [5, 20, 23]])
    holes = attention(q[:, -1:], gather(k, kept), gather(v, kept), q_positions=[23], k_positions=kept)
    one_head = attention(q[2:3, -1:], k[1:, kept[1]], v[1:, kept[1]])
    np.testing.assert_allclose(holes[2:3], one_head)


def test_rope_depends_on_distance_only():
    q, k, _ = draw()
    dots = [rope(q[0, :1], np.array([p + 7]))[0] @ rope(k[0, :1], np.array([p]))[0] for p in (0, 1, 1000)]
    np.testing.assert_allclose(dots, dots[0])


def test_top_k_prefers_the_earlier_of_equals():
    assert top_k(np.array([[1.0, 3.0, 3.0, 3.0, 0.0]]), 2).tolist() == [[1, 2]]
    assert top_k(np.zeros((1, 3)), 9).tolist() == [[0, 1, 2]]


def test_positional_baselines():
    assert window.window_kept(2, 6, 4).tolist() == [[2, 3, 4, 5]] * 2
    assert streaming_llm.streaming_llm_kept(1, 9, 6, sinks=4).tolist() == [[0, 1, 2, 3, 7, 8]]
    assert streaming_llm.streaming_llm_kept(1, 3, 6).tolist() == [[0, 1, 2]]
    assert streaming_llm.streaming_llm_kept(1, 9, 4).tolist() == [[0, 1, 2, 3]]
    assert random_kept(np.array([[0.3, 0.9, 0.1, 0.5]]), 2).tolist() == [[1, 3]]


def test_streaming_llm_positions_are_those_of_the_cache():
    q, k, v = draw()
    positions = np.arange(T)
    full = attention(rope(q, positions), rope(k, positions), v)
    everything = streaming_llm.streaming_llm_decode(q, k, v, prompt=0, budget=T)
    np.testing.assert_allclose(everything, full)
    # Once full, the recent part keeps its distances, while the sinks stay as near as the cache is short.
    out = streaming_llm.streaming_llm_decode(q, k, v, prompt=T - 1, budget=7, sinks=2)
    kept, original = np.array([0, 1, 19, 20, 21, 22, 23]), np.array([17, 18, 19, 20, 21, 22, 23])
    near = attention(rope(q[:, -1:], np.array([23])), rope(k[:, kept], original), v[:, kept])
    np.testing.assert_allclose(out, near)


def test_decode_with_room_for_all_is_full_attention():
    q, k, v = draw()
    full = attention(q, k, v)[:, 12:]
    steps = h2o.h2o_decode(q, k, v, prompt=12, heavy=T, recent=T)
    np.testing.assert_allclose(steps.outputs, full)
    np.testing.assert_allclose(steps.scores[-1], h2o.h2o_scores(q, k))
    history, outputs = tova.tova_decode(q, k, v, prompt=12, budget=T)
    np.testing.assert_allclose(outputs, full)
    assert history[-1].tolist() == list(range(T))


def test_decode_keeps_the_budget_and_the_newest():
    q, k, v = draw()
    steps = h2o.h2o_decode(q, k, v, prompt=12, heavy=4, recent=3)
    history, _ = tova.tova_decode(q, k, v, prompt=12, budget=7)
    for step, t in enumerate(range(12, T + 1)):
        assert steps.kept[step].shape == (HK, 7) and (steps.kept[step][:, -3:] == [t - 3, t - 2, t - 1]).all()
        assert history[step].shape == (7,) and history[step][-1] == t - 1
    for before, after in zip(history[:-1], history[1:], strict=True):
        assert set(after[:-1]) <= set(before)


def test_snapkv_pooling_counts_zeros():
    x = np.array([[3.0, 0.0, 6.0]])
    assert snapkv.pool(x, 3, "avg").tolist() == [[1.0, 3.0, 2.0]]
    assert snapkv.pool(-x, 3, "max").tolist() == [[0.0, 0.0, 0.0]]
    assert snapkv.snapkv_kept(np.zeros((1, 9)), window=4, budget=3).tolist() == [[6, 7, 8]]


def test_keydiff_ignores_padding():
    _, k, _ = draw()
    padded = np.concatenate([k, np.full((HK, 3, D), 1e3)], axis=1)
    scores = keydiff.keydiff_scores(padded, np.arange(T + 3) < T)
    np.testing.assert_allclose(scores[:, :T], keydiff.keydiff_scores(k))
    assert (scores[:, T:] == -np.inf).all()


def test_chunkkv_budget():
    scores = np.array([[0.0, 1, 5, 5, 0, 0, 9]])
    assert chunkkv.chunkkv_kept(scores, chunk=2, chunks=chunkkv.chunks_for_budget(7, 2, 5)).tolist() == [[2, 3, 6]]
    assert chunkkv.chunks_for_budget(7, 2, 7) == 4
    with pytest.raises(ValueError, match="holds no chunk"):
        chunkkv.chunks_for_budget(7, 2, 1)


def test_kivi_rules():
    q, k, v = draw()
    assert [kivi.quantized_lengths(n, 8) for n in (7, 8, 9, 16, 17)] == [(0, 0), (8, 0), (8, 1), (16, 8), (16, 9)]
    keys, values = kivi.kivi_cache(k[:, :19], v[:, :19], group=4, residual=8)
    assert ((keys == k[:, :19]).all(axis=(0, 2)) == (np.arange(19) >= 16)).all()
    assert ((values == v[:, :19]).all(axis=(0, 2)) == (np.arange(19) >= 11)).all()
    full = attention(q, k, v)[:, 10:]
    errors = [
        np.abs(kivi.kivi_decode(q, k, v, prompt=10, bits=bits, group=4, residual=8) - full).max() for bits in (2, 4, 8)
    ]
    assert errors[0] > errors[1] > errors[2] and errors[2] < 0.02
    constant = kivi.quantize_keys(np.full((1, 4, 2), 3.5), group=4)
    assert (constant.codes == 0).all() and (kivi.dequantize(constant, 4, -2) == 3.5).all()


def test_integer_stores():
    x = draw(dim=64)[1]
    codes, scale = round_to_nearest.quantize_symmetric(x)
    assert scale.shape == (HK, T, 1) and np.abs(codes).max() == 127
    assert (np.abs(round_to_nearest.dequantize_symmetric(codes, scale) - x) <= scale / 2 + 1e-12).all()
    codes, scale, zero = round_to_nearest.quantize_asymmetric(x, bits=4, group=32)
    assert scale.shape == zero.shape == (HK, T, 2) and codes.max() == 15 and codes.min() == 0
    error = np.abs(round_to_nearest.dequantize_asymmetric(codes, scale, zero) - x)
    assert (error <= np.repeat(scale, 32, -1) / 2 + 1e-12).all()
    zeros = np.zeros((1, 1, 64))
    assert (round_to_nearest.dequantize_symmetric(*round_to_nearest.quantize_symmetric(zeros)) == 0).all()
    assert (round_to_nearest.dequantize_fp8(*round_to_nearest.quantize_fp8(zeros)) == 0).all()


def test_fp8():
    values = round_to_nearest.e4m3_values()
    halfway = (values[1:] + values[:-1]) / 2
    x = np.concatenate([values, halfway, np.nextafter(halfway, 0), np.nextafter(halfway, 1e3)])
    x = np.concatenate([x, -x]).astype(np.float32)
    np.testing.assert_array_equal(round_to_nearest.round_e4m3(x), x.astype(ml_dtypes.float8_e4m3fn).astype(np.float64))
    assert round_to_nearest.round_e4m3(np.array([1e4, -500.0])).tolist() == [448.0, -448.0]
    x = draw()[1]
    codes, scale = round_to_nearest.quantize_fp8(x)
    assert np.abs(codes).max() == 448
    error = np.abs(round_to_nearest.dequantize_fp8(codes, scale) - x)
    assert (error <= np.abs(x) / 16 + scale * 2.0**-10).all()
