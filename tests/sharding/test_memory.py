"""What a device holds while a layer of a prompt is attended is bounded by its own tokens, as docs/scaling.md says."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from kvjax.generation.prefill import Chunk, _full_layer
from kvjax.kernels.prefill import BLOCK
from kvjax.models.config import Rope
from kvjax.models.params import abstract_params
from kvjax.models.transformer import layer_spec
from kvjax.policies.observe import Needs
from kvjax.sharding import make_mesh, param_shardings
from tests.tiny import CONFIG

HEADS, GROUP, DIM, FLOAT = 2, 4, 32, 4
LARGE = dataclasses.replace(
    CONFIG,
    hidden_size=256,
    mlp_size=512,
    num_heads=HEADS * GROUP,
    num_kv_heads=HEADS,
    head_dim=DIM,
    layer_types=("full",),
    rope=Rope(theta=1e4, rotary_dim=DIM),
    max_length=1 << 20,
)


def bound(tokens: int, heads: int) -> int:
    """Bytes of a device's temporaries for its own tokens and KV heads: queries, keys, values and outputs, those that it
    works on, those that arrive and those that are exchanged; and logits of a block of queries over half of the keys."""
    return tokens * heads * (DIM * FLOAT * (9 * GROUP + 6) + BLOCK // 2 * GROUP * 4)


@pytest.mark.parametrize("shape, length", [("seq=8", 4096), ("seq=8", 16384), ("seq=4,model=2", 8192)])
def test_temporaries_of_a_prompt(shape, length):
    mesh, shapes = make_mesh(shape), abstract_params(LARGE)
    places = param_shardings(shapes, LARGE, mesh)
    placed = jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes, places)
    tokens = NamedSharding(mesh, PartitionSpec(None, "seq"))
    with jax.set_mesh(mesh):
        compiled = _full_layer.lower(
            placed["layers"][0],
            jax.ShapeDtypeStruct((1, length, LARGE.hidden_size), jnp.float32, sharding=tokens),
            jax.ShapeDtypeStruct((1, length), jnp.int32, sharding=tokens),
            jax.ShapeDtypeStruct((), jnp.int32),
            config=LARGE,
            spec=layer_spec(LARGE, 0),
            needs=Needs(window=32, column_sums=True),
            chunk=Chunk(),
        ).compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    most = bound(length // mesh.shape["seq"], HEADS // mesh.shape["model"])
    assert 0.5 * most < memory.temp_size_in_bytes < most
