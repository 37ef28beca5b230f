"""What every method must satisfy (DESIGN.md), over the whole registry and over compositions.

A new method needs no line here: its typical parameters come from the registry, made small by `tests.tiny.SMALL`.
Whether it equals its paper is the oracles' business (`tests/methods`); whether it gains anything, the evaluation's.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import kvjax
from kvjax.cache import EMPTY, GroupedSlots, Slots, Tokens
from kvjax.cache.types import tree_nbytes
from kvjax.checkpoints.orbax import load_cache, save_cache
from kvjax.generation.extend import extend_hidden
from kvjax.generation.prefill import _compress_layer, next_logits
from kvjax.models.params import AXES
from tests import tiny
from tests.tiny import (
    CONFIG,
    LENGTHS,
    QUESTION,
    QUESTION_LENGTHS,
    TOKENS,
    assert_same_content,
    assert_trees_equal,
    kept,
    small,
)

COMPOSITIONS = {
    text.split("(")[0] + " | " + text.split("| ")[-1].split("(")[0] if "|" in text else text.split(",")[0] + ")": text
    for text in (
        "snapkv(0.5, window=4) | kivi(bits=2, group=16, residual=16)",
        "h2o(0.5) | int8",
        "streaming_llm(0.5) | int4",
        "chunkkv(0.5, chunk=4, score=knorm)",
        "snapkv(0.6, window=4) | knorm(0.25)",
        "tova(0.5, every=4)",
    )
}
NAMES = [*kvjax.methods(), *COMPOSITIONS]
BUDGETED = [name for name, method in kvjax.methods().items() if "budget" in method.parameters]
EVERYTHING = 4096  # Tokens: more than there ever are.
ROWS = len(LENGTHS)
ONE_CODE = 2.0  # In other shapes a last bit may differ, and with it the code of a number that lies between two.
EXACT = 2e-5  # Of float32 logits around 1: another order of the same sums.
VALID = np.arange(QUESTION.shape[1]) < QUESTION_LENGTHS[:, None]


@functools.cache
def policy_of(name: str) -> kvjax.Policy:
    return kvjax.parse_policy(COMPOSITIONS[name]) if name in COMPOSITIONS else small(name)


@functools.cache
def prefilled(policy: kvjax.Policy):
    """Logits of the next token and the cache of the ragged batch."""
    return kvjax.prefill_logits(tiny.params(), CONFIG, policy, TOKENS, LENGTHS)


@functools.cache
def extended(policy: kvjax.Policy):
    """Logits [B, T, vocab] of a ragged question, and the cache after it."""
    return ask(policy, prefilled(policy)[1])


def ask(policy: kvjax.Policy, cache: kvjax.Cache, question=QUESTION, lengths=QUESTION_LENGTHS):
    logits, cache = kvjax.extend(tiny.params(), CONFIG, policy, cache, question, lengths)
    return np.asarray(logits), cache


def stored(policy: kvjax.Policy) -> bool:
    """Whether tokens are rounded when they are stored."""
    return policy.store is not None


@pytest.fixture(params=NAMES, scope="module")
def policy(request) -> kvjax.Policy:
    return policy_of(request.param)


def test_the_typical_policies_compress(policy):
    """Or the tests below would compare the full cache with itself."""
    if policy != kvjax.policy("full"):
        assert prefilled(policy)[1].nbytes < prefilled(kvjax.policy("full"))[1].nbytes


# --- 1. Identity -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BUDGETED)
def test_a_budget_of_everything_is_full_attention(name):
    policy, full = small(name, budget=EVERYTHING), kvjax.policy("full")
    logits, cache = prefilled(policy)
    np.testing.assert_array_equal(logits, prefilled(full)[0])
    if policy.stages[-1].phase.when == "prompt":  # Then it is the full cache, and nothing more needs to be shown.
        for layer, want in zip(tiny.full_layers(cache), tiny.full_layers(prefilled(full)[1]), strict=True):
            assert_same_content(layer, want, atol=0)
        return
    np.testing.assert_allclose(extended(policy)[0][VALID], extended(full)[0][VALID], atol=EXACT)
    for row in range(ROWS):
        assert kept(extended(policy)[1], row) == kept(extended(full)[1], row)


@pytest.mark.parametrize("name", [name for name in NAMES if stored(policy_of(name)) and not policy_of(name).stages])
def test_stored_tokens_read_back(name):
    """Every token is there, and its key and value are close: exactly how close is tested where codecs are."""
    changes = {"bits": 8} if "bits" in kvjax.methods()[name].parameters else {}
    cache, full = prefilled(small(name, **changes))[1], prefilled(kvjax.policy("full"))[1]
    for layer, plain in zip(tiny.full_layers(cache), tiny.full_layers(full), strict=True):
        for row in range(ROWS):
            (pos, *found), (full_pos, *want) = tiny.content(layer, row), tiny.content(plain, row)
            np.testing.assert_array_equal(pos, full_pos)
            for x, y in zip(found, want, strict=True):
                assert np.abs(x - y).max() <= (0.01 if changes else 0.3) * np.ptp(y)


@pytest.mark.parametrize("text", ["kivi(bits=8, group=16, residual=16)", "int8"])
def test_eight_bits_come_near_full_attention(text):
    near, full = extended(kvjax.parse_policy(text))[0][VALID], extended(kvjax.policy("full"))[0][VALID]
    assert 0 < np.abs(near - full).max() < 0.1


# --- 2. Budget -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [0.5, 14])
@pytest.mark.parametrize("name", BUDGETED)
def test_never_more_slots_than_asked(name, budget):
    policy = small(name, budget=budget)
    (stage,) = policy.stages
    tokens = LENGTHS * budget if isinstance(budget, float) else np.minimum(budget, LENGTHS)

    def counts(cache):
        """Slots in use of every layer and row, the most of its heads."""
        return np.stack([np.asarray((cache.layers[i].pos != EMPTY).sum(-1).max(-1)) for i in CONFIG.full_layers])

    cache = prefilled(policy)[1]
    found, layers = counts(cache), len(CONFIG.full_layers)
    assert (found.sum(0) <= np.floor(tokens * layers + 1e-3)).all()  # Over all layers that are compressed.
    assert (found >= np.minimum(stage.least, LENGTHS)).all()  # No layer below its floor.
    assert (found.sum(0) > 0.5 * tokens * layers).all()  # And a budget is there to be spent.
    for number, i in enumerate(CONFIG.full_layers):  # No slot that no row uses.
        assert cache.layers[i].pos.shape[-1] - found[number].max() < tiny.SMALL["chunk"]
    if stage.phase.when == "step":  # What goes on acting stays within its budget.
        after = extended(policy)[1]
        assert (counts(after) <= np.maximum(tokens, budget)).all()
        for i in CONFIG.full_layers:
            assert after.layers[i].pos.shape[-1] <= max(tokens.max(), budget) + 1  # The newest, until one has left.


@pytest.mark.parametrize("name", BUDGETED)
def test_never_more_bytes_than_asked(name):
    full = kvjax.prefill(tiny.params(), CONFIG, kvjax.policy("full"), TOKENS[:1])
    budget = kvjax.Budget(bytes=int(full.nbytes * 0.6))
    cache = kvjax.prefill(tiny.params(), CONFIG, small(name, budget=budget), TOKENS[:1])
    slot = 2 * 2 * 16 * 4 + 4 * 3  # One more token in one layer: keys and values of two heads, and its bookkeeping.
    chunk = tiny.SMALL["chunk"] if name == "chunkkv" else 1
    spare = cache.reserve(1) if cache.policy.acts_every_step else cache  # The slot of the token that comes next counts.
    assert budget.bytes - len(CONFIG.full_layers) * (slot * chunk + 8) < spare.nbytes <= budget.bytes
    tokens = cache.policy.stages[-1].budget.tokens
    assert tokens is not None
    assert sum(cache.layers[i].pos.shape[-1] for i in CONFIG.full_layers) <= tokens * len(CONFIG.full_layers)


def test_bytes_are_what_the_arrays_hold(policy):
    for cache in (prefilled(policy)[1], extended(policy)[1]):
        leaves = jax.tree.leaves(cache)
        assert cache.nbytes == sum(leaf.nbytes for leaf in leaves) == tree_nbytes(cache)
        assert cache.nbytes == sum(shard.data.nbytes for leaf in leaves for shard in leaf.addressable_shards)
        per_token = 2 * CONFIG.num_kv_heads * CONFIG.head_dim * 2  # bfloat16 keys and values of one layer.
        tokens = sum(n * 2 + min(n, CONFIG.sliding_window) for n in np.asarray(cache.seen).tolist())
        assert cache.full_nbytes == tokens * per_token
        assert cache.compression == pytest.approx(tokens * per_token / cache.nbytes)


def test_sliding_layers_stay_as_they_are(policy):
    cache, full = prefilled(policy)[1], prefilled(kvjax.policy("full"))[1]
    assert_trees_equal(cache.layers[1], full.layers[1])


# --- 4. Purity -------------------------------------------------------------------------------------------------------


def test_fused_prefill_is_observe_then_compress(policy):
    observed = kvjax.observe(tiny.params(), CONFIG, TOKENS, LENGTHS, needs=policy.needs)
    plan = kvjax.plan(policy, CONFIG, LENGTHS, jnp.float32)
    logits, cache = prefilled(policy)
    assert_trees_equal(kvjax.compress(plan, observed), cache)
    np.testing.assert_array_equal(next_logits(tiny.params(), observed), logits)


@pytest.mark.parametrize(
    "name", ["full", "h2o", "streaming_llm", "snapkv | kivi"]
)  # One of each layout: it takes long.
def test_jit_changes_nothing(name):
    policy = policy_of(name)

    def run(tokens, lengths):
        return kvjax.prefill(tiny.params(), CONFIG, policy, tokens, lengths)

    found, want = jax.jit(run)(TOKENS, LENGTHS), prefilled(policy)[1]
    assert jax.tree.structure(found) == jax.tree.structure(want)
    for row in range(ROWS):
        assert kept(found, row) == kept(want, row)
    for layer, other in zip(tiny.full_layers(found), tiny.full_layers(want), strict=True):
        assert_same_content(layer, other, atol=ONE_CODE if stored(policy) else EXACT)


def test_equal_policies_are_equal_and_compile_once(policy):
    name = next(name for name in NAMES if policy_of(name) is policy)
    policy_of.cache_clear()
    again = policy_of(name)
    assert again is not policy and again == policy and hash(again) == hash(policy)
    logits, cache = extended(policy)
    sizes = [f._cache_size() for f in (_compress_layer, extend_hidden)]
    _, twice = kvjax.prefill_logits(tiny.params(), CONFIG, again, TOKENS, LENGTHS)
    assert_trees_equal(twice, prefilled(policy)[1])
    found, after = ask(again, twice)
    np.testing.assert_array_equal(found, logits)
    assert_trees_equal(after, cache)
    assert sizes == [f._cache_size() for f in (_compress_layer, extend_hidden)]


# --- 5. Batch --------------------------------------------------------------------------------------------------------


def assert_row(policy, cache, logits, row: int, want_row: int):
    """One row equals a row of the ragged batch, before and after the question."""
    _, want_cache = prefilled(policy)
    want_logits, want_after = extended(policy)
    assert kept(cache, row) == kept(want_cache, want_row)
    valid = QUESTION_LENGTHS[want_row]
    np.testing.assert_allclose(
        logits[row, :valid], want_logits[want_row, :valid], atol=50 * EXACT if stored(policy) else EXACT
    )


def test_rows_do_not_see_neighbours_order_or_padding(policy):
    order = np.array([2, 0, 3, 1])
    tokens = TOKENS[order].copy()
    for row, length in enumerate(LENGTHS[order]):
        tokens[row, length:] = 127  # Padding is another token.
    tokens[1] = tokens[1, ::-1]  # One neighbour is another prompt.
    cache = kvjax.prefill(tiny.params(), CONFIG, policy, tokens, LENGTHS[order])
    question = QUESTION[order].copy()
    question[~VALID[order]] = 127
    logits, _ = ask(policy, cache, question, QUESTION_LENGTHS[order])
    for row in (0, 2, 3):
        assert_row(policy, cache, logits, row, order[row])


def test_a_row_alone_without_padding(policy):
    row = 1
    tokens = TOKENS[row : row + 1, : LENGTHS[row]]
    logits, cache = kvjax.prefill_logits(tiny.params(), CONFIG, policy, tokens)
    want_logits, want = prefilled(policy)
    assert kept(cache, 0) == kept(want, row)
    np.testing.assert_allclose(logits[0], want_logits[row], atol=EXACT)
    for layer, other in zip(tiny.full_layers(cache), tiny.full_layers(want), strict=True):
        assert_same_content(layer, other, ONE_CODE if stored(policy) else EXACT, rows=[(0, row)])


def test_chunks_of_a_prompt():
    """Where nothing is forgotten, a prompt may come in pieces."""
    full = kvjax.policy("full")
    head = np.minimum(LENGTHS, 45)
    cache = kvjax.prefill(tiny.params(), CONFIG, full, TOKENS[:, :45], head)
    tail = np.pad(TOKENS[:, 45:], ((0, 0), (0, 3)))
    _, cache = ask(full, cache, tail, LENGTHS - head)
    for row in range(ROWS):
        assert kept(cache, row) == kept(prefilled(full)[1], row)
    np.testing.assert_allclose(ask(full, cache)[0][VALID], extended(full)[0][VALID], atol=EXACT)


def test_token_by_token_is_the_block(policy):
    logits, cache = extended(policy)
    step = prefilled(policy)[1]
    for t in range(QUESTION.shape[1]):
        shifted = np.roll(QUESTION, -t, axis=1)  # One token at a time, in the shape that is compiled already.
        found, step = ask(policy, step, shifted, VALID[:, t].astype(np.int32))
        if not stored(policy):  # A block attends to its own tokens before they are rounded.
            np.testing.assert_allclose(found[VALID[:, t], 0], logits[VALID[:, t], t], atol=EXACT)
    np.testing.assert_array_equal(step.seen, cache.seen)
    for row in range(ROWS):
        assert kept(step, row) == kept(cache, row)
    # What the first layer stores depends on the tokens alone.
    assert_same_content(step.layers[0], cache.layers[0], atol=EXACT)


# --- Slots -----------------------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_dropped(policy, rng):
    """Nobody can add room inside `jit`: what is there stays as it is, and nothing is clamped into the last slot."""
    layer = prefilled(policy)[1].layers[0]
    if layer.room is None or policy.acts_every_step:
        pytest.skip("Old tokens make way.")
    room = np.asarray(layer.room)
    length = int(room.max()) + 3

    def draw(heads):
        return jnp.asarray(rng.normal(size=(ROWS, heads, length, CONFIG.head_dim)), jnp.float32)

    pos = jnp.asarray(LENGTHS[:, None] + np.arange(length), jnp.int32)
    new = Tokens(q=draw(4), k=draw(2), v=draw(2), q_raw=draw(4), k_raw=draw(2), pos=pos)
    after = jax.jit(lambda layer, new: layer.append(new))(layer, new)
    assert (np.asarray(after.room) == 0).all()
    for row in range(ROWS):
        old, now = (np.asarray(x.pos)[row] for x in (layer, after))
        added = [*range(LENGTHS[row], LENGTHS[row] + room[row])]
        assert [sorted(head[head != EMPTY]) for head in now] == [sorted([*head[head != EMPTY], *added]) for head in old]
    if not isinstance(layer, GroupedSlots):  # (There, tokens are packed as they leave the residual.)
        before, now = tiny.read_back(layer), tiny.read_back(after)
        for x, y in zip(before, now, strict=True):
            np.testing.assert_array_equal(x[before[0] != EMPTY], y[before[0] != EMPTY])


def test_room_is_added_outside_jit(policy):
    cache, after = prefilled(policy)[1], extended(policy)[1]
    if not policy.stages or policy.stages[-1].phase.when == "prompt":
        for row in range(ROWS):
            added = list(range(LENGTHS[row], LENGTHS[row] + QUESTION_LENGTHS[row]))
            assert kept(after, row) == [[head + added for head in layer] for layer in kept(cache, row)]
    np.testing.assert_array_equal(after.seen, LENGTHS + QUESTION_LENGTHS)


def fill(tree, empty, value):
    """Floats of a layout [B, H, S, ...] where empty [B, 1 or H, S]."""

    def one(leaf):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf
        mask = empty.reshape(empty.shape + (1,) * (leaf.ndim - 3))
        most = np.minimum(value, float(jnp.finfo(leaf.dtype).max))  # NaN stays NaN.
        return jnp.where(mask, jnp.asarray(most, leaf.dtype), leaf)

    return jax.tree.map(one, tree)


def poison_slots(layer: Slots) -> Slots:
    empty = layer.pos == EMPTY
    marks = None if layer.marks is None else fill(layer.marks, empty, np.nan)
    k, v = fill(layer.k, empty, np.nan), fill(layer.v, empty, LARGE)
    return dataclasses.replace(layer, k=k, v=v, marks=marks)


def poison_groups(layer: GroupedSlots) -> GroupedSlots:
    count, residual, slot = np.asarray(layer.count)[:, None, None], layer.residual, np.arange(layer.residual)
    group = np.arange(layer.k.scale.shape[2]) * layer.k.group
    k = fill(layer.k, group >= count - count % residual, np.nan)
    v = fill(layer.v, np.arange(layer.v.scale.shape[2]) >= count - residual, LARGE)
    k_recent = fill(layer.k_recent, slot >= count % residual, np.nan)
    v_recent = fill(layer.v_recent, slot >= count, LARGE)
    return dataclasses.replace(layer, k=k, v=v, k_recent=k_recent, v_recent=v_recent)


# A new layout adds its own line: what of it may hold anything while it holds nothing?
POISON = {Slots: poison_slots, GroupedSlots: poison_groups}
# Values are multiplied by weights that are exactly zero. 0 * NaN is NaN, so a large number stands in for it there: any
# weight above zero shows.
LARGE = 6e4


def test_unused_slots_may_hold_anything(policy):
    cache = prefilled(policy)[1].reserve(64)
    layers = tuple(POISON[type(layer)](layer) for layer in cache.layers)
    poisoned = dataclasses.replace(cache, layers=layers)
    if policy == kvjax.policy("full"):  # There is something to poison.
        assert np.isnan(poisoned.layers[0].k).any() and (np.asarray(poisoned.layers[0].v) == LARGE).any()
    (want, clean), (found, after) = ask(policy, cache), ask(policy, poisoned)
    np.testing.assert_allclose(found[VALID], want[VALID], atol=EXACT)
    for row in range(ROWS):
        assert kept(after, row) == kept(clean, row)
    found, _ = ask(policy, after)  # And what was evicted in between has not stirred anything up.
    np.testing.assert_allclose(found[VALID], ask(policy, clean)[0][VALID], atol=EXACT)


# --- 6. Sharded ------------------------------------------------------------------------------------------------------


def spread(cache: kvjax.Cache, mesh: Mesh, **axes: int) -> kvjax.Cache:
    """The cache over a mesh: name of a mesh axis -> axis of the leaves that lies along it, where that divides."""

    def place(leaf):
        spec: list[str | None] = [None] * leaf.ndim
        for name, axis in axes.items():
            if axis < leaf.ndim and leaf.shape[axis] % mesh.shape[name] == 0:
                spec[axis] = name
        return jax.device_put(leaf, NamedSharding(mesh, PartitionSpec(*spec)))

    return jax.tree.map(place, cache)


def spread_params(mesh: Mesh):
    """Query and KV heads, and the columns of the MLP, over the mesh's "heads"."""
    axis = {"heads": "heads", "kv_heads": "heads", "mlp": "heads"}

    def place(path, leaf):
        logical = AXES[path[-1].key]
        return jax.device_put(leaf, NamedSharding(mesh, PartitionSpec(*(axis.get(name) for name in logical))))

    return jax.tree_util.tree_map_with_path(place, tiny.params())


