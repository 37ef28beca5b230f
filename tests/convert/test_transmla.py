"""GQA to MLA: against the authors' output and the oracle, exact where it should be, and a cache that is that small."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax.checkpoints.orbax import load_cache, load_params, save_cache, save_params
from kvjax.convert import transmla
from kvjax.convert.transmla import concentration, joint_pca, partial_rope, with_latent
from kvjax.models import Mla
from kvjax.models.config import Rope
from kvjax.models.transformer import layer_spec, merge, plain_attend, project
from tests import tiny
from tests.models.test_families import NAMES, model as family, text
from tests.oracles import transmla as oracle
from tests.oracles.test_golden import golden

EVERY = 2 * tiny.CONFIG.head_dim  # All channels that rotate in the tiny model.


# One layer, against the authors and the oracle


def layer(weights: dict[str, np.ndarray], dim: int) -> tuple[dict, kvjax.Config]:
    """A layer of PyTorch matrices [out, in] in our layout, and a model that consists of it."""
    heads, kv_heads = (len(weights[name]) // dim for name in "qk")
    rope = Rope(theta=1e4, rotary_dim=dim)
    config = kvjax.Config(
        family="llama",
        vocab_size=8,
        hidden_size=weights["q"].shape[1],
        mlp_size=8,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=dim,
        layer_types=("full",),
        rope=rope,
        sliding_rope=rope,
        query_scale=dim**-0.5,
    )
    (random,) = kvjax.init_params(config, jax.random.key(0))["layers"]
    return {**random, **{f"{name}_proj": jnp.asarray(x.T, jnp.float32) for name, x in weights.items()}}, config


def attention(weights: dict, config: kvjax.Config, x: np.ndarray) -> np.ndarray:
    """The attention of a layer on inputs x [T, hidden]."""
    spec, pos = layer_spec(config, 0), jnp.arange(len(x))[None]
    new = project(weights, config, spec, jnp.asarray(x[None], jnp.float32), pos)
    return np.asarray(merge(weights, config, plain_attend(spec, None, new, None)[0])[0])


def convert_layer(weights: dict, config: kvjax.Config, x: np.ndarray, rope_dim: int, rank: int, freqfold: int, balance):
    """Step 1, and all steps, with inputs x [n, hidden] to learn from; each as weights and config."""
    keys = x @ np.asarray(weights["k_proj"], np.float64)
    wide = partial_rope(weights, config, config.rope, keys.T @ keys, rope_dim, freqfold)
    stored = x @ wide.down
    small = joint_pca(wide, stored.T @ stored, rank, balance)
    configs = [dataclasses.replace(config, mla=Mla(part.v_up.shape[1], rope_dim)) for part in (wide, small)]
    return [
        (with_latent(weights, config, part), config, part) for config, part in zip(configs, (wide, small), strict=True)
    ]


@pytest.mark.parametrize(
    "tag, rope_dim, rank, freqfold",
    [("ff1_c1_mqa16_r24", 16, 24, 1), ("ff2_c2_mqa8_r24", 8, 24, 2), ("ff4_c2_mqa8_r16", 8, 16, 4)],
)
def test_authors(tag, rope_dim, rank, freqfold):
    data = golden("quantization_reading/transmla")
    weights, config = layer({name: data[f"in_{name}_proj"] for name in "qkvo"}, 16)
    x, close = data["x"].astype(np.float64), functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    close(attention(weights, config, x[0]), data["y_original"][0])
    step, done = convert_layer(weights, config, x.reshape(-1, 64), rope_dim, rank, freqfold, 1.0)
    close(attention(*step[:2], x[0]), data[f"{tag}_y_partial_rope"][0])
    close(attention(*done[:2], x[0]), data[f"{tag}_y_mla"][0])
    # Energy of the key's channels. They alternate real and imaginary parts, we have these one after the other.
    energy = ((x.reshape(-1, 64) @ step[2].down[:, :32]) ** 2).mean(0)
    want = data[f"{tag}_k_energy"]
    close(energy[:rope_dim], np.concatenate([want[:rope_dim:2], want[1:rope_dim:2]]))
    close(np.sort(energy[rope_dim:]), np.sort(want[rope_dim:]))
    # What the latent gives back of the first head's keys (but for the rotating channels) and values.
    latent = done[2].down[:, rope_dim:].T
    close(done[2].k_up[0][:, rope_dim:] @ latent, data[f"{tag}_kvb_kva"][:16])
    close(done[2].v_up[0].T @ latent, data[f"{tag}_kvb_kva"][16:])


@pytest.mark.parametrize(
    "rope_dim, rank, freqfold, balance", [(8, 12, 1, 1.0), (8, 12, 4, 0.5), (4, 40, 2, None), (2, 7, 4, 1.0)]
)
def test_oracle(rng, rope_dim, rank, freqfold, balance):
    """Six query heads, three KV heads; keys and values correlate."""
    dim, hidden, collapse = 8, 12, 8 // rope_dim
    weights = {name: rng.normal(size=(heads * dim, hidden)) for name, heads in zip("qkv", (6, 3, 3), strict=True)}
    weights["o"] = rng.normal(size=(hidden, 6 * dim))
    x = rng.normal(size=(60, 6)) @ rng.normal(size=(6, hidden)) / 6 + rng.normal(size=(60, hidden)) / 6
    keys, values = (x @ weights[name].T for name in "kv")
    matrix = oracle.concentration(keys.reshape(60, 3, dim), freqfold=freqfold, collapse=collapse)
    shape = {"rope_dim": rope_dim, "dim": dim, "collapse": collapse}
    parts = oracle.joint_pca(keys @ matrix, values, rope_dim=rope_dim, rank=rank, balance=balance)
    step, done = convert_layer(*layer(weights, dim), x, rope_dim, rank, freqfold, balance)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
    close(attention(*step[:2], x[:20]), oracle.partial_rope(x[:20], weights, matrix, **shape))
    close(attention(*done[:2], x[:20]), oracle.latent_attention(x[:20], weights, matrix, *parts, **shape))


def test_several_heads_rotate(rng):
    """Between one head's channels and all of them: the energy that goes on rotating grows, and turns stay turns."""
    keys = rng.normal(size=(50, 6)) @ rng.normal(size=(6, 4 * 8))
    held = []
    for rope_dim in (4, 8, 16, 24, 32):
        turn, stopped = concentration(keys.T @ keys, 4, Rope(theta=1e4, rotary_dim=8), rope_dim, 2)
        np.testing.assert_allclose(turn @ turn.T, np.eye(32), atol=1e-12)
        assert stopped.sum() == 32 - rope_dim
        held.append(((keys @ turn)[:, ~stopped] ** 2).sum())
    assert np.all(np.diff(held) > 0)
    np.testing.assert_allclose(held[-1], (keys**2).sum())


