"""What policies can be written, what they become, and what is refused, with which advice."""

import dataclasses
import re

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

import kvjax
from kvjax.policies import Budget, Evict, Phase, Policy, Pyramid, Ring, Uniform, as_policy, without_budget
from kvjax.policies.plan import abstract_cache, nbytes
from kvjax.policies.score import KeyNorm, WindowAttention
from tests import tiny
from tests.tiny import CONFIG, small


def plan(policy, lengths, config=CONFIG, dtype=jnp.float32):
    return kvjax.plan(as_policy(policy), config, lengths, dtype)


# --- Budgets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value, budget",
    [
        (512, Budget(tokens=512)),
        (0.25, Budget(ratio=0.25)),
        (1.0, Budget(ratio=1.0)),
        ("25%", Budget(ratio=0.25)),
        (" 12.5 % ", Budget(ratio=0.125)),
        ("64KiB", Budget(bytes=65536)),
        ("2MB", Budget(bytes=2_000_000)),
        ("1.5 GiB", Budget(bytes=3 * 2**29)),
        ("100B", Budget(bytes=100)),
        ("12.5 %B", Budget(size=0.125)),
        (Budget(tokens=3), Budget(tokens=3)),
    ],
)
def test_a_budget_is_what_people_write(value, budget):
    assert Budget.of(value) == budget
    assert Budget.of(eval(str(budget))) == budget  # As labels show it.


@pytest.mark.parametrize(
    "value, message",
    [
        (1.5, "between 0 and 1; got 1.5. For tokens give an int"),
        ("150%", "between 0 and 1"),
        ("150%B", "A size is the part that is kept, between 0 and 1"),
        (0, "must be positive"),
        (-3, "must be positive"),
        (0.0, "must be positive"),
        (True, "not a truth value"),
        ("many", "Cannot read the budget 'many': give an int .* a float up to 1.0 .* '64KiB'"),
        ("12", "Cannot read the budget"),
        ("3 parsecs", "Cannot read the budget"),
        (None, "Cannot read the budget None"),
    ],
)
def test_a_budget_is_refused(value, message):
    with pytest.raises(ValueError, match=message):
        Budget.of(value)


def test_a_budget_is_one_thing():
    for fields in ({}, {"tokens": 3, "ratio": 0.5}):
        with pytest.raises(ValueError, match="exactly one"):
            Budget(**fields)
    with pytest.raises(ValueError, match="bytes depends on the model"):
        Budget(bytes=9).mean(3)


LENGTHS = st.lists(st.integers(1, 4000), min_size=1, max_size=4)


@given(
    LENGTHS,
    st.integers(1, 40),
    st.integers(1, 64),
    st.floats(1, 50),
    st.one_of(st.integers(1, 5000), st.floats(0.01, 1)),
)
@settings(max_examples=300)
def test_layers_share_a_budget_and_never_exceed_it(lengths, layers, least, beta, budget):
    lengths = np.array(lengths)
    mean = Budget.of(budget).mean(lengths)
    for allocate in (Uniform(), Pyramid(beta)):
        slots = allocate(mean, lengths, layers, least)
        assert slots.shape == (layers, len(lengths)) and (slots <= lengths).all() and (slots >= 0).all()
        assert (slots.sum(0) <= (mean + 1e-3) * layers).all()  # The float error that is forgiven.
        if isinstance(allocate, Pyramid) and layers > 1:
            pyramid = slots.min(0) < slots.max(0)
            assert (slots[:, pyramid] >= least).all()
            # Never more in a later layer, but for slots that rounding took from the first ones.
            assert (np.diff(slots, axis=0) <= 1).all()


@given(LENGTHS, st.one_of(st.integers(1, 5000), st.floats(0.05, 1)))
@settings(max_examples=25)
def test_host_and_device_plan_alike(lengths, budget):
    lengths = np.array((lengths * 4)[:4], np.int32)
    for allocate in (Uniform(), Pyramid(7.0)):
        host = allocate(Budget.of(budget).mean(lengths), lengths, 5, 8)
        device = allocate(Budget.of(budget).mean(jnp.asarray(lengths)), jnp.asarray(lengths), 5, 8)
        np.testing.assert_array_equal(host, device)


# --- Writing policies -------------------------------------------------------------------------------------------------


