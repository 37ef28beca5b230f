"""What every method must satisfy (DESIGN.md), over the whole registry and over compositions.

A new method needs no line here: its typical parameters come from the registry, and so does what makes it small.
Whether it equals its paper is the oracles' business (`tests/methods`); whether it gains anything, the evaluation's.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax.cache import EMPTY, ByHead, Demoting, GearSlots, GroupedSlots, Pages, Slots, Through, Tokens
from kvjax.cache.low_rank import FarChunks
from kvjax.cache.paired import Paired
from kvjax.cache.reading import BoundedPages, Choosing, Following
from kvjax.cache.tiers import Tiers
from kvjax.cache.types import tree_nbytes
from kvjax.checkpoints.orbax import load_cache, save_cache
from kvjax.generation.extend import extend_hidden
from kvjax.generation.prefill import _compress_layer, next_logits
from kvjax.policies.store import Paged
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
        "cake(0.5, window=4) | think(0.5, whole=4, window=4)",
        "adakv(0.5, score=knorm) | kivi(bits=2, group=16, residual=16)",
        "minicache(start=0) | int4",
    )
}
NAMES = [*kvjax.methods(), *COMPOSITIONS]
# Of what is kept; some have a budget of what is read.
BUDGETED = [name for name, method in kvjax.methods().items() if "budget" in method.parameters and small(name).stages]
CHUNK = 4  # Of small policies that keep chunks.
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
    return kvjax.prefill_logits(tiny.trained(), CONFIG, policy, TOKENS, LENGTHS)


@functools.cache
def extended(policy: kvjax.Policy):
    """Logits [B, T, vocab] of a ragged question, and the cache after it."""
    return ask(policy, prefilled(policy)[1])


def ask(policy: kvjax.Policy, cache: kvjax.Cache, question=QUESTION, lengths=QUESTION_LENGTHS):
    cache = jax.device_put(cache, jax.devices()[0])  # As caches from the disk are: all share a compilation.
    logits, cache = kvjax.extend(tiny.trained(), CONFIG, policy, cache, question, lengths)
    return np.asarray(logits), cache


def allocated(layer) -> float:
    """Slots per head for the tokens that a policy keeps; of pages, those in the pool, which all heads share."""
    pooled = isinstance(layer, Pages)
    return layer.page_pos[0].size / CONFIG.num_kv_heads if pooled else layer.pos.shape[-1]


def stored(policy: kvjax.Policy) -> bool:
    """Whether tokens are rounded when they are stored."""
    return policy.store is not None


@pytest.fixture(params=NAMES, scope="module")
def policy(request) -> kvjax.Policy:
    return policy_of(request.param)


def test_the_typical_policies_compress(policy):
    """Or the tests below would compare the full cache with itself."""
    if policy.stages or policy.store or policy.transform:  # Others read less of all that is there.
        assert prefilled(policy)[1].nbytes < prefilled(kvjax.policy("full"))[1].nbytes


# --- 1. Identity -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BUDGETED)
def test_a_budget_of_everything_is_full_attention(name):
    policy, full = small(name, budget=EVERYTHING), kvjax.policy("full")
    logits, cache = prefilled(policy)
    np.testing.assert_allclose(logits, prefilled(full)[0], rtol=0, atol=EXACT if policy.in_chunks else 0)
    if policy.stages[-1].phase.when == "prompt":  # Then it is the full cache, and nothing more needs to be shown.
        for layer, want in zip(tiny.full_layers(cache), tiny.full_layers(prefilled(full)[1]), strict=True):
            assert_same_content(layer, want, atol=0)
        return
    np.testing.assert_allclose(extended(policy)[0][VALID], extended(full)[0][VALID], atol=EXACT)
    for row in range(ROWS):
        assert kept(extended(policy)[1], row) == kept(extended(full)[1], row)


@pytest.mark.parametrize(
    "name", [name for name in kvjax.methods() if stored(policy_of(name)) and not policy_of(name).stages]
)
def test_stored_tokens_read_back(name):
    """Every token is there, and its key and value are close: exactly how close is tested where codecs are."""
    fine = {"bits": 8, "rank": 32, "ratio": 0.0}  # The first of these that the method has.
    changes = next(({key: fine[key]} for key in fine if key in kvjax.methods()[name].parameters), {})
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
        """Slots in use of every layer and row, the most of its heads; their mean where heads share a layer's slots."""
        each = [np.asarray((cache.layers[i].pos != EMPTY).sum(-1)) for i in CONFIG.full_layers]
        return np.stack([x.mean(-1) if stage.ragged else x.max(-1) for x in each])

    cache = prefilled(policy)[1]
    found, layers = counts(cache), len(CONFIG.full_layers)
    assert (found.sum(0) <= np.floor(tokens * layers + 1e-3)).all()  # Over all layers that are compressed.
    assert (found >= np.minimum(stage.least, LENGTHS)).all()  # No layer below its floor.
    assert (found.sum(0) > 0.5 * tokens * layers).all()  # And a budget is there to be spent.
    for number, i in enumerate(CONFIG.full_layers):  # No slot that no row uses.
        assert allocated(cache.layers[i]) - found[number].max() < CHUNK
    if stage.phase.when == "step":  # What goes on acting stays within its budget.
        after = extended(policy)[1]
        assert (counts(after).sum(0) <= np.maximum(tokens, budget) * layers).all()
        for i in CONFIG.full_layers:
            before = cache.layers[i].pos.shape[-1]
            assert after.layers[i].pos.shape[-1] <= max(before, budget) + 1  # The newest, until one has left.


