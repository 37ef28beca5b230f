"""Meshes by name, and what does not go together is said before anything is placed."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax.generation.extend import extend_hidden
from kvjax.sharding import MeshError, make_mesh, param_shardings, parse_mesh, shard_batch, shard_cache, shard_params
from tests import tiny


def test_a_mesh_is_written_by_its_axes():
    assert parse_mesh("seq=4, model=2") == {"data": 1, "seq": 4, "model": 2}
    assert make_mesh("seq=4,model=2").shape == {"data": 1, "seq": 4, "model": 2}


@pytest.mark.parametrize(
    "text, said",
    [
        ("heads=2", "has the axes data, seq, model; 'heads'"),
        ("seq=0", "every axis once and positive"),
        ("seq=2,seq=4", "every axis once"),
        ("seq=3", "takes 3 devices, and there are 8"),
    ],
)
def test_what_is_wrong_with_a_mesh(text, said):
    with pytest.raises(MeshError, match=said):
        make_mesh(text)


def test_heads_that_do_not_divide():
    mesh = make_mesh("model=8")  # Of four query heads.
    with pytest.raises(MeshError, match=r"4 query heads do not divide over model=8\. Sizes .*: 1, 2, 4\."):
        param_shardings(tiny.params(), tiny.CONFIG, mesh)


def test_rows_that_do_not_divide():
    with pytest.raises(MeshError, match="3 rows does not divide over data=8"):
        shard_batch(np.zeros((3, 5)), make_mesh("data=8"))


def collectives(text: str) -> list[int]:
    """Numbers of elements of the largest result of every collective in optimized HLO."""
    kinds = "all-gather|all-reduce|collective-permute|all-to-all|reduce-scatter"
    found = re.findall(rf"= (\(?[^=\n]*?) (?:{kinds})(?:-start)?\(", text)
    sizes = [re.findall(r"\[([\d,]*)\]", shapes) for shapes in found]
    return [max(int(np.prod([int(n) for n in size.split(",") if n] or [1])) for size in each) for each in sizes]


@pytest.mark.parametrize("name", ("full", "int4", "kivi", "think", "cake"))
def test_a_decode_step_moves_queries_not_the_cache(name):
    """Each layer merges what devices found in two reductions of the size of its queries."""
    config = dataclasses.replace(tiny.CONFIG, layer_types=("full",) * 2, max_length=2048)
    policy, params = tiny.small(name), kvjax.init_params(config, jax.random.key(0))
    tokens = np.random.default_rng(0).integers(2, 128, (2, 512)).astype(np.int32)
    cache = kvjax.prefill(params, config, policy, tokens)
    mesh = make_mesh("seq=4,model=2")
    with jax.set_mesh(mesh):
        step = extend_hidden.lower(
            shard_params(params, config, mesh),
            config,
            policy.after_prompt,
            shard_cache(cache, mesh),
            jnp.zeros((2, 1), jnp.int32),
            jnp.ones((2, 1), bool),
        ).compile()
    moved = collectives(step.as_text())
    assert moved
    assert max(moved) <= 2 * config.hidden_size + 2 * config.num_heads * (config.head_dim + 1)


def test_a_model_is_loaded_onto_the_mesh(tmp_path):
    """Each device is given its part, from any kind of checkpoint; a mesh that cannot serve is refused before."""
    from kvjax.checkpoints.orbax import save_params

    alone, mesh = kvjax.load("tiny"), make_mesh("seq=4,model=2")
    save_params(tmp_path / "orbax", alone.params, alone.config, alone.tokenizer)
    for source in ("tiny", str(tmp_path / "orbax")):
        with jax.set_mesh(mesh):
            loaded = kvjax.load(source)
        places = param_shardings(loaded.params, loaded.config, mesh)
        for leaf, want, place in zip(*map(jax.tree.leaves, (loaded.params, alone.params, places)), strict=True):
            assert leaf.sharding.is_equivalent_to(place, leaf.ndim)
            np.testing.assert_array_equal(leaf, want)
    with jax.set_mesh(make_mesh("model=7", jax.devices()[:7])), pytest.raises(MeshError, match="do not divide"):
        kvjax.load("tiny")
