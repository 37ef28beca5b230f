"""CAKE: budgets from the data, cascading while the prompt is read; against its oracle and the authors' code."""

import dataclasses
import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax.models.config import Rope
from kvjax.models.transformer import layer_spec
from kvjax.policies import Observed, PolicyError, decide
from kvjax.policies.observe import observe
from kvjax.policies.plan import start_division
from kvjax.policies.preference import DispersionAndShift, Proportional, shared
from tests import tiny
from tests.methods.layer import kept, step, tokens
from tests.oracles import cake as oracle
from tests.oracles.test_golden import PROMPT, golden, inputs
from tests.oracles.test_golden_cake import CASES, pseudo_layer


def config_of(layers: int, heads: int, kv_heads: int, dim: int) -> kvjax.Config:
    """A model of full-attention layers, of which only the shapes and 1/sqrt(D) matter here."""
    return dataclasses.replace(
        tiny.CONFIG,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=dim,
        layer_types=("full",) * layers,
        query_scale=dim**-0.5,
        rope=Rope(theta=1e4, rotary_dim=dim),
    )


def see(policy: kvjax.Policy, config: kvjax.Config, layers, lengths) -> Observed:
    """Observed layers, each given as rows of (q [H, T, D], k, v [Hk, T, D])."""
    lengths = [int(n) for n in lengths]
    seen = []
    for i, rows in enumerate(layers):
        _, prompt, obs = observe(layer_spec(config, i), tokens(rows, 0, lengths), policy.needs, jnp.int32(i))
        seen.append((prompt, obs))
    last = jnp.zeros((len(lengths), config.hidden_size))
    return Observed(layers=tuple(seen), lengths=jnp.array(lengths), last=last, config=config, needs=policy.needs)


def compressed(policy: kvjax.Policy, observed: Observed) -> kvjax.Cache:
    planned = kvjax.plan(policy, observed.config, np.asarray(observed.lengths), jnp.float32)
    return kvjax.compress(planned, observed)


def weights_of(policy: kvjax.Policy, observed: Observed) -> np.ndarray:
    """What every layer asks for [layers, B]."""
    weigh = policy.stages[-1].divide.weigh
    spec = layer_spec(observed.config, 0)
    return np.stack([np.asarray(weigh(prompt, obs, spec)) for prompt, obs in observed.layers])


# --- The authors' code ------------------------------------------------------------------------------------------------

GOLDEN = config_of(4, 8, 4, 64)


@functools.cache
def golden_layers(entries: int = 1, decode: bool = False):
    rows = [inputs(entry, 4, decode) for entry in range(entries)]
    return [
        [(pseudo_layer(q, i, queries=True), pseudo_layer(k, i), pseudo_layer(v, i)) for q, k, v in rows]
        for i in range(4)
    ]


def golden_policy(tag: str, **changes) -> kvjax.Policy:
    size, window, tau1, tau2 = CASES[tag]
    return kvjax.policy("cake", size, window=window, tau1=tau1, tau2=tau2, **changes)


@pytest.mark.parametrize("tag", CASES)
def test_the_authors_budgets_and_tokens(tag):
    data = golden("eviction_merging/cake")
    policy = golden_policy(tag)
    window = CASES[tag][1]
    observed = see(policy, GOLDEN, golden_layers(), [PROMPT])
    weights = weights_of(policy, observed)
    np.testing.assert_allclose(np.exp(weights[:, 0]), data[f"{tag}_pref_scores"], rtol=1e-3)
    # Layer by layer, as they are seen.
    division = start_division(kvjax.plan(policy, GOLDEN, PROMPT, jnp.float32), observed.lengths)
    recorded = data[f"{tag}_budgets_after_each_layer"]
    for i, weight in enumerate(weights):
        division = division.see(weight)
        if "casc" in tag or i == 3:
            np.testing.assert_array_equal(division.slots[:, 0], recorded[i, : i + 1] + window)
    cache = compressed(policy, observed)
    for i in range(4):
        np.testing.assert_array_equal(kept(cache.layers[i], 0, 4), np.sort(data[f"{tag}_kept_l{i}"][0]))