# Whole models


def changed(**changes) -> tuple[dict, kvjax.Config]:
    """The tiny model with other features; biases and norm weights are not trivial."""
    config = dataclasses.replace(tiny.CONFIG, **changes)
    key = jax.random.key(1)
    noisy = lambda x: x + 0.3 * jax.random.normal(key, x.shape) if x.ndim == 1 else x  # noqa: E731
    return jax.tree.map(noisy, kvjax.init_params(config, jax.random.key(0))), config


def off(params, config, other, other_config, lengths=tiny.LENGTHS, tokens=tiny.TOKENS) -> float:
    """Largest difference of two models' logits on the ragged batch, in units of the largest logit."""
    want, found = (kvjax.forward(p, c, tokens, lengths) for p, c in ((params, config), (other, other_config)))
    real = np.arange(tokens.shape[1]) < lengths[:, None]
    return float(np.abs(want - found)[real].max() / np.abs(want)[real].max())


YARN = Rope(theta=1e4, rotary_dim=16, scaling="yarn", factor=4.0, original_length=64, attention_factor=1.2)
LONG = Rope(
    theta=1e4,
    rotary_dim=16,
    scaling="longrope",
    original_length=32,
    attention_factor=1.1,
    short_factor=(1.0,) * 8,
    long_factor=tuple(range(1, 9)),
)
FEATURES = {
    "plain": {},
    "bias": {"qkv_bias": True},
    "qk_norm": {"qk_norm": True},
    "qk_norm and bias": {"qk_norm": True, "qkv_bias": True},
    "partial rope": {"rope": Rope(theta=1e4, rotary_dim=8), "sliding_rope": Rope(theta=1e3, rotary_dim=8)},
    "yarn": {"rope": YARN},
    "longrope": {"rope": LONG},
    "gemma": {"qk_norm": True, "post_norms": True, "norm_offset": 1.0, "attn_softcap": 5.0, "logit_softcap": 3.0},
}