def decoding(policy: kvjax.Policy):
    """What of a policy matters once the prompt is compressed: policies that agree here decode alike."""
    stage = policy.stages[-1] if policy.stages else None
    return policy.store, stage if stage is not None and stage.phase.when == "step" else None


DECODED = list({decoding(policy_of(name)): name for name in reversed(NAMES)}.values())


@pytest.mark.parametrize("name", DECODED)
def test_sharded(name):
    """Over batch, heads and the sequence at once; XLA's partitioner does the rest."""
    policy = policy_of(name)
    axes = ("batch", "heads", "slots")
    mesh = jax.make_mesh((2, 2, 2), axes, axis_types=(AxisType.Auto,) * 3)
    cache = spread(prefilled(policy)[1].reserve(64), mesh, batch=0, heads=1, slots=2)
    assert max(len(leaf.sharding.device_set) for leaf in jax.tree.leaves(cache)) == 8
    logits, after = kvjax.extend(spread_params(mesh), CONFIG, policy, cache, QUESTION, QUESTION_LENGTHS)
    want, want_after = extended(policy)
    np.testing.assert_allclose(np.asarray(logits)[VALID], want[VALID], atol=50 * EXACT if stored(policy) else EXACT)
    for row in range(ROWS):
        assert kept(after, row) == kept(want_after, row)