def test_the_authors_scores():
    data = golden("eviction_merging/cake")
    policy = golden_policy("c64_w32_tau1.6_0.4", phase="step")
    cache = compressed(policy, see(policy, GOLDEN, golden_layers(), [PROMPT]))
    for layer, want in zip(cache.layers, data["w32_g200_evict_scores"], strict=True):
        pos, marks = np.asarray(layer.pos[0]), np.asarray(layer.marks[0])
        for h in range(4):
            there = (pos[h] >= 0) & (pos[h] < PROMPT - 32)
            np.testing.assert_allclose(marks[h][there], want[0, h][pos[h][there]], rtol=1e-3)


def test_the_authors_decoding():
    """With neighbours by rank, every slot of every step; by position, in the text, other tokens leave."""
    data = golden("eviction_merging/cake")
    agree = {}
    for neighbours in ("rank", "text"):
        policy = golden_policy("c64_w32_tau1.6_0.4", phase="step", neighbours=neighbours)
        cache = compressed(policy, see(policy, GOLDEN, golden_layers(), [PROMPT]))
        spec, shares = layer_spec(GOLDEN, 0), []
        for i, rows in enumerate(golden_layers(decode=True)):
            layer = cache.layers[i].reserve(1)
            capacity = layer.capacity
            for t, want in enumerate(np.sort(data[f"c64_w32_tau1.6_0.4_decode_kept_l{i}"][:, 0], -1)):
                _, layer = step(policy, spec, layer, tokens(rows, PROMPT + t, PROMPT + t + 1))
                found = kept(layer, 0, 4)
                assert found.shape == want.shape
                shares += [len(set(a) & set(b)) / len(b) for a, b in zip(found, want, strict=True)]
            assert layer.room is None and layer.reserve(64).capacity == capacity  # Held within its own budget.
        agree[neighbours] = np.mean(shares)
    assert agree["rank"] == 1
    assert 0.95 < agree["text"] < 0.97


# --- The oracle -------------------------------------------------------------------------------------------------------

LENGTHS, SIZE, WINDOW, LAYERS, STEPS = (48, 30, 10), 16, 4, 3, 12
POOL = 3  # So that with few tokens not all have the same neighbours, and so the same score.
SMALL = config_of(LAYERS, 4, 2, 16)


@functools.cache
def random_layers():
    """Rows of every layer: attention is sharper in later ones, or in earlier ones."""
    rng = np.random.default_rng(3)

    def draw(heads, length, size=1.0):
        return (size * rng.normal(size=(heads, length, 16))).astype(np.float32).astype(np.float64)

    def layer(i):
        sizes = (0.5 + i, 2.0 - i / 2, 1.0)
        return [
            (draw(4, n + STEPS, s), draw(2, n + STEPS), draw(2, n + STEPS)) for n, s in zip(LENGTHS, sizes, strict=True)
        ]

    return [layer(i) for i in range(LAYERS)]


def by_oracle(row: int, **options) -> tuple[list[list[int]], list[np.ndarray]]:
    prompt = [(rows[row][0][:, : LENGTHS[row]], rows[row][1][:, : LENGTHS[row]]) for rows in random_layers()]
    return oracle.cake_prefill(prompt, size=SIZE, window=WINDOW, width=POOL, **options)


@pytest.mark.parametrize("taus", [{}, {"tau1": 1.6, "tau2": 0.4}])
def test_against_the_oracle(taus):
    """Ragged rows in one batch, each with budgets of its own; grouped queries."""
    policy = kvjax.policy("cake", SIZE, window=WINDOW, pool=POOL, **taus)
    cache = compressed(policy, see(policy, SMALL, random_layers(), LENGTHS))
    sizes = set()
    for row in range(len(LENGTHS)):
        history, want = by_oracle(row, **taus)
        firsts = [budgets[0] for budgets in history]  # The first layer's share as others are seen.
        assert firsts == sorted(firsts, reverse=True)
        for layer in range(LAYERS):
            np.testing.assert_array_equal(kept(cache.layers[layer], row), np.sort(want[layer]))
        sizes.add(tuple(x.shape[1] for x in want))
    assert len(sizes) == 3 and any(len(set(row)) > 1 for row in sizes)