@pytest.mark.parametrize("name", FEATURES)
def test_exact_where_all_channels_rotate(name):
    params, config = changed(**FEATURES[name])
    rope_dim = 2 * config.rope.rotary_dim
    new = transmla(params, config, tiny.TOKENS, tiny.LENGTHS, rank=64 - rope_dim, rope_dim=rope_dim)
    assert new[1].mla == Mla(64 - rope_dim, rope_dim)
    assert off(params, config, *new) < 1e-5  # Measured: 2e-6.


@pytest.mark.parametrize("name", ["plain", "qk_norm", "partial rope", "yarn"])
def test_exact_where_rotation_stands_still(name):
    """Angles near zero: it is all the same which channels rotate, and how often frequencies are folded."""
    params, config = changed(**FEATURES[name])
    still = {"scaling": "linear", "factor": 1e9}
    ropes = [dataclasses.replace(rope, **still) for rope in (config.rope, config.sliding_rope)]
    config = dataclasses.replace(config, rope=ropes[0], sliding_rope=ropes[1])
    new = transmla(params, config, tiny.TOKENS, tiny.LENGTHS, rank=60, rope_dim=4, freqfold=4)
    assert off(params, config, *new) < 1e-5


def test_exact_at_the_rank_of_the_weights():
    """Keys and values that depend on five numbers of the input: five channels hold the values, and so all there is."""
    params, config = changed()
    narrow = jax.random.normal(jax.random.key(2), (32, 5))
    wide = jax.random.normal(jax.random.key(3), (5, 32)) / 12
    layers = tuple({**weights, "k_proj": narrow @ wide, "v_proj": narrow @ wide[::-1]} for weights in params["layers"])
    params = {**params, "layers": layers}
    for rank, exact in ((5, True), (4, False)):
        new = transmla(params, config, tiny.TOKENS, tiny.LENGTHS, rank=rank, rope_dim=EVERY)
        assert (off(params, config, *new) < 1e-5) == exact


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_family(name):
    params, config = family(name)
    tokens = text(name)
    every = config.num_kv_heads * config.rope.rotary_dim
    rank = 2 * config.num_kv_heads * config.head_dim - every
    new = transmla(params, config, tokens, rank=rank, rope_dim=every)
    assert off(params, config, *new, np.full(len(tokens), tokens.shape[1]), tokens) < 1e-5


def test_padding_and_pieces_change_nothing():
    params, config = changed()
    sizes = {"rank": 20, "rope_dim": 8, "freqfold": 2}
    once = transmla(params, config, tiny.TOKENS, tiny.LENGTHS, **sizes)
    junk = np.where(np.arange(48) < tiny.LENGTHS[:, None], tiny.TOKENS, 3)
    longer = np.pad(junk, ((0, 0), (0, 8)), constant_values=5)
    for tokens, batch in ((longer, 8), (tiny.TOKENS, 3)):
        again = transmla(params, config, tokens, tiny.LENGTHS, batch=batch, **sizes)
        assert off(*once, *again) < 1e-4
    assert off(params, config, *once) > 1e-2  # Or nothing would be shown.


def test_freqfold_is_chosen_by_perplexity():
    """The same as the best of the series by hand."""
    params, config = changed()

    def loss(fold: int) -> float:
        new = transmla(params, config, tiny.TOKENS, tiny.LENGTHS, rank=56, rope_dim=8, freqfold=fold)
        log_p = jax.nn.log_softmax(kvjax.forward(*new, tiny.TOKENS, tiny.LENGTHS))[:, :-1]
        found = np.take_along_axis(np.asarray(log_p), tiny.TOKENS[:, 1:, None], -1)[..., 0]
        return -found[np.arange(1, 48) < tiny.LENGTHS[:, None]].mean()

    losses = [loss(fold) for fold in (2, 4, 8)]
    best = 2 if losses[1] > losses[0] else 4 if losses[2] > losses[1] else 8
    sizes = {"rank": 24, "rope_dim": 8}
    chosen = transmla(params, config, tiny.TOKENS, tiny.LENGTHS, **sizes)
    same = transmla(params, config, tiny.TOKENS, tiny.LENGTHS, freqfold=best, **sizes)
    tiny.assert_trees_equal(chosen[0], same[0])


