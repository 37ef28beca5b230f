"""Kernels over a mesh equal themselves on one device: ring attention, the best of all slots, tokens that move."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.kernels import write
from kvjax.kernels.prefill import ColumnSums, Statistics, prefill_attention
from kvjax.kernels.top import top_slots
from kvjax.sharding import make_mesh

BATCH, HEADS, GROUP, DIM = 2, 2, 2, 16
EVERYTHING = Statistics(
    lse=True,
    entropy=True,
    column_sums=(ColumnSums(), ColumnSums(forgetting=0.9, normalized=True), ColumnSums(window=5)),
    window=4,
)


def prompts(rng, length: int):
    """Queries, keys, values and positions of two prompts, the second shorter, its padding poisoned."""
    q = rng.normal(size=(BATCH, HEADS * GROUP, length, DIM)).astype(np.float32)
    k, v = (rng.normal(size=(BATCH, HEADS, length, DIM)).astype(np.float32) for _ in range(2))
    lengths = np.array([length, length * 5 // 8])
    for x in (q, k, v):
        x[1, :, lengths[1] :] = np.nan
    pos = np.where(np.arange(length) < lengths[:, None], np.arange(length), -1).astype(np.int32)
    return tuple(map(jnp.asarray, (q, k, v, pos)))


@pytest.mark.parametrize("options", ({}, {"window": 7}, {"window": 40, "softcap": 5.0}), ids=str)
@pytest.mark.parametrize("shape", ("seq=8", "data=2,seq=2,model=2"))
def test_ring_attention(shape, options, rng):
    arguments = prompts(rng, 64)
    run = functools.partial(prefill_attention, scale=0.3, statistics=EVERYTHING, **options)
    want = run(*arguments, implementation="reference")
    with jax.set_mesh(make_mesh(shape)):
        found = jax.jit(run)(*arguments)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(x, y, atol=2e-5)


def test_ring_attention_by_the_tpu_kernel(rng):
    """Interpreted: the kernels see keys that stand anywhere."""
    arguments = prompts(rng, 512)
    statistics = Statistics(lse=True, column_sums=(ColumnSums(),))
    run = functools.partial(prefill_attention, scale=0.3, statistics=statistics)
    want = run(*arguments, implementation="reference")
    with jax.set_mesh(make_mesh("seq=2", jax.devices()[:2])):
        found = jax.jit(functools.partial(run, implementation="tpu"))(*arguments)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(x, y, atol=2e-5)


def test_gradients_go_around_the_ring(rng):
    q, k, v, pos = prompts(rng, 32)
    q, k, v = (jnp.nan_to_num(x) for x in (q, k, v))

    def loss(q, k, v):
        return (prefill_attention(q, k, v, pos, scale=0.3).out ** 2).sum()

    want = jax.grad(loss, (0, 1, 2))(q, k, v)
    with jax.set_mesh(make_mesh("seq=4", jax.devices()[:4])):
        found = jax.jit(jax.grad(loss, (0, 1, 2)))(q, k, v)
    for x, y in zip(found, want, strict=True):
        np.testing.assert_allclose(x, y, atol=2e-4)


def scores(kind: str, rng) -> np.ndarray:
    x = rng.normal(size=(BATCH, HEADS, 64)).astype(np.float32)
    if kind == "equal":
        x[:], x[:, :, ::3] = 0.0, -0.0
    elif kind == "few values":
        x = np.round(x)
    elif kind == "forced and empty":
        x[0, :, 40:], x[1, :, 5:], x[:, :, :4] = -np.inf, -np.inf, np.inf
    return x


@pytest.mark.parametrize("kind", ("distinct", "few values", "equal", "forced and empty"))
def test_the_same_slots_are_best(kind, rng):
    x, number = jnp.asarray(scores(kind, rng)), jnp.asarray([20, 7])
    want = top_slots(x, number, 20)
    for shape in ("seq=8", "seq=2,model=4"):
        with jax.set_mesh(make_mesh(shape)):
            found = jax.jit(top_slots, static_argnums=2)(x, number, 20)
        for a, b in zip(found, want, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("number", (3, 24, 37))
def test_tokens_move_whole(number, rng):
    """Few are given to all, many are spread; no number that does not divide is lost."""
    leaf = jnp.asarray(rng.normal(size=(BATCH, 1, 64, DIM)), jnp.bfloat16)
    index = jnp.asarray(rng.integers(0, 64, (BATCH, HEADS, number)), jnp.int32)
    want = write.gather(leaf, index)
    with jax.set_mesh(make_mesh("data=2,seq=4")):
        found = jax.jit(write.gather)(leaf, index)
    np.testing.assert_array_equal(found.astype(jnp.float32), want.astype(jnp.float32))


def test_a_block_may_be_larger_than_a_device_s_part(rng):
    leaf, values = (jnp.asarray(rng.normal(size=(BATCH, HEADS, n, DIM)), jnp.float32) for n in (64, 16))
    start = jnp.asarray([16, 48])
    with jax.set_mesh(make_mesh("seq=8")):
        found = jax.jit(write.put_block)(leaf, start, values)
        taken = jax.jit(write.take_block, static_argnums=2)(found, start, 16)
    np.testing.assert_array_equal(found, write.put_block(leaf, start, values))
    np.testing.assert_array_equal(taken, values)


def test_what_is_written_outside_is_dropped_on_every_device(rng):
    leaf, values = (jnp.asarray(rng.normal(size=(BATCH, HEADS, n, DIM)), jnp.float32) for n in (64, 4))
    slot = jnp.asarray([[[0, 63, 64, -1]], [[17, 8, 1000, 7]]], jnp.int32)
    want = write.put(leaf, slot, values)
    with jax.set_mesh(make_mesh("seq=8")):
        np.testing.assert_array_equal(jax.jit(write.put)(leaf, slot, values), want)
        block = jax.jit(write.put_block)(leaf, jnp.asarray([8, 64]), values)
    np.testing.assert_array_equal(block, write.put_block(leaf, jnp.asarray([8, 64]), values))
    np.testing.assert_array_equal(block[1], leaf[1])