@pytest.mark.parametrize("neighbours", ["rank", "text"])
def test_decoding_against_the_oracle(neighbours):
    policy = kvjax.policy("cake", SIZE, window=WINDOW, pool=POOL, phase="step", neighbours=neighbours)
    cache = compressed(policy, see(policy, SMALL, random_layers(), LENGTHS)).reserve(1)
    spec = layer_spec(SMALL, 0)
    for i, rows in enumerate(random_layers()):
        wants = [
            oracle.cake_decode(
                rows[row][0],
                rows[row][1],
                by_oracle(row)[1][i],
                prompt=n,
                window=WINDOW,
                width=POOL,
                by_position=neighbours == "text",
            )
            for row, n in enumerate(LENGTHS[:2])
        ]
        layer = cache.layers[i].reserve(STEPS)
        for t in range(STEPS):
            ahead = [tuple(x[:, n + t : n + t + 1] for x in row) for row, n in zip(rows, LENGTHS, strict=True)]
            new = tokens(ahead, 0, 1)
            new = dataclasses.replace(new, pos=jnp.asarray(LENGTHS, jnp.int32)[:, None] + t)
            _, layer = step(policy, spec, layer, new)
            for row in (0, 1):
                np.testing.assert_array_equal(kept(layer, row), np.sort(wants[row][t]))
            assert kept(layer, 2).shape[1] == min(LENGTHS[2] + t + 1, SIZE)  # A short prompt grows to the budget.


def test_padding_is_no_step():
    """A row that has nothing to add keeps its ranks, so that the next token meets the same neighbours."""
    policy = kvjax.policy("cake", SIZE, window=WINDOW, pool=POOL, phase="step")
    layer = compressed(policy, see(policy, SMALL, random_layers(), LENGTHS)).layers[1].reserve(1)
    rows = [tuple(x[:, n : n + 1] for x in row) for row, n in zip(random_layers()[1], LENGTHS, strict=True)]
    padding = tokens(rows, 0, [0, 0, 0], width=1)
    _, after = step(policy, layer_spec(SMALL, 0), layer, padding)
    for row in range(3):
        there = np.asarray(layer.pos[row]) >= 0
        np.testing.assert_array_equal(np.asarray(after.marks[row])[there], np.asarray(layer.marks[row])[there])


def test_shares_meet_the_total_within_bounds():
    """And are the authors', wherever one round of dealing is enough."""
    rng = np.random.default_rng(0)
    same = 0
    for _ in range(300):
        layers, most = rng.integers(1, 7), int(rng.integers(1, 60))
        total = int(rng.integers(0, 80) * layers)
        preferences = np.exp(rng.normal(size=layers) * 2)
        found = shared(np.log(preferences), total, 0, most)
        assert found.sum() == min(total, layers * most) and found.min() >= 0 and found.max() <= most
        want = oracle.cake_budgets(preferences.tolist(), total, most)
        if max(want) <= most and sum(want) == total:
            np.testing.assert_array_equal(found, want)
            same += 1
        low = int(rng.integers(0, most + 1))
        found = shared(np.log(preferences), total, low, most)
        assert found.sum() == min(max(total, low * layers), layers * most) and found.min() >= low
    assert same > 100


def test_layers_of_which_nothing_is_known():
    np.testing.assert_array_equal(shared(np.array([-np.inf, 0.0, np.nan]), 10, 1, 20), [1, 8, 1])
    np.testing.assert_array_equal(shared(np.full(3, -np.inf), 9, 0, 20), [3, 3, 3])


# --- What makes it CAKE -----------------------------------------------------------------------------------------------