# --- 7. Round trip ---------------------------------------------------------------------------------------------------


def test_a_cache_survives_the_disk(policy, tmp_path):
    logits, cache = prefilled(policy)
    save_cache(tmp_path / "cache", cache)
    back = load_cache(tmp_path / "cache")
    assert_trees_equal(back, cache)
    assert back.policy == policy or policy.stages[-1].budget.bytes is not None
    np.testing.assert_array_equal(ask(back.policy, back)[0], extended(policy)[0])


# --- Cache operations ------------------------------------------------------------------------------------------------


def test_rows_reach_every_leaf(policy):
    cache = prefilled(policy)[1]
    for index in ([2, 0, 0], slice(1, 3), np.array([3])):
        for leaf, found in zip(jax.tree.leaves(cache), jax.tree.leaves(cache.rows(index)), strict=True):
            np.testing.assert_array_equal(found, np.asarray(leaf)[index])
        assert_trees_equal(cache[index], cache.rows(index))
    assert_trees_equal(cache.rows(2), cache.rows([2]))
    assert_trees_equal(cache.repeat(2), cache.rows([0, 0, 1, 1, 2, 2, 3, 3]))
    assert cache.rows([2, 0, 0]).batch_size == 3


def test_generation_follows_reordered_rows(policy):
    order = np.array([2, 0, 0, 1])
    want, _ = extended(policy)
    logits, _ = ask(policy, prefilled(policy)[1].rows(order), QUESTION[order], QUESTION_LENGTHS[order])
    np.testing.assert_allclose(logits[VALID[order]], want[order][VALID[order]], atol=EXACT)
