"""ShadowKV against its oracle, the authors' recorded output, and what makes it this method."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax.cache import EMPTY, Tiers
from kvjax.cache.host import HOST, on_host
from kvjax.cache.low_rank import FarChunks, far_and_near
from kvjax.models.config import Rope
from tests import tiny
from tests.methods.layer import compress, kept, spec, step, tokens
from tests.oracles import shadowkv
from tests.oracles.attention import rope
from tests.oracles.test_golden import golden, reading_inputs

DIM = 16
SETTING = {"rank": 8, "chunk": 4, "local": 1, "outliers": 2}
STOPS = [47, 33, 21, 6]


def draw(rng, length: int, heads: int = 4, kv_heads: int = 2):
    """q, k (both rotated), v, and k before rotation."""
    q, k_raw, v = (rng.normal(size=(n, length, DIM)) for n in (heads, kv_heads, kv_heads))
    return rope(q, np.arange(length)), rope(k_raw, np.arange(length)), v, k_raw


def prompts(rows, stops=STOPS, policy=None):
    new = tokens([row[:3] for row in rows], 0, stops, k_raw=[row[3] for row in rows])
    return compress(policy or kvjax.policy("shadowkv", 12, **SETTING), spec(DIM), new)


@pytest.mark.parametrize("heads, kv_heads", [(4, 2), (2, 2), (4, 1)])
def test_against_the_oracle(rng, heads, kv_heads):
    """A ragged batch, token by token and as one block; the shortest row has no chunk to choose from."""
    rows = [draw(rng, 60, heads, kv_heads) for _ in STOPS]
    policy = kvjax.policy("shadowkv", 12, **SETTING)
    cache = prompts(rows).reserve(5)
    want = [
        shadowkv.shadowkv_decode(
            q[:, : stop + 5], k_raw[:, : stop + 5], v[:, : stop + 5], prompt=stop, number=3, **SETTING
        )
        for (q, _, v, k_raw), stop in zip(rows, STOPS, strict=True)
    ]
    steps = [
        tuple(
            np.stack([x[i][:, stop + t : stop + t + 1] for x, stop in zip(rows, STOPS, strict=True)]) for i in range(3)
        )
        for t in range(5)
    ]
    after = cache
    for t, (q, k, v) in enumerate(steps):
        new = tokens(list(zip(q, k, v, strict=True)), 0, 1)
        new = dataclasses.replace(new, pos=jnp.asarray(STOPS, jnp.int32)[:, None] + t)
        out, after = step(policy, spec(DIM), after, new)
        for row, (outputs, _) in enumerate(want):
            np.testing.assert_allclose(out[row, :, 0], outputs[:, t], atol=2e-5)
    block = tokens([tuple(np.concatenate([s[i][row] for s in steps], 1) for i in range(3)) for row in range(4)], 0, 5)
    block = dataclasses.replace(block, pos=jnp.asarray(STOPS, jnp.int32)[:, None] + jnp.arange(5))
    out, _ = step(policy, spec(DIM), cache, block)
    for row, (outputs, _) in enumerate(want):
        np.testing.assert_allclose(out[row], outputs, atol=2e-5)


def test_what_is_held_and_how(rng):
    rows = [draw(rng, 47) for _ in STOPS]
    far, near = prompts(rows).tiers
    for row, stop in enumerate(STOPS):
        _, k, v, k_raw = (x[:, :stop] for x in rows[row])
        want = shadowkv.cut(k, chunk=4, local=1, outliers=2)
        for head in range(2):
            chunks = np.asarray(far.chunks[row, head])
            np.testing.assert_array_equal(chunks[chunks != EMPTY], want.ids[head])
            number = len(want.ids[head])
            np.testing.assert_allclose(far.landmarks[row, head, :number], want.landmarks[head], atol=1e-6)
            np.testing.assert_array_equal(
                far.v[row, head, :number].reshape(-1, DIM),
                v[head][shadowkv.positions_of(want.ids[head][None], 4)[0]].astype(np.float32),
            )
        tokens_far = shadowkv.positions_of(want.ids, 4)
        near_kept = kept(near, row)
        for head in range(2):
            assert sorted([*tokens_far[head], *near_kept[head]]) == list(range(stop))
        if want.number:
            u, sv = shadowkv.low_rank_keys(k_raw, 8)
            pos, found, _ = (np.asarray(x[row]) for x in far.held(spec(DIM)))
            for head in range(2):
                rebuilt = rope((u @ sv[head])[tokens_far[head]], tokens_far[head])
                np.testing.assert_allclose(found[head][pos[head] != EMPTY], rebuilt, atol=2e-5)


def test_the_authors_record():
    """Chunks, landmarks, low-rank keys and the buffers that their step attends to, with their 1 / sqrt(128)."""
    data = golden("quantization_reading/shadowkv")
    q, k_raw, v = reading_inputs()
    query = rope(q[:, 250:251], np.array([252]))
    k_raw, v = k_raw[:, :252], v[:, :252]
    k = rope(k_raw, np.arange(252))
    policy = kvjax.policy("shadowkv", 48, rank=32, local=2, outliers=4, landmark_scale=128**-0.5)
    layer_spec = spec(64)
    row = (np.concatenate([rope(q[:, :252], np.arange(252)), query], 1), k, v)
    far, near = compress(policy, layer_spec, tokens([row], 0, 252, k_raw=[k_raw])).tiers
    np.testing.assert_array_equal(far.chunks[0], data["landmark_chunk_idx"][0])
    scale = np.abs(data["landmarks"]).max()
    np.testing.assert_allclose(far.landmarks, data["landmarks"], atol=1e-5 * scale)

    rebuilt = np.einsum("sr,rd->sd", far.u[0], far.basis[0, 0])
    want = data["lowrank_key_h0"][0, 0]
    np.testing.assert_allclose(rebuilt, want[: len(rebuilt)], atol=1e-4 * np.abs(want).max())

    new = tokens([row[:1] + tuple(np.zeros((4, 253, 64)) for _ in range(2))], 252, 253)
    index, counts = far.choose(new, layer_spec)
    assert counts.all()
    chosen = np.take_along_axis(np.asarray(far.chunks[0]), np.asarray(index[0, :, 0]), -1)
    np.testing.assert_array_equal(chosen, data["selected_chunks"][0])

    local, start, end = data["buffer_layout"]
    keys, values = data["key_buffer_h0"][0, 0], data["value_buffer_h0"][0, 0]
    pos, k_far, v_far = (np.asarray(x[0, 0]) for x in far.held(layer_spec))
    at = {int(p): i for i, p in enumerate(pos)}
    sparse = [at[int(p)] for p in data["position_ids"][0, 0]]
    np.testing.assert_allclose(k_far[sparse], keys[start:end], atol=1e-4 * np.abs(keys).max())
    np.testing.assert_allclose(v_far[sparse], values[start:end], rtol=1e-6)
    mine = {int(p): i for i, p in enumerate(near.pos[0, 0])}
    exact = [mine[p] for p in range(252 - local, 252)]
    np.testing.assert_allclose(near.k[0, 0][jnp.asarray(exact)], keys[:local], atol=1e-5 * np.abs(keys).max())
    outliers = np.flatnonzero(data["outlier_chunk_mask"][0, 0])
    assert set(shadowkv.positions_of(outliers[None], 8)[0]) == set(mine) - set(range(252 - local, 252)) - {EMPTY}


def test_at_full_rank_reading_everything_is_full_attention():
    shadow, full = tiny.small("shadowkv", sparse=1.0, rank=32), kvjax.policy("full")
    found, want = (
        kvjax.extend(
            tiny.params(),
            tiny.CONFIG,
            policy,
            kvjax.prefill(tiny.params(), tiny.CONFIG, policy, tiny.TOKENS, tiny.LENGTHS),
            tiny.QUESTION,
        )[0]
        for policy in (shadow, full)
    )
    np.testing.assert_allclose(found, want, atol=1e-4)


def test_a_step_rebuilds_and_fetches_only_what_it_reads(rng):
    """Poison all chunks that the oracle's query does not choose: nobody notices."""
    row = draw(rng, 60)
    cache = prompts([row], [47]).reserve(1)
    far, near = cache.tiers
    _, read = shadowkv.shadowkv_decode(row[0][:, :48], row[3][:, :48], row[2][:, :48], prompt=47, number=3, **SETTING)
    unread = np.stack([~np.isin(np.asarray(far.chunks[0, h]), read[0][h]) for h in range(2)])
    v = jnp.where(unread[None, :, :, None, None], jnp.nan, far.v)
    new = tokens([row[:3]], 47, 48)
    want, _ = step(kvjax.policy("shadowkv", 12, **SETTING), spec(DIM), cache, new)
    poisoned = dataclasses.replace(cache, tiers=(dataclasses.replace(far, v=v), near))
    found, _ = step(kvjax.policy("shadowkv", 12, **SETTING), spec(DIM), poisoned, new)
    np.testing.assert_array_equal(found, want)
    assert unread.sum() == 2 * (far.chunks.shape[-1] - 3)


