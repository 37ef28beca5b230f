"""GEAR against its oracle and against what the authors' code gave."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax.cache import EMPTY, GearRecipe, make_gear, tree_nbytes
from kvjax.cache.gear import compress_block as compress_block_eagerly
from tests.methods.layer import KV_HEADS, compress, kept, spec
from tests.methods.test_against_oracles import DIM, LENGTHS, STEPS, TOLERANCE, decode, prompt, rotated
from tests.oracles import gear, snapkv
from tests.oracles.attention import gather
from tests.oracles.test_golden import golden, reading_inputs

compress_block = jax.jit(compress_block_eagerly, static_argnames=("recipe", "keys"))

# Short rows, small heads: enough outliers need a larger share. The last row has no block before the tenth step.
TEXT = "gear({bits}, group={group}, sparsity=0.13, ranks=(3, 2), buffer=16, scale_dtype='float32')"


@functools.cache
def decoded(bits: int, group: int):
    policy = kvjax.parse_policy(TEXT.format(bits=bits, group=group))
    return policy, *decode(policy, compress(policy, spec(DIM), prompt(rotated())), rotated())


def options(policy, bits: int, group: int) -> dict:
    recipe = policy.store.recipe
    starts, later = (
        tuple(np.asarray(x, np.float64) for x in recipe.starts(KV_HEADS, (DIM, DIM), rank)) for rank in recipe.ranks
    )
    return {"buffer": 16, "bits": bits, "group": group, "sparsity": 0.13, "starts": starts, "later": later}


@pytest.mark.parametrize("bits, group", [(2, 8), (4, 16), (4, 0)])
def test_oracle(bits, group):
    """Ragged rows, grouped queries: the prompt's block, those that come while decoding, and the buffer."""
    policy, outputs, caches = decoded(bits, group)
    for row, length in enumerate(LENGTHS):
        q, k, v = rotated()[row]
        want = gear.gear_decode(q, k, v, prompt=length, **options(policy, bits, group))
        np.testing.assert_allclose(outputs[row], want, atol=5 * TOLERANCE)
        pos, *found = (np.asarray(x[row]) for x in caches[-1].held(spec(DIM)))
        order = np.argsort(np.where(pos[0] == EMPTY, 10**6, pos[0]))[: length + STEPS]
        np.testing.assert_array_equal(pos[:, order], np.tile(np.arange(length + STEPS), (KV_HEADS, 1)))
        wanted = gear.gear_cache(k, v, prompt=length, **options(policy, bits, group))
        for x, y in zip(found, wanted, strict=True):
            np.testing.assert_allclose(x[:, order], y, atol=5 * TOLERANCE)


def test_after_an_eviction():
    """Heads keep different tokens: a block is of those that are left, in their order."""
    policy = kvjax.parse_policy("snapkv(20, window=6, pool=3) | " + TEXT.format(bits=4, group=8))
    cache = compress(policy, spec(DIM), prompt(rotated()))
    _, caches = decode(policy, cache, rotated())
    for row, n in enumerate(LENGTHS):
        q, k, v = rotated()[row]
        some = snapkv.snapkv_kept(snapkv.snapkv_scores(q[:, :n], k[:, :n], window=6, width=3), window=6, budget=20)
        np.testing.assert_array_equal(kept(cache, row), some)
        some = np.concatenate([some, np.tile(np.arange(n, n + STEPS), (KV_HEADS, 1))], 1)
        keys, values = gather(k, some), gather(v, some)
        wanted = gear.gear_cache(keys, values, prompt=min(n, 20), **options(policy, 4, 8))
        pos, *found = (np.asarray(x[row]) for x in caches[-1].held(spec(DIM)))
        order = np.argsort(np.where(pos == EMPTY, 10**6, pos), -1)[:, : some.shape[1]]
        np.testing.assert_array_equal(np.take_along_axis(pos, order, 1), some)
        for x, y in zip(found, wanted, strict=True):
            np.testing.assert_allclose(np.take_along_axis(x, order[..., None], 1), y, atol=5 * TOLERANCE)


def test_blocks_are_compressed_once():
    """What has become a block stays as it is, to the bit; only rows whose buffer is full change."""
    _, _, caches = decoded(2, 8)
    before, after = caches[-2], caches[-1]
    for old, new in zip(before.k, after.k, strict=True):
        same = np.asarray(before.used)
        for row, blocks in enumerate(same):
            slots = blocks * old.left.shape[3]
            np.testing.assert_array_equal(old.packed.codes[row, :, :slots], new.packed.codes[row, :, :slots])
            np.testing.assert_array_equal(old.left[row, :, :blocks], new.left[row, :, :blocks])