def test_stacked_params_and_dtype():
    params, config = changed()
    low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    sizes = {"rank": 20, "rope_dim": 8, "freqfold": 2}
    new, small = transmla(low, config, tiny.TOKENS, **sizes)
    assert {leaf.dtype for leaf in jax.tree.leaves(new)} == {jnp.dtype(jnp.bfloat16)}
    again, _ = transmla(kvjax.models.stack_layers(low, config), config, tiny.TOKENS, **sizes)
    tiny.assert_trees_equal(new, again)
    stacked = kvjax.models.stack_layers(new, small)
    logits, other = (kvjax.forward(p, small, tiny.TOKENS) for p in (new, stacked))
    np.testing.assert_allclose(logits, other, atol=0.1)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"rank": 57}, "rank=57 .* 56 other channels"),
        ({"rank": 0}, "rank=0"),
        ({"rope_dim": 5}, "rope_dim=5"),
        ({"rope_dim": 48}, "rope_dim=48 .* up to 2"),
        ({"rope_dim": 0}, "rope_dim=0"),
        ({"freqfold": 3}, "freqfold=3 .* multiple of 2"),
        ({"freqfold": 16}, "freqfold=16 .* divide 8"),
        ({"tokens": tiny.TOKENS[:1, :10]}, "10 calibration tokens"),
    ],
)
def test_sizes_that_do_not_fit(change, message):
    sizes = {"tokens": tiny.TOKENS, "rank": 20, "rope_dim": 8, "freqfold": 2} | change
    with pytest.raises(ValueError, match=message):
        transmla(tiny.params(), tiny.CONFIG, sizes.pop("tokens"), **sizes)


def test_models_that_cannot_be_converted():
    new = transmla(tiny.params(), tiny.CONFIG, tiny.TOKENS, rank=20, rope_dim=8, freqfold=2)
    with pytest.raises(ValueError, match="latent attention already"):
        transmla(*new, tiny.TOKENS, rank=10, rope_dim=8)
    with pytest.raises(ValueError, match="rope_dim"):
        dataclasses.replace(tiny.CONFIG, mla=Mla(8, 12))


def test_what_was_trained_on_the_old_keys_is_left_behind():
    sizes = {"rank": 20, "rope_dim": 8, "freqfold": 2}
    found, want = (transmla(params, tiny.CONFIG, tiny.TOKENS, **sizes)[0] for params in (tiny.trained(), tiny.params()))
    tiny.assert_trees_equal(found, want)


# The latent cache


@functools.cache
def latent_model() -> tuple[dict, kvjax.Config]:
    return transmla(tiny.params(), tiny.CONFIG, tiny.TOKENS, tiny.LENGTHS, rank=16, rope_dim=16, freqfold=2)


def prefill(policy, tokens=tiny.TOKENS, lengths=tiny.LENGTHS, model=None):
    return kvjax.prefill(*(model or latent_model()), policy, tokens, lengths)


def test_the_cache_is_rank_plus_rope_dim():
    policy = kvjax.policy("full")
    cache, old = prefill(policy), kvjax.prefill(tiny.params(), tiny.CONFIG, policy, tiny.TOKENS)
    slots = [layer.pos.shape[-1] for layer in cache.layers]
    assert slots == [48, 8, 48]
    numbers = sum(leaf.size for layer in cache.layers for leaf in jax.tree.leaves((layer.k, layer.v)))
    assert numbers == 4 * sum(slots) * (16 + 16)  # In place of 2 * 2 * 16 a token.
    bookkeeping = sum(layer.pos.nbytes for layer in cache.layers) + cache.seen.nbytes
    assert cache.nbytes == 4 * numbers + bookkeeping
    everything = prefill(policy, lengths=None)
    assert everything.full_nbytes == old.full_nbytes  # The ratio is to the model as it was.
    assert everything.compression > 1.8 * old.compression
    config = latent_model()[1]
    planned = kvjax.plan(policy, config, 48, jnp.float32)
    assert kvjax.policies.abstract_cache(planned, config, 4, jnp.float32).nbytes == cache.nbytes