def test_values_in_the_hosts_memory_give_the_same_bits(rng):
    """Gathered by the host, or moved whole where it cannot compute."""
    row = draw(rng, 60)
    new, want = tokens([row[:3]], 47, 48), None
    for host_gather in (True, False):
        policy = kvjax.policy("shadowkv", 12, **SETTING, host_gather=host_gather)
        far, near = prompts([row], [47], policy).reserve(1).tiers
        for v in (far.v, jax.device_put(far.v, HOST)):
            found, _ = step(policy, spec(DIM), Tiers(tiers=(dataclasses.replace(far, v=v), near)), new)
            want = found if want is None else want
            np.testing.assert_array_equal(found, want)
            assert not on_host(found)


def test_memory_of_the_device_is_a_small_part(rng):
    """With the paper's setting, scaled by eight: rank and landmarks instead of keys, and no values but exact ones."""
    k = jnp.asarray(rng.normal(size=(1, 4, 2048, 32)), jnp.bfloat16)
    pos = jnp.arange(2048, dtype=jnp.int32)[None, None]
    one = jnp.ones(1, jnp.int32)
    cache = jax.eval_shape(
        lambda k: far_and_near(
            k, k, k, pos, rank=20, size=8, local=4, outliers=6, reads=one * 32, most=32, length=one * 2048
        ),
        k,
    )
    total = kvjax.cache.tree_nbytes(cache)
    device = total - kvjax.cache.tree_nbytes(cache.tiers[0].v)
    assert device < 0.25 * 2 * k.nbytes and total < 0.75 * 2 * k.nbytes