def test_layers_are_cut_while_others_are_still_to_come(monkeypatch):
    """All layers seen so far hold about the budget of the whole model, never all of the prompt."""
    config = dataclasses.replace(tiny.CONFIG, layer_types=("full",) * 4)
    params = kvjax.init_params(config, jax.random.key(0))
    policy = kvjax.policy("cake", 0.25, window=4)
    prefilling = importlib.import_module("kvjax.generation.prefill")
    original, cuts = prefilling.cut_layer, []

    def record(policy, spec, place, capacity, begun, slots):
        cuts.append((begun[0].k.shape[2], capacity))
        return original(policy, spec, place, capacity, begun, slots)

    monkeypatch.setattr(prefilling, "cut_layer", record)
    cache = kvjax.prefill(params, config, policy, tiny.TOKENS[:1])
    assert len(cuts) >= 4 and all(after < before for before, after in cuts)  # The first layers, several times.
    assert {before for before, _ in cuts} > {tiny.TOKENS.shape[1]}
    late = kvjax.policy("cake", 0.25, window=4, cascades=False)
    waited = kvjax.prefill(params, config, late, tiny.TOKENS[:1])
    held = [[int((layer.pos >= 0).sum(-1).max()) for layer in c.layers] for c in (cache, waited)]
    assert sum(held[0]) <= sum(held[1]) == 48 and len(set(held[1])) > 1


def test_every_row_has_its_own_budgets():
    policy = kvjax.policy("cake", SIZE, window=WINDOW, pool=POOL)
    observed = see(policy, SMALL, random_layers(), LENGTHS)
    _, slots = decide(kvjax.plan(policy, SMALL, np.array(LENGTHS), jnp.float32), observed)
    assert slots.shape == (LAYERS, 1, 3)
    np.testing.assert_array_equal(slots[:, 0].sum(0), [SIZE * LAYERS, SIZE * LAYERS, LENGTHS[2] * LAYERS])
    assert len({tuple(row) for row in np.asarray(slots[:, 0]).T}) == 3


def test_with_thinner_keys():
    """`cake | think`: layers keep different numbers of tokens, and these only some of their key channels."""
    policy = kvjax.parse_policy("cake(0.5, window=4) | think(0.5, whole=4, window=4)")
    alone = kvjax.prefill(tiny.params(), tiny.CONFIG, kvjax.policy("cake", 0.5, window=4), tiny.TOKENS, tiny.LENGTHS)
    cache = kvjax.prefill(tiny.params(), tiny.CONFIG, policy, tiny.TOKENS, tiny.LENGTHS)
    assert cache.nbytes < 0.9 * alone.nbytes
    for row in range(len(tiny.LENGTHS)):
        assert tiny.kept(cache, row) == tiny.kept(alone, row)


# --- Bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, message",
    [
        ({"window": 1}, "two queries"),
        ({"pool": 4}, "odd"),
        ({"tau1": 0.0}, "positive"),
        ({"neighbours": "near"}, "rank"),
        ({"phase": "never"}, "phase"),
    ],
)
def test_what_makes_no_sense_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        kvjax.policy("cake", 0.5, **options)


def test_compositions_and_budgets_that_cannot_be():
    with pytest.raises(PolicyError, match="must come last"):
        kvjax.parse_policy("cake(0.5) | snapkv(0.25)")
    with pytest.raises(PolicyError, match="needs at least 32"):
        kvjax.plan(kvjax.policy("cake", 20), tiny.CONFIG, 48, jnp.float32)
    with pytest.raises(PolicyError, match="outside"):
        jax.jit(lambda t: kvjax.prefill(tiny.params(), tiny.CONFIG, kvjax.policy("cake", 0.5, window=4), t))(
            tiny.TOKENS
        )
    with pytest.raises(ValueError, match="several times"):
        dataclasses.replace(
            kvjax.policy("chunkkv", 0.5).stages[0], allocate=Proportional(DispersionAndShift(), cascades=True)
        )