def test_parsing_is_calling():
    same = {
        "full": kvjax.policy("full"),
        "snapkv(0.25)": kvjax.policy("snapkv", 0.25),
        "snapkv(0.25, window=16, kind='max')": kvjax.policy("snapkv", budget=0.25, window=16, kind="max"),
        "  h2o( 512 )": kvjax.policy("h2o", 512),
        "knorm('64KiB')": kvjax.policy("knorm", "64KiB"),
        "chunkkv(0.25, score=knorm)": kvjax.policy("chunkkv", 0.25, score="knorm"),
        "chunkkv(0.25, score=snapkv(window=8))": kvjax.policy("chunkkv", 0.25, score="snapkv(window=8)"),
        "snapkv(0.25) | kivi(bits=4)": kvjax.policy("snapkv", 0.25) | kvjax.policy("kivi", bits=4),
        "snapkv(0.5) | knorm(0.25) | int8": kvjax.policy("snapkv", 0.5)
        | (kvjax.policy("knorm", 0.25) | kvjax.policy("int8")),
    }
    for text, policy in same.items():
        assert kvjax.parse_policy(text) == policy and hash(kvjax.parse_policy(text)) == hash(policy)
        assert kvjax.parse_policy(str(kvjax.parse_policy(text))) == policy  # Its label says how to write it.
    assert kvjax.parse_policy("snapkv | kivi", budget=0.25) == kvjax.parse_policy("snapkv(0.25) | kivi")
    assert kvjax.parse_policy("snapkv(0.5)", budget=0.25) == kvjax.policy("snapkv", 0.5)
    assert kvjax.parse_policy("full", budget=0.25) == Policy()
    assert as_policy(None) == Policy() and as_policy("tova(9)") == kvjax.policy("tova", 9)


@pytest.mark.parametrize(
    ("text", "method", "budget"),
    [
        ("full", "full", None),
        ("kivi(bits=2)", "kivi(bits=2)", None),
        ("snapkv(0.25) | kivi(bits=2)", "snapkv | kivi(bits=2)", "0.25"),
        ("chunkkv(512, score=snapkv(window=16))", "chunkkv(score=snapkv(window=16))", "512"),
        ("adakv('25%B', window=16)", "adakv(window=16)", "25%B"),
        ("quest(budget=0.5)", "quest", "0.5"),
    ],
)
def test_a_method_without_its_budget(text, method, budget):
    assert without_budget(text) == (method, budget)


@pytest.mark.parametrize("name", kvjax.methods())
def test_every_method_can_be_listed_and_built(name):
    method = kvjax.methods()[name]
    assert method.summary.endswith(".") and method.url.startswith("https://") and method.paper
    assert method.signature.startswith(f"{name}(") and isinstance(method.typical(), Policy)
    assert kvjax.parse_policy(str(method.typical())) == method.typical()
    assert "Args:" in (method.build.__doc__ or "") or not method.parameters


def test_methods_stays_a_function():
    """The folder `kvjax.methods` must not take its place once it has been imported."""
    import kvjax.methods.snapkv  # noqa: F401

    kvjax.policy("full")
    assert callable(kvjax.methods) and "snapkv" in kvjax.methods()


def test_full_is_neutral():
    snapkv = kvjax.policy("snapkv", 0.25)
    assert kvjax.policy("full") | snapkv == snapkv == snapkv | kvjax.policy("full")


def test_the_parts_of_a_composition():
    policy = kvjax.parse_policy("snapkv(0.5, window=8) | h2o(0.25) | int4")
    assert [type(stage.score).__name__ for stage in policy.stages] == ["WindowAttention", "AccumulatedAttention"]
    assert policy.store == kvjax.policy("int4").store and policy.acts_every_step
    assert policy.needs.window == 8 and policy.needs.column_sums
    assert str(policy) == "snapkv(0.5, window=8) | h2o(0.25) | int4"
    assert not kvjax.policy("streaming_llm", 8).acts_every_step  # A ring forgets by itself, whatever the chunk.
    assert (
        str(Phase()) == "end of prompt"
        and str(Phase("step")) == "every step"
        and str(Phase("step", 8)) == "every 8 steps"
    )