def test_a_ratio_is_of_each_prompt(rng):
    far, _ = prompts([draw(rng, 47) for _ in STOPS], policy=kvjax.policy("shadowkv", 0.25, **SETTING)).tiers
    assert far.reads.tolist() == [2, 2, 1, 1] and far.most == 2


def test_a_short_prompt_is_kept_exactly(rng):
    layer = prompts([draw(rng, 15)], [15], kvjax.policy("shadowkv", 12, **SETTING))
    assert not isinstance(layer, FarChunks) and kept(layer, 0).tolist() == [list(range(15))] * 2


def test_after_an_eviction(rng):
    """Chunks are of tokens that are left; each has its own position."""
    rows = [draw(rng, 47), draw(rng, 47)]
    policy = kvjax.parse_policy("snapkv(0.7, window=4) | shadowkv(12, rank=32, chunk=4, local=1, outliers=2)")
    cache = prompts(rows, [47, 38], policy)
    plain = prompts(rows, [47, 38], kvjax.parse_policy("snapkv(0.7, window=4)"))
    for row in range(2):
        pos, k, v = (np.asarray(x[row]) for x in cache.held(spec(DIM)))
        for head in range(2):
            want = kept(plain, row)[head]
            there = pos[head] != EMPTY
            order = np.argsort(pos[head][there])
            np.testing.assert_array_equal(pos[head][there][order], want)
            np.testing.assert_allclose(k[head][there][order], rows[row][1][head][want], atol=2e-5)
            np.testing.assert_allclose(v[head][there][order], rows[row][2][head][want], atol=1e-6)


def test_longrope_keys_are_rotated_as_the_prompt_was(rng):
    """Its frequencies depend on the length of the row, and a chunk alone would look short."""
    long = Rope(
        theta=1e4,
        rotary_dim=DIM,
        scaling="longrope",
        original_length=32,
        short_factor=(1.0,) * 8,
        long_factor=tuple(np.linspace(1, 4, 8).tolist()),
    )
    layer_spec = dataclasses.replace(spec(DIM), rope=long)
    k_raw = jnp.asarray(rng.normal(size=(1, 2, 47, DIM)), jnp.float32)
    pos = jnp.arange(47, dtype=jnp.int32)[None]
    k = layer_spec.rotate(long, k_raw, pos)
    one = jnp.ones(1, jnp.int32)
    cache = far_and_near(
        k, k, k_raw, pos[:, None], rank=32, size=4, local=1, outliers=2, reads=one * 3, most=3, length=one * 47
    )
    held_pos, held, _ = cache.tiers[0].held(layer_spec)
    np.testing.assert_allclose(held, jnp.take_along_axis(k, held_pos[..., None], 2), atol=2e-5)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"sparse": 4}, "sparse=4 is less than a chunk of 8"),
        ({"sparse": "1MB"}, "what a step reads, in tokens or as a ratio"),
        ({"rank": 0}, "rank must be at least 1, got 0"),
        ({"chunk": 0}, "chunk must be at least 1"),
        ({"local": -1}, "local must be at least 0"),
        ({"outliers": -1}, "outliers must be at least 0"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        kvjax.policy("shadowkv", **arguments)


def test_it_does_not_go_with_another_store_or_with_eviction_while_decoding():
    with pytest.raises(kvjax.PolicyError, match="stored once"):
        kvjax.parse_policy("shadowkv | int8")
    with pytest.raises(kvjax.PolicyError, match="evicts while decoding"):
        kvjax.parse_policy("h2o(0.5) | shadowkv")