@pytest.mark.parametrize("name", BUDGETED)
def test_never_more_bytes_than_asked(name):
    full = kvjax.prefill(tiny.trained(), CONFIG, kvjax.policy("full"), TOKENS[:1])
    budget = kvjax.Budget(bytes=int(full.nbytes * 0.6))
    cache = kvjax.prefill(tiny.trained(), CONFIG, small(name, budget=budget), TOKENS[:1])
    slot = 2 * 2 * 16 * 4 + 4 * 3  # One more token in one layer: keys and values of two heads, and its bookkeeping.
    # Tokens that come or go together: a chunk, or a page that any head may fill.
    chunk = {"chunkkv": CHUNK, "adakv": Paged().page // CONFIG.num_kv_heads}.get(name, 1)
    tokens = cache.policy.stages[-1].budget.tokens
    assert tokens is not None
    # Capacities that depend on the data are rounded up, by an eighth at most; what that can cost is set aside.
    rounding = tokens // 8 + 1 if cache.policy.divided else 0
    spare = cache.reserve(1) if cache.policy.acts_every_step else cache  # The slot of the token that comes next counts.
    assert budget.bytes - len(CONFIG.full_layers) * (slot * (chunk + rounding) + 8) < spare.nbytes <= budget.bytes
    assert sum(allocated(cache.layers[i]) for i in CONFIG.full_layers) <= (tokens + rounding) * len(CONFIG.full_layers)


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
    full = prefilled(kvjax.policy("full"))[1].layers[1]
    if policy.in_chunks:  # What comes in differs, because layers before have forgotten; but not where none has.
        stage = dataclasses.replace(policy.stages[-1], budget=kvjax.Budget(tokens=EVERYTHING))  # type: ignore
        policy = dataclasses.replace(policy, stages=(stage,))
        assert_same_content(prefilled(policy)[1].layers[1], full, atol=EXACT)
        return
    assert_trees_equal(prefilled(policy)[1].layers[1], full)


# --- 4. Purity -------------------------------------------------------------------------------------------------------


def test_fused_prefill_is_observe_then_compress(policy):
    observed = kvjax.observe(tiny.trained(), CONFIG, TOKENS, LENGTHS, needs=policy.needs)
    plan = kvjax.plan(policy, CONFIG, LENGTHS, jnp.float32)
    logits, cache = prefilled(policy)
    if policy.in_chunks:
        with pytest.raises(kvjax.PolicyError, match="while the prompt is fed"):
            kvjax.compress(plan, observed)
        return
    assert_trees_equal(kvjax.compress(plan, observed), cache)
    np.testing.assert_array_equal(next_logits(tiny.trained(), observed), logits)


@pytest.mark.parametrize(
    "name", ["full", "h2o", "streaming_llm", "snapkv | kivi"]
)  # One of each layout: it takes long.
def test_jit_changes_nothing(name):
    policy = policy_of(name)

    def run(tokens, lengths):
        return kvjax.prefill(tiny.trained(), CONFIG, policy, tokens, lengths)

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
    ask(policy, kvjax.prefill(tiny.trained(), CONFIG, policy, TOKENS, LENGTHS))  # What was compiled may be forgotten.
    sizes = [f._cache_size() for f in (_compress_layer, extend_hidden)]
    _, twice = kvjax.prefill_logits(tiny.trained(), CONFIG, again, TOKENS, LENGTHS)
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
    cache = kvjax.prefill(tiny.trained(), CONFIG, policy, tokens, LENGTHS[order])
    question = QUESTION[order].copy()
    question[~VALID[order]] = 127
    logits, _ = ask(policy, cache, question, QUESTION_LENGTHS[order])
    for row in (0, 2, 3):
        assert_row(policy, cache, logits, row, order[row])


def test_a_row_alone_without_padding(policy):
    row = 1
    tokens = TOKENS[row : row + 1, : LENGTHS[row]]
    logits, cache = kvjax.prefill_logits(tiny.trained(), CONFIG, policy, tokens)
    want_logits, want = prefilled(policy)
    assert kept(cache, 0) == kept(want, row)
    np.testing.assert_allclose(logits[0], want_logits[row], atol=EXACT)
    for layer, other in zip(tiny.full_layers(cache), tiny.full_layers(want), strict=True):
        assert_same_content(layer, other, ONE_CODE if stored(policy) else EXACT, rows=[(0, row)])


def test_chunks_of_a_prompt():
    """Where nothing is forgotten, a prompt may come in pieces."""
    full = kvjax.policy("full")
    head = np.minimum(LENGTHS, 45)
    cache = kvjax.prefill(tiny.trained(), CONFIG, full, TOKENS[:, :45], head)
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
    if policy.transform is not None:
        pytest.skip("Several layers take a token together.")
    if layer.room is None or (policy.stages and policy.stages[-1].phase.when == "step"):
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
    if not isinstance(layer, GroupedSlots | Pages):  # (There, tokens move on from where they came in.)
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
    """Floats of a layout [B, H, S, ...], or with several entries for each of the S, where empty [B, 1 or H, S]."""

    def one(leaf):
        if not jnp.issubdtype(leaf.dtype, jnp.floating) or not leaf.size:
            return leaf
        mask = np.repeat(empty, leaf.shape[2] // empty.shape[2], 2)
        mask = mask.reshape(mask.shape + (1,) * (leaf.ndim - 3))
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
    group = np.arange(layer.k.scale.shape[2]) * layer.group
    k = fill(layer.k, group >= count - count % residual, np.nan)
    v = fill(layer.v, np.arange(layer.v.scale.shape[2]) >= count - residual, LARGE)
    k_recent = fill(layer.k_recent, slot >= count % residual, np.nan)
    v_recent = fill(layer.v_recent, slot >= count, LARGE)
    return dataclasses.replace(layer, k=k, v=v, k_recent=k_recent, v_recent=v_recent)


def poison_tiers(layer: Tiers) -> Tiers:
    return dataclasses.replace(layer, tiers=tuple(POISON[type(tier)](tier) for tier in layer.tiers))


def poison_far(layer: FarChunks) -> FarChunks:
    empty = layer.chunks == EMPTY
    return dataclasses.replace(layer, landmarks=fill(layer.landmarks, empty, np.nan), v=fill(layer.v, empty, LARGE))


def poison_through(layer: Through) -> Through:
    return dataclasses.replace(layer, inner=POISON[type(layer.inner)](layer.inner))


def poison_bounds(layer: BoundedPages) -> BoundedPages:
    page = np.arange(layer.low.shape[2]) * layer.page >= np.asarray(layer.inner.count)[..., None]
    low, high = fill(layer.low, page, np.nan), fill(layer.high, page, np.nan)
    return dataclasses.replace(poison_through(layer), low=low, high=high)


def poison_pair(layer: Paired) -> Paired:
    empty = layer.pos == EMPTY

    def own(half, number):
        norm, new = fill(half.norm, empty, number), fill(half.new, layer.new_pos == EMPTY, number)
        return dataclasses.replace(half, norm=norm, new=new)

    k, v, store = own(layer.k, np.nan), own(layer.v, LARGE), layer.store
    if store is not None:  # The lower layer, which knows the slots of what both retain.
        k = dataclasses.replace(k, kept=fill(k.kept, store.k_slot == EMPTY, np.nan))
        v = dataclasses.replace(v, kept=fill(v.kept, store.v_slot == EMPTY, LARGE))
        store = dataclasses.replace(store, k=fill(store.k, empty, np.nan), v=fill(store.v, empty, LARGE))
    return dataclasses.replace(layer, k=k, v=v, store=store)


def poison_demoting(layer: Demoting) -> Demoting:
    return Demoting(low=poison_through(layer.low), high=poison_slots(layer.high))


def poison_gear(layer: GearSlots) -> GearSlots:
    (k_first, k_later), (v_first, v_later) = layer.k, layer.v
    block = np.arange(layer.blocks) >= np.asarray(layer.used)[:, None, None]
    padding = np.asarray(layer.pos[:, None, :1, : layer.first] == EMPTY)
    buffer = layer.pos[..., -layer.recipe.buffer :] == EMPTY
    k_first = dataclasses.replace(k_first, left=jnp.where(padding[..., None], jnp.nan, k_first.left))
    v_first = dataclasses.replace(v_first, left=jnp.where(padding[..., None], LARGE, v_first.left))
    return dataclasses.replace(
        layer,
        k=(k_first, fill(k_later, block, np.nan)),
        v=(v_first, fill(v_later, block, LARGE)),
        k_buffer=fill(layer.k_buffer, buffer, np.nan),
        v_buffer=fill(layer.v_buffer, buffer, LARGE),
    )


def poison_pages(layer: Pages) -> Pages:
    free, tail = (layer.owner == EMPTY)[..., None], layer.tail_pos == EMPTY
    return dataclasses.replace(
        layer,
        k=fill(layer.k, free, np.nan),
        v=fill(layer.v, free, LARGE),
        k_tail=fill(layer.k_tail, tail, np.nan),
        v_tail=fill(layer.v_tail, tail, LARGE),
    )


def poison_heads(layer: ByHead) -> ByHead:
    return dataclasses.replace(layer, groups=tuple(POISON[type(group)](group) for group in layer.groups))


# A new layout adds its own line: what of it may hold anything while it holds nothing?
POISON = {
    BoundedPages: poison_bounds,
    Choosing: poison_through,
    Following: poison_through,
    Paired: poison_pair,
    Slots: poison_slots,
    GroupedSlots: poison_groups,
    Tiers: poison_tiers,
    FarChunks: poison_far,
    Through: poison_through,
    Demoting: poison_demoting,
    GearSlots: poison_gear,
    Pages: poison_pages,
    ByHead: poison_heads,
}
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


# --- 6. Sharded: tests/sharding -------------------------------------------------------------------------------------


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