@pytest.mark.parametrize("lengths", [None, tiny.LENGTHS], ids=["even", "ragged"])
def test_decoding_equals_forward(lengths):
    """A prompt, a chunk, then token by token; under `jit` too."""
    params, config = latent_model()
    want = kvjax.forward(params, config, tiny.TOKENS, lengths)
    policy, rows = kvjax.policy("full"), np.full(4, 48) if lengths is None else lengths
    start = np.minimum(rows - 5, 30)
    prompt = np.where(np.arange(30) < start[:, None], tiny.TOKENS[:, :30], 0)
    cache = prefill(policy, prompt, start).reserve(64)
    rest = np.stack([np.roll(row, -n) for row, n in zip(tiny.TOKENS, start, strict=True)])
    chunk, cache = kvjax.extend(params, config, policy, cache, rest[:, :3])
    single, cache = kvjax.extend(params, config, policy, cache, rest[:, 3:4])
    step = jax.jit(kvjax.extend, static_argnames=("config", "policy"))
    jitted, cache = step(params, config=config, policy=policy, cache=cache, tokens=rest[:, 4:5])
    found = np.concatenate([chunk, single, jitted], 1)
    expected = np.stack([want[i, n : n + 5] for i, n in enumerate(start)])
    np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_array_equal(cache.seen, start + 5)


def test_a_ring_moves_its_sinks():
    """StreamingLLM rotates raw queries anew: as the original model does, where the conversion is exact."""
    new = transmla(tiny.params(), tiny.CONFIG, tiny.TOKENS, tiny.LENGTHS, rank=32, rope_dim=EVERY)
    policy = kvjax.policy("streaming_llm", budget=16, sinks=4)
    logits = []
    for model in ((tiny.params(), tiny.CONFIG), new):
        cache = prefill(policy, model=model)
        logits.append(kvjax.extend(*model, policy, cache, tiny.QUESTION)[0])
    np.testing.assert_allclose(*logits, atol=1e-5)


def test_values_are_not_stored_again():
    """With every slotwise codec: what values are is the end of what keys are."""
    full = prefill(kvjax.policy("full"))
    for name, atol in (("int8", 0.05), ("int4", 0.5), ("fp8", 0.3)):
        cache = prefill(kvjax.policy(name))
        spec = layer_spec(latent_model()[1], 2)
        (_, k, v), (_, want, _) = cache.layers[2].held(spec), full.layers[2].held(spec)
        assert cache.layers[2].v is None
        np.testing.assert_array_equal(k[..., 16:], v)
        np.testing.assert_allclose(k, want, atol=atol)


def test_round_trip(tmp_path):
    params, config = latent_model()
    save_params(tmp_path / "model", params, config)
    loaded, other, _ = load_params(tmp_path / "model")
    assert other == config
    tiny.assert_trees_equal(loaded, params)
    model = kvjax.load(str(tmp_path / "model"))
    assert model.config.mla == Mla(16, 16)
    cache = prefill(kvjax.policy("int8"))
    save_cache(tmp_path / "cache", cache)
    tiny.assert_trees_equal(load_cache(tmp_path / "cache"), cache)


@pytest.mark.parametrize("text", ["h2o(0.5)", "expected_attention(0.5)", "keydiff(0.5) | kivi(group=16, residual=16)"])
def test_policies_compress_latents(text):
    """Within their budget, while tokens are added, without looking at padding."""
    params, config = latent_model()
    policy = kvjax.parse_policy(text)
    cache = prefill(policy)
    assert cache.nbytes < 0.75 * prefill(kvjax.policy("full")).nbytes
    logits, _ = kvjax.extend(params, config, policy, cache, tiny.QUESTION)
    alone = prefill(policy, tiny.TOKENS[1:2, :37], None)
    again, _ = kvjax.extend(params, config, policy, alone, tiny.QUESTION[1:2])
    np.testing.assert_allclose(logits[1:2], again, atol=1e-4)


@pytest.mark.slow
def test_gemma(gemma):
    """Normed heads, one KV head, sliding layers: exact where all channels rotate."""
    tokens, lengths = gemma.encode(["The quick brown fox jumps over the lazy dog.", "A cache is data."])
    new = transmla(gemma.params, gemma.config, tokens, lengths, rank=256, rope_dim=256)
    assert off(gemma.params, gemma.config, *new, lengths, tokens) < 1e-4  # Measured: 1e-5.
    half = dataclasses.replace(gemma.config, mla=Mla(128, 128))
    planned = kvjax.plan(kvjax.policy("full"), half, 1000, jnp.float32)
    sizes = [kvjax.policies.abstract_cache(planned, config, 1, jnp.float32).nbytes for config in (gemma.config, half)]
    assert np.isclose(sizes[1], sizes[0] / 2, rtol=0.01)
