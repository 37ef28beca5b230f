"""Every method's policy against its oracle (`tests/oracles`: the paper's equations in NumPy float64), on one layer.

Ragged rows in one batch, grouped queries, padding of large numbers: an oracle sees one row alone.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax.policies import Pyramid
from tests.methods.layer import HEADS, KV_HEADS, compress, kept, spec, step, tokens
from tests.oracles import (
    chunkkv,
    expected_attention,
    h2o,
    keydiff,
    kivi,
    knorm,
    pyramidkv,
    random_keep,
    round_to_nearest,
    snapkv,
    streaming_llm,
    tova,
    window,
)
from tests.oracles.attention import attention, rope

DIM, STEPS, BUDGET = 16, 24, 12
LENGTHS = (40, 25, 10)  # The last one is shorter than the budget.
TOLERANCE = 2e-5  # float32 against float64.


@functools.cache
def rows():
    """(q [H, T, D], k, v [Hk, T, D]) of every row, its prompt and the tokens that are decoded; before rotation."""
    rng = np.random.default_rng(0)

    def draw(heads, length):
        return (1.5 * rng.normal(size=(heads, length, DIM))).astype(np.float32).astype(np.float64)

    return [(draw(HEADS, n + STEPS), draw(KV_HEADS, n + STEPS), draw(KV_HEADS, n + STEPS)) for n in LENGTHS]


@functools.cache
def rotated():
    """The same rows with queries and keys rotated to their positions, as float32 numbers."""

    def turn(x):
        return rope(x, np.arange(x.shape[1])).astype(np.float32).astype(np.float64)

    return [(turn(q), turn(k), v) for q, k, v in rows()]


def prompt(sequences, raw=None):
    raw = sequences if raw is None else raw
    return tokens(sequences, 0, list(LENGTHS), q_raw=[r[0] for r in raw], k_raw=[r[1] for r in raw])


def decode(policy, cache, sequences, raw=None, options=None):
    """Outputs [row][H, STEPS, D] of one token after another, and the caches after every step."""
    raw = sequences if raw is None else raw
    outputs, caches = [], []
    cache = cache.reserve(64)
    for t in range(STEPS):
        # The next token of every row, in one batch.
        ahead = [tuple(x[:, n + t : n + t + 1] for x in row) for row, n in zip(sequences, LENGTHS, strict=True)]
        apart = [tuple(x[:, n + t : n + t + 1] for x in row) for row, n in zip(raw, LENGTHS, strict=True)]
        new = tokens(ahead, 0, 1, q_raw=[r[0] for r in apart], k_raw=[r[1] for r in apart])
        new = kvjax.cache.Tokens(
            q=new.q,
            k=new.k,
            v=new.v,
            q_raw=new.q_raw,
            k_raw=new.k_raw,
            pos=jnp.asarray(LENGTHS, jnp.int32)[:, None] + t,
        )
        out, cache = step(policy, options or spec(DIM), cache, new)
        outputs.append(np.asarray(out))
        caches.append(cache)
    return np.concatenate(outputs, 2), caches


# --- What the prompt leaves -------------------------------------------------------------------------------------------


def by_expected_attention(q, k, v, raw, budget, **options):
    scores = expected_attention.expected_attention_scores(raw[0], k, v, future=16, **options)
    return expected_attention.expected_attention_kept(scores, budget)


def by_snapkv(q, k, v, raw, budget, window=6, width=3, **options):
    return snapkv.snapkv_kept(
        snapkv.snapkv_scores(q, k, window=window, width=width, **options), window=window, budget=budget
    )


def chunks_that_fit(length: int, chunk: int, budget: int, best: list[int]) -> int:
    """kvjax takes chunks from the best on while they fit; a short last one may leave room for one more."""
    sizes = np.cumsum([min(chunk, length - c * chunk) for c in best])
    return int((sizes <= budget).sum())


def by_chunks(q, k, v, raw, budget, scores, chunk=4):
    length = k.shape[1]
    means = chunkkv.chunk_scores(scores, chunk)
    best = sorted(range(len(means)), key=lambda c: (-means[c], -c))
    return chunkkv.chunkkv_kept(scores, chunk=chunk, chunks=chunks_that_fit(length, chunk, budget, best))


ONE_SHOT = {
    "window": lambda q, k, v, raw, n: window.window_kept(KV_HEADS, k.shape[1], n),
    "streaming_llm(sinks=3)": lambda q, k, v, raw, n: streaming_llm.streaming_llm_kept(KV_HEADS, k.shape[1], n, 3),
    "knorm": lambda q, k, v, raw, n: knorm.knorm_kept(k, n),
    "keydiff": lambda q, k, v, raw, n: keydiff.keydiff_kept(k, n),
    "snapkv(window=6, pool=3)": by_snapkv,
    "snapkv(window=6, pool=1)": functools.partial(by_snapkv, width=1),
    "snapkv(window=6, pool=3, kind='max')": functools.partial(by_snapkv, kind="max"),
    "tova(phase='prompt')": lambda q, k, v, raw, n: tova.tova_kept(tova.tova_scores(q, k), n),
    "tova": lambda q, k, v, raw, n: tova.tova_kept(tova.tova_scores(q, k), n),
    "h2o": lambda q, k, v, raw, n: h2o.h2o_kept(h2o.h2o_scores(q, k), heavy=n - n // 2, recent=n // 2),
    "h2o(phase='prompt', recent=3)": lambda q, k, v, raw, n: h2o.h2o_kept(h2o.h2o_scores(q, k), heavy=n - 3, recent=3),
    "expected_attention(future=16)": by_expected_attention,
    "expected_attention(future=16, sinks=2, covariance=False)": functools.partial(
        by_expected_attention, sinks=2, use_covariance=False
    ),
    "expected_attention(future=16, value_norm=False)": functools.partial(by_expected_attention, use_vnorm=False),
    "expected_attention(future=16, epsilon=0.05)": functools.partial(by_expected_attention, epsilon=0.05),
    "chunkkv(score=knorm, chunk=4)": lambda q, k, v, raw, n: by_chunks(q, k, v, raw, n, knorm.knorm_scores(k)),
    "chunkkv(score=keydiff, chunk=4)": lambda q, k, v, raw, n: by_chunks(q, k, v, raw, n, keydiff.keydiff_scores(k)),
    # One token of the window alone: what is partly protected kvpress averages, kvjax takes first.
    "chunkkv(score='snapkv(window=1, pool=3)', chunk=4)": lambda q, k, v, raw, n: by_chunks(
        q, k, v, raw, n, snapkv.snapkv_scores(q, k, window=1, width=3)
    ),
}


@pytest.mark.parametrize("budget", [BUDGET, 0.5])
@pytest.mark.parametrize("text", ONE_SHOT)
def test_kept_tokens(text, budget):
    policy = kvjax.parse_policy(text, budget=budget)
    cache = compress(policy, spec(DIM), prompt(rotated(), rows()))
    for row, length in enumerate(LENGTHS):
        q, k, v = (x[:, :length] for x in rotated()[row])
        raw = tuple(x[:, :length] for x in rows()[row])
        slots = min(budget, length) if isinstance(budget, int) else int(length * budget)
        if slots < policy.stages[0].least:
            continue  # Refused when it is planned.
        if slots == length:
            want = np.tile(np.arange(length), (KV_HEADS, 1))
        else:
            want = ONE_SHOT[text](q, k, v, raw, slots)
        np.testing.assert_array_equal(kept(cache, row), want)


def test_scale_and_softcap_reach_the_scores():
    options = {"scale": 0.7, "softcap": 3.0}
    for text in ("snapkv(window=6, pool=3)", "tova", "h2o"):
        cache = compress(kvjax.parse_policy(text, budget=BUDGET), spec(DIM, **options), prompt(rotated()))
        for row in (0, 1):
            q, k, v = (x[:, : LENGTHS[row]] for x in rotated()[row])
            if text == "tova":
                want = tova.tova_kept(tova.tova_scores(q, k, **options), BUDGET)
            elif text == "h2o":
                want = h2o.h2o_kept(h2o.h2o_scores(q, k, **options), heavy=6, recent=6)
            else:
                want = by_snapkv(q, k, v, None, BUDGET, **options)
            np.testing.assert_array_equal(kept(cache, row), want)
        if text == "h2o":  # In decoding too.
            outputs, _ = decode(kvjax.policy("h2o", BUDGET), cache, rotated(), options=spec(DIM, **options))
            for row, length in enumerate(LENGTHS):
                want = h2o.h2o_decode(*rotated()[row], prompt=length, heavy=6, recent=6, **options)
                np.testing.assert_allclose(outputs[row], want.outputs, atol=TOLERANCE)


def test_the_second_of_two_sees_what_the_first_has_left():
    """`snapkv | knorm` is knorm on snapkv's tokens; the mean key of `knorm | keydiff` is that of knorm's tokens."""
    both = compress(kvjax.parse_policy("snapkv(20, window=6, pool=3) | knorm(9)"), spec(DIM), prompt(rotated()))
    late = compress(kvjax.parse_policy("knorm(20) | keydiff(9)"), spec(DIM), prompt(rotated()))
    for row in (0, 1):
        q, k, v = (x[:, : LENGTHS[row]] for x in rotated()[row])
        first = by_snapkv(q, k, v, None, 20)
        left = np.take_along_axis(k, first[..., None], 1)
        np.testing.assert_array_equal(kept(both, row), np.take_along_axis(first, knorm.knorm_kept(left, 9), 1))
        first = knorm.knorm_kept(k, 20)
        left = np.take_along_axis(k, first[..., None], 1)
        np.testing.assert_array_equal(kept(late, row), np.take_along_axis(first, keydiff.keydiff_kept(left, 9), 1))


@pytest.mark.parametrize("phase", ["prompt", "step"])
def test_heads_that_hold_different_tokens_rank_their_own(phase):
    """`knorm | tova`: an average over heads needs the same tokens in all of them; else each KV head has its own."""
    policy = kvjax.parse_policy(f"knorm(20) | tova(9, phase={phase!r})")
    cache = compress(policy, spec(DIM), prompt(rotated()))
    outputs, caches = decode(policy, cache, rotated())
    for row in (0, 1):
        for h in range(KV_HEADS):  # As if the head and its queries were alone.
            q, k, v = (x[h * n : (h + 1) * n] for x, n in zip(rotated()[row], (2, 1, 1), strict=True))
            length = LENGTHS[row]
            held = knorm.knorm_kept(k[:, :length], 20)[0]
            newest = held[-1] == length - 1  # Protected, unless knorm has taken it.
            held = held[tova.tova_kept(tova.tova_scores(q[:, :length], k[:, held], keep_last=newest), 9)[0]]
            np.testing.assert_array_equal(kept(cache, row)[h], held)
            for t in range(STEPS):
                held, now = np.append(held, length + t), q[:, length + t : length + t + 1]
                want = attention(now, k[:, held], v[:, held])
                np.testing.assert_allclose(outputs[row, 2 * h : 2 * h + 2, t : t + 1], want, atol=TOLERANCE)
                if phase == "step":
                    held = held[tova.tova_kept(tova.tova_scores(now, k[:, held]), 9)[0]]
                np.testing.assert_array_equal(kept(caches[t], row)[h], held)


def test_random_is_uniform_and_its_own_in_every_head_and_layer():
    new = prompt(rotated())
    found = [
        [kept(compress(kvjax.policy("random", 10, seed=s), spec(DIM), new, layer=i, layers=2), 0) for i in range(2)]
        for s in range(3)
    ]
    assert len({row.tobytes() for seed in found for layer in seed for row in layer}) == 3 * 2 * KV_HEADS
    # A draw depends on seed, layer, head and position alone: the oracle with the same noise agrees.
    keys = jax.random.split(jax.random.fold_in(jax.random.key(0), 0), KV_HEADS)
    noise = [[float(jax.random.uniform(jax.random.fold_in(key, p))) for p in range(LENGTHS[0])] for key in keys]
    np.testing.assert_array_equal(found[0][0], random_keep.random_kept(np.array(noise), 10))


# --- Decoding, with evictions at every step ---------------------------------------------------------------------------


@pytest.mark.parametrize("recent", [0.5, 3])
def test_h2o_decodes(recent):
    policy = kvjax.policy("h2o", BUDGET, recent=recent)
    outputs, caches = decode(policy, compress(policy, spec(DIM), prompt(rotated())), rotated())
    newest = 6 if recent == 0.5 else recent
    for row, length in enumerate(LENGTHS):
        want = h2o.h2o_decode(*rotated()[row], prompt=length, heavy=BUDGET - newest, recent=newest)
        np.testing.assert_allclose(outputs[row], want.outputs, atol=TOLERANCE)
        for t, cache in enumerate(caches):
            np.testing.assert_array_equal(kept(cache, row), want.kept[t + 1])
        order = np.argsort(np.where(caches[-1].pos[row] < 0, 10**6, caches[-1].pos[row]), -1)[:, :BUDGET]
        marks = np.take_along_axis(np.asarray(caches[-1].marks[row]), order, -1)
        np.testing.assert_allclose(marks, want.scores[-1], atol=1e-4)


def test_tova_decodes():
    policy = kvjax.policy("tova", BUDGET)
    outputs, caches = decode(policy, compress(policy, spec(DIM), prompt(rotated())), rotated())
    for row, length in enumerate(LENGTHS):
        history, want = tova.tova_decode(*rotated()[row], prompt=length, budget=BUDGET)
        np.testing.assert_allclose(outputs[row], want, atol=TOLERANCE)
        for t, cache in enumerate(caches):
            np.testing.assert_array_equal(kept(cache, row), np.tile(history[t + 1], (KV_HEADS, 1)))


def test_tova_every_four_steps():
    """Tokens gather until four are too many; then the four that the newest query attends to least leave at once."""
    policy = kvjax.policy("tova", BUDGET, every=4)
    outputs, caches = decode(policy, compress(policy, spec(DIM), prompt(rotated())), rotated())
    for row, length in enumerate(LENGTHS):
        q, k, v = rotated()[row]
        held = tova.tova_kept(tova.tova_scores(q[:, :length], k[:, :length]), BUDGET)[0]
        for t in range(STEPS):
            held, now = np.append(held, length + t), q[:, length + t : length + t + 1]
            np.testing.assert_allclose(
                outputs[row, :, t : t + 1], attention(now, k[:, held], v[:, held]), atol=TOLERANCE
            )
            if len(held) >= BUDGET + 4:
                held = held[tova.tova_kept(tova.tova_scores(now, k[:, held]), BUDGET)[0]]
            np.testing.assert_array_equal(kept(caches[t], row), np.tile(held, (KV_HEADS, 1)))


def test_knorm_decodes():
    policy = kvjax.policy("knorm", BUDGET, phase="step")
    outputs, caches = decode(policy, compress(policy, spec(DIM), prompt(rotated())), rotated())
    for row, length in enumerate(LENGTHS):
        _, k, _ = rotated()[row]
        for t, cache in enumerate(caches):  # The worst leaves at every step, so the best of all that came are left.
            np.testing.assert_array_equal(kept(cache, row), knorm.knorm_kept(k[:, : length + t + 1], BUDGET))


@pytest.mark.parametrize("budget", [BUDGET, 0.5])
def test_streaming_llm_decodes(budget):
    policy = kvjax.policy("streaming_llm", budget)
    outputs, caches = decode(policy, compress(policy, spec(DIM), prompt(rotated(), rows())), rotated(), rows())
    for row, length in enumerate(LENGTHS):
        slots = budget if isinstance(budget, int) else int(length * budget)
        want = streaming_llm.streaming_llm_decode(*rows()[row], prompt=length, budget=slots)
        np.testing.assert_allclose(outputs[row], want, atol=5 * TOLERANCE)
        want = streaming_llm.streaming_llm_kept(KV_HEADS, length + STEPS, slots)
        np.testing.assert_array_equal(kept(caches[-1], row), want)


@pytest.mark.parametrize("text, sinks", [("streaming_llm(12, sinks=3, shifted=False)", 3), ("window(12)", 0)])
def test_rings_at_original_positions(text, sinks):
    policy = kvjax.parse_policy(text)
    outputs, _ = decode(policy, compress(policy, spec(DIM), prompt(rotated())), rotated())
    for row, length in enumerate(LENGTHS):
        q, k, v = rotated()[row]
        want = attention(q[:, length:], k, v, window=BUDGET - sinks, sinks=sinks)
        np.testing.assert_allclose(outputs[row], want, atol=TOLERANCE)


def test_what_the_prompt_kept_is_what_decoding_sees():
    """A one-shot policy never acts again: attention over its tokens and all new ones."""
    policy = kvjax.policy("snapkv", BUDGET, window=6, pool=3)
    cache = compress(policy, spec(DIM), prompt(rotated()))
    outputs, _ = decode(policy, cache, rotated())
    for row, length in enumerate(LENGTHS):
        q, k, v = rotated()[row]
        held = np.concatenate([kept(cache, row), np.tile(np.arange(length, length + STEPS), (KV_HEADS, 1))], 1)
        keys, values = (np.take_along_axis(x, held[..., None], 1) for x in (k, v))
        want = attention(q[:, length:], keys, values, q_positions=np.arange(length, length + STEPS), k_positions=held)
        np.testing.assert_allclose(outputs[row], want, atol=TOLERANCE)


# --- Stores -----------------------------------------------------------------------------------------------------------


def read(cache, row, count, dim=DIM):
    """Keys and values [Hk, count, D] of the first slots of a `Slots` layer."""
    return [np.asarray(cache.codec.decode(x)[row, :, :count]) for x in (cache.k, cache.v)]


STORES = {
    "int8": lambda x: round_to_nearest.dequantize_symmetric(*round_to_nearest.quantize_symmetric(x)),
    "int4(group=8, scale_dtype='float32')": lambda x: round_to_nearest.dequantize_asymmetric(
        *round_to_nearest.quantize_asymmetric(x, 4, 8)
    ),
    "int4(group=0, scale_dtype='float32')": lambda x: round_to_nearest.dequantize_asymmetric(
        *round_to_nearest.quantize_asymmetric(x, 4, None)
    ),
    "int2(group=8, scale_dtype='float32')": lambda x: round_to_nearest.dequantize_asymmetric(
        *round_to_nearest.quantize_asymmetric(x, 2, 8)
    ),
    "fp8": lambda x: round_to_nearest.dequantize_fp8(*round_to_nearest.quantize_fp8(x)),
}


@pytest.mark.parametrize("text", STORES)
def test_rounded_tokens(text):
    policy, oracle = kvjax.parse_policy(text), STORES[text]
    cache = compress(policy, spec(DIM), prompt(rotated()))
    outputs, caches = decode(policy, cache, rotated())
    for row, length in enumerate(LENGTHS):
        q, k, v = rotated()[row]
        keys, values = oracle(k), oracle(v)
        for found, want in zip(read(caches[-1], row, length + STEPS), (keys, values), strict=True):
            different = np.abs(found - want) > 1e-5
            assert different.mean() < 2e-3  # float32 and float64 part where a number lies between two codes.
        if np.abs(read(caches[-1], row, length + STEPS)[0] - keys).max() > 1e-5:
            keys, values = read(caches[-1], row, length + STEPS)
        for t in range(length, length + STEPS):  # The newest token is seen as it came.
            seen_k, seen_v = (np.concatenate([x[:, :t], y[:, t : t + 1]], 1) for x, y in ((keys, k), (values, v)))
            want = attention(q[:, t : t + 1], seen_k, seen_v)[:, 0]
            np.testing.assert_allclose(outputs[row, :, t - length], want, atol=5 * TOLERANCE)


def along_channels(codes, bits):
    """The oracle's words, packed along channels instead of tokens."""
    return np.swapaxes(kivi.pack(np.swapaxes(codes, -1, -2), bits), -1, -2)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_kivi(bits):
    policy = kvjax.policy("kivi", bits, group=8, residual=16, scale_dtype="float32")
    outputs, caches = decode(policy, compress(policy, spec(DIM), prompt(rotated())), rotated())
    for row, length in enumerate(LENGTHS):
        q, k, v = rotated()[row]
        want = kivi.kivi_decode(q, k, v, prompt=length, bits=bits, group=8, residual=16)
        np.testing.assert_allclose(outputs[row], want, atol=5 * TOLERANCE)
        held = length + STEPS
        keys, values = kivi.quantized_lengths(held, 16)
        packed = kivi.quantize_keys(k[:, :keys], bits, 8)
        found = caches[-1]
        np.testing.assert_array_equal(found.k.codes[row, :, :keys], along_channels(packed.codes, bits))
        np.testing.assert_allclose(found.k.scale[row, :, : keys // 8], packed.scale, rtol=1e-6)
        np.testing.assert_allclose(found.k.zero[row, :, : keys // 8], packed.zero, rtol=1e-6)
        packed = kivi.quantize_values(v[:, :values], bits, 8)
        np.testing.assert_array_equal(found.v.codes[row, :, :values], along_channels(packed.codes, bits))
        np.testing.assert_allclose(found.v.scale[row, :, :values], packed.scale, rtol=1e-6)
        for t in range(keys, held):
            np.testing.assert_array_equal(found.k_recent[row, :, t % 16], k[:, t].astype(np.float32))
        for t in range(values, held):
            np.testing.assert_array_equal(found.v_recent[row, :, t % 16], v[:, t].astype(np.float32))


# --- Budgets of layers ------------------------------------------------------------------------------------------------


def test_pyramid_budgets():
    """The oracle's (kvpress') arithmetic sequence; what its roundings spend too much is taken from early layers."""
    compared = 0
    for layers in (1, 2, 3, 12, 32):
        for length in (64, 200, 4096):
            for ratio in (0.1, 0.25, 0.5, 0.9):
                for floor, beta in ((8, 20.0), (32, 20.0), (8, 5.0)):
                    mean = ratio * length
                    found = Pyramid(beta)(np.array([mean]), np.array([length]), layers, floor)[:, 0]
                    want = np.array(pyramidkv.pyramidkv_budgets(layers, length, mean, window=floor, beta=beta))
                    assert found.sum() <= mean * layers + 1e-3 and found.max() <= length
                    if want.min() == want.max() or found.min() == found.max():
                        assert found.tolist() == [int(mean + 1e-3)] * layers or mean / beta < floor + 0.5
                        continue
                    excess = max(int(want.sum()) - int(mean * layers + 1e-3), 0)
                    np.testing.assert_array_equal(found, want - (np.arange(layers) < excess))
                    compared += 1
    assert compared > 60


@pytest.mark.parametrize("layer", range(3))
def test_pyramidkv(layer):
    policy = kvjax.policy("pyramidkv", 14, window=6, pool=3, beta=5)
    cache = compress(policy, spec(DIM), prompt(rotated()), layer=layer, layers=3)
    for row in (0, 1):
        length = LENGTHS[row]
        q, k, _ = (x[:, :length] for x in rotated()[row])
        budgets = np.asarray(policy.stages[0].slots(np.array([length]), 3))[:, 0].tolist()
        want = pyramidkv.pyramidkv_kept(q, k, layer, budgets, window=6, width=3)
        np.testing.assert_array_equal(kept(cache, row), want)