REFUSED = [
    ("snapvk(0.5)", "Unknown method 'snapvk'. Did you mean snapkv"),
    ("qqqq", "Unknown method 'qqqq'. Known: .*chunkkv, .*window"),
    ("snapkv(0.5, windows=8)", "snapkv has no parameter 'windows'. Did you mean window"),
    ("snapkv", "snapkv: missing a required argument: 'budget'. It is snapkv\\(budget, window=32"),
    ("snapkv(0.5, 8)", "snapkv: too many positional arguments. It is snapkv"),
    ("snapkv(0.5", "Cannot read the policy 'snapkv\\(0.5': .* Write it like"),
    ("snapkv(0.5) + kivi", "Cannot read 'snapkv\\(0.5\\) \\+ kivi'.*Write it like"),
    ("kvjax.snapkv(0.5)", "Cannot read 'kvjax.snapkv\\(0.5\\)'"),
    ("snapkv(0.5, window=1+x)", "Cannot read the value '1 \\+ x'"),
    ("", "Cannot read the policy ''"),
    ("snapkv(1.5)", "snapkv: A ratio is the part that is kept, between 0 and 1; got 1.5"),
    ("snapkv(0.5, pool=4)", "pool's width odd"),
    ("snapkv(0.5, kind='mean')", "kind avg or max"),
    ("snapkv(0.5, window=0)", "window must be positive"),
    ("pyramidkv(0.5, beta=0.5)", "beta must be at least 1, got 0.5"),
    ("h2o(0.5, recent=1.5)", "recent is a share below 1 or a number"),
    ("tova(0.5, phase='never')", 'A phase is "prompt", "step" or "chunk", got \'never\''),
    ("tova(0.5, every=0)", "every must be at least 1"),
    ("streaming_llm(0.5, sinks=-1)", "sinks must not be negative"),
    ("kivi(bits=3)", "kivi: bits must be 2, 4 or 8, got 3"),
    ("kivi(residual=100)", "residual=100 must be a multiple of group=32"),
    ("fp8(dtype='float16')", 'dtype must be "float8_e4m3fn" or "float8_e5m2"'),
    ("chunkkv(0.5, chunk=0)", "chunk must be positive"),
    ("chunkkv(0.5, score=kivi)", "chunkkv wraps one method that evicts by a score; 'kivi' is none"),
    ("chunkkv(0.5, score=window)", "chunkkv wraps one method that evicts by a score"),
    ("chunkkv(0.5, score=snapvk)", "Unknown method 'snapvk'. Did you mean snapkv"),
    ("kivi | int8", "both lay tokens out in bytes; a token is stored once"),
    ("kivi | snapkv(0.5)", "evict first, then store: write snapkv\\(0.5\\) \\| kivi"),
    ("h2o(0.5) | kivi", 'packs groups of tokens.*phase="prompt".*int8, int4, fp8'),
    ("streaming_llm(0.5) | kivi", "packs groups of tokens"),
    ("snapkv(0.5) | window(0.25)", "goes by the order of tokens.*follows an eviction.*use one of the two"),
    ("snapkv(0.5) | chunkkv(0.25)", "goes by the order of tokens.*chunks of neighbours.*use one of the two"),
    ("h2o(0.5) | snapkv(0.25)", "acts while tokens are added is followed by another.*must come last"),
    ("window(64) | snapkv(32)", "must come last"),
    (
        "snapkv(0.25) | knorm(0.25)",
        "the second budget \\(0.25\\) is not below the first \\(0.25\\).*Give the later one less",
    ),
    ("snapkv(128) | knorm(256)", "the second budget \\(256\\) is not below the first \\(128\\)"),
    ("snapkv('64KiB') | knorm(0.25)", "bytes can only bound the last policy"),
]


@pytest.mark.parametrize("text, message", REFUSED, ids=[text for text, _ in REFUSED])
def test_refused_when_it_is_built(text, message):
    with pytest.raises(kvjax.PolicyError, match=message):
        kvjax.parse_policy(text)


def test_a_score_that_cannot_be_kept_up_is_refused():
    with pytest.raises(ValueError, match='WindowAttention can only be taken at the end of the prompt.*phase="prompt"'):
        Evict(score=WindowAttention(), budget=Budget(tokens=9), phase=Phase("step"))
    with pytest.raises(ValueError, match="Normalized sums cannot be kept up"):
        kvjax.policy("h2o", 0.5, normalized=True)
    with pytest.raises(TypeError):
        kvjax.policy("full") | "kivi"  # type: ignore[operator]
    assert Evict(score=KeyNorm(), budget=Budget(tokens=9), phase=Phase("step")).phase.when == "step"


