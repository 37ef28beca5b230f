"""Every policy on eight devices, its cache over heads, over the sequence and over both, is the one on one device."""

import dataclasses

import jax
import numpy as np
import pytest

import kvjax
from kvjax.cache.spread import cache_specs
from kvjax.sharding import cache_shardings, make_mesh, shard_batch, shard_cache, shard_params
from tests import tiny
from tests.contract.test_contract import EXACT, NAMES, ONE_CODE, ROWS, VALID, extended, policy_of, prefilled, stored
from tests.tiny import CONFIG, LENGTHS, QUESTION, QUESTION_LENGTHS, TOKENS, kept

MESHES = {
    "heads": "data=4,model=2",
    "sequence": "seq=8",
    "both": "seq=2,model=4",  # More devices than KV heads: slots lie along "model" too.
}


@pytest.mark.parametrize("where", MESHES)
@pytest.mark.parametrize("name", NAMES)
def test_sharded(name, where):
    """A prompt is attended, compressed and extended on the mesh: the same tokens stay, the same logits follow."""
    policy = policy_of(name)
    want_cache, (want, want_after) = prefilled(policy)[1], extended(policy)
    mesh = make_mesh(MESHES[where])
    with jax.set_mesh(mesh):
        params = shard_params(tiny.trained(), CONFIG, mesh)
        cache = kvjax.prefill(params, CONFIG, policy, shard_batch(TOKENS, mesh), LENGTHS)
        logits, after = kvjax.extend(params, CONFIG, policy, cache, QUESTION, QUESTION_LENGTHS)
    for row in range(ROWS):
        assert kept(cache, row) == kept(want_cache, row)
        assert kept(after, row) == kept(want_after, row)
    apart = np.abs(np.asarray(logits) - want)[VALID]
    if stored(policy):  # A number between two codes may fall to either side, and its row's next tokens hear of it.
        assert np.median(apart) < 50 * EXACT and apart.max() < ONE_CODE / 10
    else:
        assert apart.max() < EXACT
    # Where arrays lie is what the table says, before and after tokens were added.
    for made in (cache, after):
        said = jax.tree.leaves(cache_shardings(made, mesh))
        for leaf, sharding in zip(jax.tree.leaves(made.layers), said, strict=False):
            assert not leaf.size or leaf.sharding.is_equivalent_to(sharding, leaf.ndim), (leaf.sharding, sharding)


@pytest.mark.parametrize("where", MESHES)
def test_every_device_holds_its_share(where):
    cache = prefilled(policy_of("full"))[1]
    mesh = make_mesh(MESHES[where])
    spread = shard_cache(cache, mesh)
    first = jax.devices()[0]
    mine = sum(s.data.nbytes for x in jax.tree.leaves(spread) for s in x.addressable_shards if s.device == first)
    assert mine <= 1.03 * spread.nbytes / 8 and spread.nbytes == cache.nbytes


def test_a_cache_that_does_not_divide_gets_empty_slots():
    cache = prefilled(policy_of("snapkv"))[1].reserve(5)
    mesh = make_mesh("seq=8")
    spread = shard_cache(cache, mesh)
    assert all(layer.capacity % 8 == 0 for layer in spread.layers)
    for row in range(ROWS):
        assert kept(spread, row) == kept(cache, row)


def test_the_table_names_what_there_is():
    """A field of a layout that the table forgets is told by its name."""

    class Unknown:
        pass

    cache = prefilled(policy_of("full"))[1]
    odd = dataclasses.replace(cache, layers=(dataclasses.make_dataclass("Odd", ["secret"])(Unknown()),))
    with pytest.raises(TypeError, match=r"Odd holds a Unknown .* CACHE_AXES"):
        cache_specs(odd, {"seq": 8})
