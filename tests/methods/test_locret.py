"""Locret against its oracle, and what makes it this method. No output of the authors' code is recorded."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax.cache import EMPTY, Slots, Tokens
from kvjax.methods.locret import RetainingHead
from kvjax.models.config import Rope
from kvjax.training.locret import init_retaining_heads, with_retaining_heads
from tests import tiny
from tests.methods.layer import compress, kept, spec, tokens
from tests.oracles import locret
from tests.oracles.top_k import top_k

SETTING = {"chunk": 5, "local": 3, "stabilizers": 2}
# One full-attention layer, so that what reaches the scores does not depend on what was forgotten.
ONE_LAYER = dataclasses.replace(tiny.CONFIG, layer_types=("full",), sliding_window=0, query_scale=0.25)


def weights(rng, heads: int = 4, kv_heads: int = 2, dim: int = 8, hidden: int = 6):
    w1, w2 = rng.normal(size=((heads + 2 * kv_heads) * dim, hidden)), rng.normal(size=(hidden, kv_heads))
    return {"w1": jnp.asarray(w1, jnp.float32), "w2": jnp.asarray(w2, jnp.float32)}


def draw(rng, length: int, heads: int = 4, kv_heads: int = 2, dim: int = 8):
    return tuple(rng.normal(size=(n, length, dim)) for n in (heads, kv_heads, kv_heads))


@pytest.mark.parametrize("heads, kv_heads", [(4, 2), (3, 3), (4, 1)])
def test_scores_against_the_oracle(rng, heads, kv_heads):
    """Of what stands before rotation, whatever stands after it."""
    rows = [draw(rng, 9, heads, kv_heads) for _ in range(2)]
    rotated = [tuple(x + 1 for x in row[:2]) + row[2:] for row in rows]
    trained = {"locret": weights(rng, heads, kv_heads)}
    new = tokens(rotated, 0, 9, q_raw=[row[0] for row in rows], k_raw=[row[1] for row in rows])
    scores = RetainingHead()(dataclasses.replace(new, trained=trained))
    for row, (q, k, v) in enumerate(rows):
        want = locret.retaining_scores(q, k, v, *(np.asarray(w, np.float64) for w in trained["locret"].values()))
        np.testing.assert_allclose(scores[row], want, rtol=1e-4, atol=1e-4)


def feed(policy: kvjax.Policy, row, trained, length: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """One layer, fed in chunks: outputs [H, T, D], and what it holds after each chunk [Hk, n]."""
    stage, layer_spec = policy.stages[0], spec(8)
    phase, body = stage.phase, max(length - stage.phase.tail, 0)
    slots = jnp.asarray([stage.slots(np.array([length]), 1)[0, 0]], jnp.int32)
    empty = jnp.zeros((1, 2, 0, 8))
    layer = stage.open(Slots(k=empty, v=empty, pos=jnp.zeros((1, 2, 0), jnp.int32)), slots).reserve(100)
    outs, held = [], []
    for start in range(0, body, phase.every):
        stop = min(start + phase.every, body)
        new = dataclasses.replace(tokens([row], start, stop), trained=trained)
        out, layer, _ = layer.attend(new, layer_spec, None, stage.score.update)
        layer = stage.end_chunk(layer, jnp.asarray([stop == body])).reserve(100)
        outs.append(out[0])
        held.append(kept(layer, 0))
    out, layer, _ = stage.close(layer, int(slots[0])).reserve(100).attend(tokens([row], body, length), layer_spec)
    return np.concatenate([*outs, out[0]], 1), [*held, kept(layer, 0)]


@pytest.mark.parametrize("length", [40, 38, 7, 2])
def test_a_layer_fed_in_chunks_against_the_oracle(rng, length):
    """Outputs of every token, and what is held after each chunk."""
    row, trained = draw(rng, length), {"locret": weights(rng)}
    scores = locret.retaining_scores(*row, *(np.asarray(w, np.float64) for w in trained["locret"].values()))
    outs, held = feed(kvjax.policy("locret", 12, **SETTING), row, trained, length)
    want = locret.chunked_kept(scores, budget=12, **SETTING)
    assert len(held) == len(want)
    for found, expected in zip(held, want, strict=True):
        np.testing.assert_array_equal(found, expected)
    np.testing.assert_allclose(outs, locret.chunked_attention(*row, scores, budget=12, **SETTING), atol=2e-5)


def test_a_ragged_batch_through_a_model(rng):
    """Slots of each row are the oracle's, from the scores that the model's own projections get."""
    params = kvjax.init_params(ONE_LAYER, jax.random.key(0))
    params = with_retaining_heads(params, ONE_LAYER, init_retaining_heads(ONE_LAYER, jax.random.key(1), hidden=8))
    policy = kvjax.policy("locret", 14, **SETTING)
    cache = kvjax.prefill(params, ONE_LAYER, policy, tiny.TOKENS, tiny.LENGTHS)
    seen = kvjax.observe(params, ONE_LAYER, tiny.TOKENS, tiny.LENGTHS, policy.needs)
    for row, length in enumerate(tiny.LENGTHS):
        scores = np.asarray(seen.layers[0][0].tokenwise["locret"])[row, :, :length]
        *_, want = locret.chunked_kept(scores, budget=14, **SETTING)
        np.testing.assert_array_equal(kept(cache.layers[0], row), want)
        assert cache.layers[0].pos.shape[-1] == 14 and cache.layers[0].marks is None


def test_later_chunks_do_not_see_what_is_gone():
    """The last layer differs from that of a prompt which has seen all of itself; the first one does not."""
    chunked, whole = (
        kvjax.prefill(tiny.trained(), tiny.CONFIG, tiny.small("locret", phase=phase), tiny.TOKENS, tiny.LENGTHS)
        for phase in ("chunk", "prompt")
    )
    first, last = ([cache.layers[i] for cache in (chunked, whole)] for i in (0, 2))
    common = set(kept(first[0], 0)[0]) & set(kept(first[1], 0)[0])
    assert common

    def value(layer, position):
        slot = int(np.flatnonzero(np.broadcast_to(layer.pos[0], (2, layer.pos.shape[-1]))[0] == position)[0])
        return np.asarray(layer.v[0, 0, slot])

    late = max(set(kept(last[0], 0)[0]) & set(kept(last[1], 0)[0]))
    np.testing.assert_allclose(value(first[0], max(common)), value(first[1], max(common)), atol=1e-5)
    assert np.abs(value(last[0], late) - value(last[1], late)).max() > 1e-3


def test_once_at_the_end_of_the_prompt(rng):
    """`phase="prompt"`: the best by score, and the last tokens."""
    row = draw(rng, 30)
    trained = {"locret": weights(rng)}
    new = dataclasses.replace(tokens([row], 0, 30), trained=trained)
    layer = compress(kvjax.policy("locret", 10, local=3, phase="prompt"), spec(8), new)
    scores = locret.retaining_scores(*row, *(np.asarray(w, np.float64) for w in trained["locret"].values()))
    want = [[*best, 27, 28, 29] for best in top_k(scores[:, :27], 7)]
    np.testing.assert_array_equal(kept(layer, 0), want)


def test_generation_goes_on_from_it():
    policy = tiny.small("locret")
    cache = kvjax.prefill(tiny.trained(), tiny.CONFIG, policy, tiny.TOKENS, tiny.LENGTHS)
    _, after = kvjax.extend(tiny.trained(), tiny.CONFIG, policy, cache, tiny.QUESTION)
    for row in range(4):
        before = kept(cache.layers[0], row)
        np.testing.assert_array_equal(
            kept(after.layers[0], row), [[*x, *range(tiny.LENGTHS[row], tiny.LENGTHS[row] + 6)] for x in before]
        )


def test_a_wide_gap_in_scores_decides_what_stays():
    """Heads that rate a token by one value channel keep what is marked there, wherever it stands."""
    config = dataclasses.replace(ONE_LAYER, rope=Rope(theta=1e4, rotary_dim=16))
    heads = init_retaining_heads(config, jax.random.key(0), hidden=4)
    channels = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    w1 = jnp.zeros((channels, 4)).at[-1].set(1.0)  # The last channel of the last head's value.
    head = {"w1": w1, "w2": jnp.ones((4, 2))}
    assert heads[0]["w1"].shape == w1.shape and heads[0]["w2"].shape == (4, 2)
    marked = np.zeros((2, 60, 16))
    marked[1, [3, 17, 31], -1] = 5.0
    new = Tokens(
        q=jnp.zeros((1, 4, 60, 16)),
        k=jnp.zeros((1, 2, 60, 16)),
        v=jnp.asarray(marked, jnp.float32)[None],
        q_raw=jnp.zeros((1, 4, 60, 16)),
        k_raw=jnp.zeros((1, 2, 60, 16)),
        pos=jnp.arange(60)[None],
        trained={"locret": head},
    )
    scores = np.asarray(RetainingHead()(new))[0]
    assert set(np.argsort(-scores[0], kind="stable")[:3]) == {3, 17, 31}


def test_bytes_are_those_of_the_slots():
    policy = tiny.small("locret", budget=0.25)
    cache = kvjax.prefill(tiny.trained(), tiny.CONFIG, policy, tiny.TOKENS[:1], tiny.LENGTHS[:1])
    assert [layer.pos.shape[-1] for layer in tiny.full_layers(cache)] == [12, 12]
    assert all((np.asarray(layer.pos) != EMPTY).all() for layer in tiny.full_layers(cache))


def test_without_heads_it_says_what_to_do():
    with pytest.raises(kvjax.PolicyError, match="train_retaining_heads"):
        kvjax.prefill(tiny.params(), tiny.CONFIG, tiny.small("locret"), tiny.TOKENS, tiny.LENGTHS)


def test_heads_of_another_model_are_refused(rng):
    params = with_retaining_heads(tiny.params(), tiny.CONFIG, (weights(rng), weights(rng)))
    with pytest.raises(kvjax.PolicyError, match="read 64 channels and rate 2 KV heads; this model has 128 and 2"):
        kvjax.prefill(params, tiny.CONFIG, tiny.small("locret"), tiny.TOKENS, tiny.LENGTHS)
    with pytest.raises(ValueError, match="1 retaining heads for 2 full-attention layers"):
        with_retaining_heads(tiny.params(), tiny.CONFIG, (weights(rng),))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"activation": "tanh"}, "activation is one of silu, gelu, relu"),
        ({"stabilizers": 1.5}, "a share below 1 or a number of tokens, got 1.5"),
        ({"stabilizers": -1}, "cannot be negative"),
        ({"local": -1}, "cannot be negative"),
        ({"chunk": 0}, "at least 1"),
        ({"phase": "step"}, 'phase is "chunk" or "prompt"'),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        kvjax.policy("locret", 16, **arguments)


def test_a_budget_must_hold_what_always_stays():
    with pytest.raises(kvjax.PolicyError, match="needs at least 5"):
        kvjax.prefill(tiny.trained(), tiny.CONFIG, tiny.small("locret", budget=4), tiny.TOKENS, tiny.LENGTHS)