# --- Planning ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, length, message",
    [
        (
            "snapkv(0.25, window=32)",
            100,
            "leaves 25 of 100 tokens in layer 0, and the method needs at least 32. Give it more",
        ),
        ("streaming_llm(4)", 100, "needs at least 5"),
        ("chunkkv(10, chunk=20, score=knorm)", 100, "needs at least 20"),
        ("expected_attention(3)", 100, "needs at least 4"),
        ("h2o(1)", 100, "needs at least 2"),
        ("pyramidkv(0.1, window=16)", 100, "needs at least 16"),
        ("knorm(0.005)", 100, "leaves 0 of 100 tokens"),
        ("knorm('1KiB')", 100, r"1024 bytes are too few: .* 1 slots in each of the others take \d+"),
        ("kivi(group=32)", 100, "groups of 32 channels.*values have 16 channels. Choose a group that divides it"),
        ("int4(group=12)", 100, "groups of 12 need a head_dim"),
    ],
)
def test_refused_when_it_is_planned(text, length, message):
    with pytest.raises(kvjax.PolicyError, match=message):
        plan(text, length)


def capacities(planned):
    return tuple(place.capacities for place in planned.places)


def test_a_size_is_a_part_of_the_full_cache():
    full = abstract_cache(plan("full", 100), CONFIG, 1, jnp.float32).nbytes
    for text in ("knorm('60%B')", "cake('60%B', window=4)", "h2o('60%B')"):
        cache = abstract_cache(plan(text, 100), CONFIG, 1, jnp.float32)
        assert 0.5 * full < cache.nbytes <= 0.6 * full, text
    with pytest.raises(kvjax.PolicyError, match="bytes are too few"):
        plan("knorm('1%B')", 100)


def test_a_model_without_full_layers_is_refused():
    sliding = dataclasses.replace(CONFIG, layer_types=("sliding",) * 3)
    with pytest.raises(kvjax.PolicyError, match="compresses full-attention layers, and llama has none. Use 'full'"):
        plan("snapkv(0.5)", 100, sliding)
    assert plan("full", 100, sliding).places == ()


def test_a_short_prompt_needs_no_budget():
    """The floor counts only where tokens would have to go."""
    assert capacities(plan("snapkv(64, window=32)", [8, 100])) == ((64,), (64,))
    assert capacities(plan("snapkv(64)", 8)) == ((8,), (8,))
    assert capacities(plan("streaming_llm(64)", 8)) == ((64,), (64,))  # A ring grows to its size later.


def test_every_row_has_its_own_slots():
    lengths = np.array([100, 48, 7])
    planned = plan("knorm(0.5) | keydiff(0.25)", lengths)
    assert capacities(planned) == ((50, 25), (50, 25)) and planned.length == 100
    slots = np.asarray(planned.slots(jnp.asarray(lengths)))
    assert slots.tolist() == [[[50, 24, 3], [25, 12, 1]]] * 2  # [layers, stages, B]
    assert np.asarray(plan("knorm(20)", lengths).slots(jnp.asarray(lengths)))[0, 0].tolist() == [20, 20, 7]
    assert plan("full", lengths).slots(jnp.asarray(lengths)).shape == (2, 0, 3)


@pytest.mark.parametrize(
    "text", ["knorm({})", "h2o({})", "window({})", "snapkv({}, window=4) | int8", "knorm(0.9) | keydiff({})"]
)
@pytest.mark.parametrize("size", [9_000, 12_345])
def test_bytes_become_the_most_tokens_that_fit(text, size):
    def cost(budget):
        return nbytes(plan(text.format(budget), 48), CONFIG, jnp.float32)

    tokens = plan(text.format(f"'{size}B'"), 48).policy.stages[-1].budget.tokens
    assert cost(tokens) <= size
    assert tokens == 48 or size < cost(tokens + 1)  # All of the prompt, or not one token more.


def test_what_a_plan_says_is_what_a_prefill_allocates():
    for text in ("h2o(0.5) | int8", "snapkv(0.5, window=4) | kivi(group=16, residual=16)", "streaming_llm(20)"):
        policy = kvjax.parse_policy(text)
        cache = kvjax.prefill(tiny.params(), CONFIG, policy, tiny.TOKENS, tiny.LENGTHS)
        planned = plan(policy, tiny.LENGTHS)
        abstract = abstract_cache(planned, CONFIG, 4, jnp.float32)
        assert abstract.nbytes == cache.nbytes
        assert [x.shape for x in jax.tree.leaves(abstract)] == [x.shape for x in jax.tree.leaves(cache)]


def test_rings_and_steps_are_what_they_say():
    assert isinstance(small("window").stages[0], Ring)
    assert re.fullmatch(r"window\(budget=0.5\)", str(small("window")))