@pytest.mark.parametrize("name", ["gear", "gearL"])
@pytest.mark.parametrize("side", ["key", "value"])
def test_authors(side, name):
    """From their start of the power iteration. One number in a thousand lies between two codes and may go either way:
    it changes its own entry by a step, and others through the low-rank matrix by a little."""
    data = golden("quantization_reading/gear")
    _, k, v = reading_inputs()
    x = k if side == "key" else v
    recipe = GearRecipe(bits=2, group=32, sparsity=0.02 if name == "gear" else 0.0, ranks=(2, 2), dtype="float32")
    start = jnp.asarray(data[f"{name}_{side}_p_init"][0])
    block = compress_block(
        jnp.asarray(x, jnp.float32)[None], jnp.ones((1, 256), bool), recipe=recipe, start=start, keys=side == "key"
    )
    found, want = np.asarray(block.read_back()[0]), data[f"{name}_{side}"][0, 0]
    far = np.abs(found[0, : len(want)] - want) > 1e-3 * np.abs(want).max()
    assert far.mean() < 5e-3
    errors = np.linalg.norm(found - x, axis=-1)
    assert np.linalg.norm(errors) == pytest.approx(np.linalg.norm(data[f"{name}_{side}_err_norm"]), rel=1e-3)


@pytest.mark.parametrize("side", ["key", "value"])
def test_authors_one_group(side):
    data = golden("quantization_reading/gear")
    _, k, v = reading_inputs()
    x = jnp.asarray(k if side == "key" else v, jnp.float32)[None]
    recipe = GearRecipe(group=0, sparsity=0.0, ranks=(0, 0), dtype="float32")
    block = compress_block(x, jnp.ones((1, 256), bool), recipe=recipe, start=jnp.zeros((4, 64, 0)), keys=side == "key")
    errors = np.linalg.norm(block.read_back() - x, axis=-1)
    np.testing.assert_allclose(errors, data[f"kcvt_{side}_err_norm"], rtol=1e-3, atol=1e-5)


def test_every_part_repairs_something():
    """On the recorded inputs, with outliers in a few channels and tokens: KIVI's error, less with S, less with L."""
    _, k, v = reading_inputs()
    held = jnp.ones((1, 256), bool)
    for x, keys in ((k, True), (v, False)):
        x = jnp.asarray(x, jnp.float32)[None]
        errors = []
        for sparsity, rank in ((0.0, 0), (0.02, 0), (0.0, 4), (0.02, 4)):
            recipe = GearRecipe(bits=2, group=32, sparsity=sparsity, ranks=(rank, rank))
            start = recipe.starts(4, (64, 64), rank)[0]
            errors.append(
                float(jnp.linalg.norm(compress_block(x, held, recipe=recipe, start=start, keys=keys).read_back() - x))
            )
        backbone, sparse, low_rank, both = errors
        assert backbone > sparse > both and backbone > low_rank > both


@pytest.mark.parametrize("group", [8, 0])
def test_padding_changes_nothing(group):
    """Groups, outliers, means and factors are of a row's own tokens."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(5 + rng.normal(size=(1, 2, 16, 16)), jnp.float32)  # Far from the zeros of an empty slot.
    padded = jnp.concatenate([x, jnp.full((1, 2, 32, 16), 1e4, jnp.float32)], 2)
    recipe = GearRecipe(group=group, sparsity=0.3, ranks=(2, 2), buffer=16, dtype="float32")
    start = recipe.starts(2, (16, 16), 2)[0]
    for keys in (True, False):
        alone = compress_block(x, jnp.ones((1, 16), bool), recipe=recipe, start=start, keys=keys).read_back()
        beside = compress_block(padded, jnp.arange(48)[None] < 16, recipe=recipe, start=start, keys=keys).read_back()[
            :, :, :16
        ]
        np.testing.assert_allclose(beside, alone, atol=1e-5)


def test_bytes_are_few():
    """Two bits, and what repairs them: a prompt of 1,024 tokens in less than a quarter of its bytes in 16 bits."""
    x, pos = jax.ShapeDtypeStruct((1, 2, 1024, 128), jnp.bfloat16), jax.ShapeDtypeStruct((1, 1, 1024), jnp.int32)
    layer = jax.eval_shape(functools.partial(make_gear, recipe=GearRecipe()), x, x, pos)
    buffers = 2 * layer.k_buffer.size * 2
    assert layer.blocks == 0 and tree_nbytes(layer) - buffers < 0.25 * 2 * 2 * x.size


@pytest.mark.parametrize(
    "text, message",
    [
        ("gear(3)", "bits must be 2, 4 or 8"),
        ("gear(2, buffer=40)", "must be a multiple of group=64"),
        ("gear(2, group=0, buffer=24)", "16 codes in a word"),
        ("gear(2, sparsity=2)", "sparsity is a share"),
        ("gear(2, ranks=(65, 2))", "from 0 to the 64 tokens"),
        ("gear(2, loops=0)", "at least one loop"),
        ("h2o(0.5) | gear(2)", "evicts while decoding"),
    ],
)
def test_bad_input(text, message):
    with pytest.raises(kvjax.PolicyError, match=message):
        kvjax.parse_policy(text)
