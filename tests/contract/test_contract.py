"""What every method must satisfy (DESIGN.md), over the whole registry and over compositions.

A new method needs no line here: its typical parameters come from the registry, made small by `tests.tiny.SMALL`. Whether it
equals its paper is the oracles' business (`tests/methods`); whether it gains anything, the evaluation's.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import kvjax
from kvjax.cache import EMPTY, GroupedSlots, Slots
from kvjax.cache.types import tree_nbytes
from kvjax.checkpoints.orbax import load_cache, save_cache
from kvjax.generation.extend import extend_hidden
from kvjax.generation.prefill import _compress_layer, next_logits
from kvjax.models.params import AXES
from tests import tiny
from tests.tiny import CONFIG, LENGTHS, QUESTION, QUESTION_LENGTHS, TOKENS, assert_trees_equal, kept, small

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
    for found, want in zip(prefilled(policy)[:1] + extended(policy)[:1], prefilled(full)[:1] + extended(full)[:1]):
        valid = VALID if found.ndim == 3 else slice(None)
        np.testing.assert_allclose(np.asarray(found)[valid], np.asarray(want)[valid], atol=EXACT)
    everything = [list(range(n + m)) for n, m in zip(LENGTHS, QUESTION_LENGTHS, strict=True)]
    for row in range(ROWS):
        assert all(head == everything[row] for layer in kept(extended(policy)[1], row) for head in layer)


@pytest.mark.parametrize("name", BUDGETED)
def test_a_ratio_of_one_keeps_the_whole_prompt(name):
    cache = prefilled(small(name, budget=1.0))[1]
    for row, length in enumerate(LENGTHS):
        assert all(head == list(range(length)) for layer in kept(cache, row) for head in layer)


@pytest.mark.parametrize("name", [name for name in NAMES if stored(policy_of(name)) and not policy_of(name).stages])
def test_stored_tokens_read_back(name):
    """Every token is there, and its key and value are close: exactly how close is tested where codecs are."""
    changes = {"bits": 8} if "bits" in kvjax.methods()[name].parameters else {}
    cache, full = prefilled(small(name, **changes))[1], prefilled(kvjax.policy("full"))[1]
    for i in CONFIG.full_layers:
        (pos, *found), (full_pos, *want) = tiny.read_back(cache.layers[i]), tiny.read_back(full.layers[i])
        for row, length in enumerate(LENGTHS):
            order = np.argsort(np.where(pos[row] == EMPTY, 10**6, pos[row]), -1, kind="stable")[:, :length]
            np.testing.assert_array_equal(np.take_along_axis(pos[row], order, -1), full_pos[row, :, :length])
            for x, y in zip(found, want, strict=True):
                x, y = np.take_along_axis(x[row], order[..., None], 1), y[row, :, :length]
                assert np.abs(x - y).max() <= (0.01 if changes else 0.3) * np.ptp(y)


@pytest.mark.parametrize("text", ["kivi(bits=8, group=16, residual=16)", "int8"])
def test_eight_bits_come_near_full_attention(text):
    near, full = extended(kvjax.parse_policy(text))[0][VALID], extended(kvjax.policy("full"))[0][VALID]
    assert 0 < np.abs(near - full).max() < 0.05


# --- 2. Budget -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [0.5, 14])
@pytest.mark.parametrize("name", BUDGETED)
def test_never_more_slots_than_asked(name, budget):
    policy = small(name, budget=budget)
    cache = prefilled(policy)[1]
    allowed = np.minimum(np.floor(LENGTHS * budget + 1e-3) if isinstance(budget, float) else budget, LENGTHS)
    (stage,) = policy.stages
    counts = np.stack([np.asarray((cache.layers[i].pos != EMPTY).sum(-1).max(-1)) for i in CONFIG.full_layers])
    assert (counts.sum(0) <= allowed * len(counts)).all()  # On average over layers.
    assert (counts >= np.minimum(stage.least, LENGTHS)).all()  # No layer below its floor.
    assert (counts.sum(0) > 0.5 * allowed * len(counts)).all()  # And a budget is there to be spent.
    slots = [cache.layers[i].pos.shape[-1] for i in CONFIG.full_layers]
    assert sum(slots) <= max(allowed.max(), 14 if policy.acts_every_step else 0) * len(slots)
    if stage.phase.when == "step":  # What acts at every step stays within its budget, in slots that are there, too.
        _, after = extended(policy)
        limit = np.maximum(allowed, budget if isinstance(budget, int) else 0)
        for i in CONFIG.full_layers:
            assert ((after.layers[i].pos != EMPTY).sum(-1) <= limit[:, None]).all()
            assert after.layers[i].pos.shape[-1] <= limit.max() + 1  # The new token, until the worst one has left.


@pytest.mark.parametrize("name", BUDGETED)
def test_never_more_bytes_than_asked(name):
    full = kvjax.prefill(tiny.params(), CONFIG, kvjax.policy("full"), TOKENS[:1])
    budget = kvjax.Budget(bytes=int(full.nbytes * 0.6))
    cache = kvjax.prefill(tiny.params(), CONFIG, small(name, budget=budget), TOKENS[:1])
    slot = 2 * 2 * 16 * 4 + 4 * 3  # One more token in one layer: keys and values of two heads, and its bookkeeping.
    chunk = tiny.SMALL["chunk"] if name == "chunkkv" else 1
    assert budget.bytes - len(CONFIG.full_layers) * (slot * chunk + 8) < cache.nbytes <= budget.bytes
    assert cache.policy.stages[-1].budget.tokens is not None


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


def test_jit_changes_nothing(policy):
    def run(tokens, lengths):
        return kvjax.prefill(tiny.params(), CONFIG, policy, tokens, lengths)

    found, want = jax.jit(run)(TOKENS, LENGTHS), prefilled(policy)[1]
    assert jax.tree.structure(found) == jax.tree.structure(want)
    for row in range(ROWS):
        assert kept(found, row) == kept(want, row)
    if not stored(policy):  # Codes may round the other way for a last bit.
        for i in CONFIG.full_layers:
            for x, y in zip(tiny.read_back(found.layers[i]), tiny.read_back(want.layers[i]), strict=True):
                np.testing.assert_allclose(x, y, atol=EXACT)


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
    np.testing.assert_allclose(logits[row, :valid], want_logits[want_row, :valid], atol=50 * EXACT if stored(policy) else EXACT)


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
    cache = kvjax.prefill(tiny.params(), CONFIG, policy, TOKENS[row : row + 1, : LENGTHS[row]])
    logits, _ = ask(policy, cache, QUESTION[row : row + 1], QUESTION_LENGTHS[row : row + 1])
    assert_row(policy, cache, logits, 0, row)


@pytest.mark.parametrize("name", ["full", "window", "streaming_llm", "streaming_llm | int4"])
def test_chunks_of_a_prompt(name):
    """Where nothing is scored, a prompt may come in pieces of any size."""
    policy = kvjax.parse_policy("streaming_llm(14) | int8") if "|" in name else small(name, **({} if name == "full" else {"budget": 14}))
    whole = kvjax.prefill(tiny.params(), CONFIG, policy, TOKENS, LENGTHS)
    head = np.minimum(LENGTHS, 20)
    tail = np.zeros((ROWS, 28), np.int32)
    for row, length in enumerate(LENGTHS):
        tail[row, : length - head[row]] = TOKENS[row, head[row] : length]
    cache = kvjax.prefill(tiny.params(), CONFIG, policy, TOKENS[:, :20], head)
    _, cache = ask(policy, cache, tail, LENGTHS - head)
    np.testing.assert_array_equal(cache.seen, whole.seen)
    for row in range(ROWS):
        assert kept(cache, row) == kept(whole, row)
    # Quantized keys enter the later layers' inputs in the second half.
    atol = 0.1 if stored(policy) else EXACT
    np.testing.assert_allclose(ask(policy, cache)[0][VALID], ask(policy, whole)[0][VALID], atol=atol)


def test_token_by_token_is_the_block(policy):
    logits, cache = extended(policy)
    step = prefilled(policy)[1].reserve(64)
    for t in range(QUESTION.shape[1]):
        found, step = ask(policy, step, QUESTION[:, t : t + 1], VALID[:, t].astype(np.int32))
        # A block attends to its own tokens before they are rounded, single steps read them from the store.
        atol = 0.3 if stored(policy) else EXACT
        np.testing.assert_allclose(found[VALID[:, t], 0], logits[VALID[:, t], t], atol=atol)
    np.testing.assert_array_equal(step.seen, cache.seen)
    if not stored(policy):
        for row in range(ROWS):
            assert kept(step, row) == kept(cache, row)


# --- Slots -----------------------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_dropped(policy):
    """Inside `jit` nobody can add room: the slots that are there stay as they are, and nothing is clamped into them."""
    cache = prefilled(policy)[1]
    room = [None if layer.room is None else int(np.asarray(layer.room).max()) for layer in cache.layers]
    tight = np.tile(QUESTION, (1, 1 + max([r or 0 for r in room]) // QUESTION.shape[1]))
    _, after = extend_hidden(tiny.params(), CONFIG, policy, cache, tight, np.ones_like(tight, bool))
    for i, limit in enumerate(room):
        if limit is None or policy.acts_every_step:
            continue  # Old tokens make way there.
        before, now = tiny.read_back(cache.layers[i]), tiny.read_back(after.layers[i])
        held = before[0] != EMPTY
        for x, y in zip(before, now, strict=True):
            if hasattr(cache.layers[i], "residual"):
                # What leaves the residual is packed, so only positions are the same.
                x, y = np.sort(before[0][held]), np.sort(now[0][now[0] < cache.seen[:, None, None]])
                y = y[y != EMPTY]
                np.testing.assert_array_equal(x, y)
            else:
                np.testing.assert_array_equal(x[held], y[held])


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
        return jnp.where(mask, jnp.asarray(value, leaf.dtype), leaf)

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
    """The cache with the given axes of its leaves (name of a mesh axis -> axis of the leaf) over devices, where they divide."""

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


def test_sharded_over_batch_and_heads(policy):
    mesh = jax.make_mesh((4, 2), ("batch", "heads"), axis_types=(AxisType.Auto,) * 2)
    cache = spread(prefilled(policy)[1].reserve(64), mesh, batch=0, heads=1)
    assert len(cache.seen.sharding.device_set) == 8
    logits, after = kvjax.extend(spread_params(mesh), CONFIG, policy, cache, QUESTION, QUESTION_LENGTHS)
    assert_sharded_result(policy, logits, after)


def test_sharded_over_the_sequence(policy):
    mesh = jax.make_mesh((8,), ("slots",), axis_types=(AxisType.Auto,))
    cache = prefilled(policy)[1].reserve(64)
    slots = cache.layers[0].pos.shape[-1]
    cache = spread(cache, jax.make_mesh((math.gcd(8, slots),), ("slots",), axis_types=(AxisType.Auto,)), slots=2)
    logits, after = kvjax.extend(tiny.params(), CONFIG, policy, cache, QUESTION, QUESTION_LENGTHS)
    assert_sharded_result(policy, logits, after)


def assert_sharded_result(policy, logits, after):
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
