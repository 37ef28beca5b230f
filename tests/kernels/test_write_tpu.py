"""Writing and taking tokens with the TPU kernels, interpreted, against scatter and gather."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from kvjax.kernels.write import reference, tpu
from tests.kernels.test_decode_tpu import FAST

LEAVES = {
    "float32 rows": (jnp.float32, (128,)),
    "bfloat16 lanes": (jnp.bfloat16, (64,)),
    "int8 rows": (jnp.int8, (256,)),
    "float8 lanes": (jnp.float8_e4m3fn, (32,)),
    "words": (jnp.int32, (8,)),
    "scale": (jnp.float32, (1,)),
    "half": (jnp.float16, (4,)),
    "pos": (jnp.int32, ()),
    "marks": (jnp.float32, ()),
}


def data(rng, b: int, h: int, s: int, t: int) -> tuple[dict, dict]:
    def draw(n, one_head):
        shape = lambda more: (b, 1 if one_head else h, n, *more)  # noqa: E731
        return {k: jnp.asarray(rng.integers(-9, 9, shape(more)), dtype) for k, (dtype, more) in LEAVES.items()}

    return draw(s, False), draw(t, False)


@functools.partial(jax.jit, static_argnames="interpret", compiler_options=FAST)
def put(leaves, slot, values, interpret=True):
    return tpu.put(leaves, slot, values, interpret=interpret)


def check(leaves, slot, values, **kw):
    want, got = reference.put(leaves, slot, values), put(leaves, slot, values, **kw)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), want, got)
    assert jax.tree.map(lambda x: x.dtype, want) == jax.tree.map(lambda x: x.dtype, got)


@pytest.mark.parametrize("s, slot_heads, t", [(300, 1, 1), (300, 3, 5), (300, 1, 16), (24, 3, 1)])
def test_equals_the_scatter(rng, t, slot_heads, s):
    """Blocks that come again after others, slots beyond the end and before the beginning among them."""
    leaves, values = data(rng, 2, 3, s, t)
    slot = np.stack([[rng.permutation(s)[:t] for _ in range(slot_heads)] for _ in range(2)])
    slot[0, 0, 0] = s + 7
    slot[1, -1, -1] = -1
    check(leaves, jnp.asarray(slot, jnp.int32), values)


def test_positions_of_one_head(rng):
    leaves, values = data(rng, 2, 1, 200, 2)
    many, _ = data(rng, 2, 3, 200, 2)
    _, new = data(rng, 2, 3, 200, 2)
    check((leaves["pos"], many), jnp.asarray([[[199, 3]], [[130, 131]]], jnp.int32), (values["pos"], new))


def test_nothing_races(rng):
    leaves, values = data(rng, 1, 2, 256, 1)
    check(leaves, jnp.asarray([[[130]]], jnp.int32), values, interpret=pltpu.InterpretParams(detect_races=True))


@pytest.mark.parametrize("heads, t, says", [(1, 17, "too many"), (2, 1, "cannot go")])
def test_refusals_say_why(rng, heads, t, says):
    leaves, values = data(rng, 1, 3, 128, t)
    with pytest.raises(ValueError, match=says):
        tpu.put(leaves, jnp.zeros((1, heads, t), jnp.int32), values, interpret=True)


@functools.partial(jax.jit, static_argnames="interpret", compiler_options=FAST)
def take(leaves, slot, interpret=True):
    return tpu.take(leaves, slot, interpret=interpret)


def check_take(leaves, slot, **kw):
    """Bit for bit, whatever the numbers are."""
    want, got = reference.take(leaves, slot), take(leaves, slot, **kw)
    bits = lambda x: np.asarray(x).view(f"u{x.dtype.itemsize}")  # noqa: E731
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(bits(a), bits(b)), want, got)
    assert jax.tree.map(lambda x: x.dtype, want) == jax.tree.map(lambda x: x.dtype, got)


def odd_numbers(leaves: dict) -> dict:
    """The same with NaN, infinity and the negative zero among the floats."""
    strange = jnp.asarray([jnp.nan, jnp.inf, -0.0])

    def change(leaf):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf
        values = jnp.resize(strange.astype(leaf.dtype), leaf[:, :, 1::3].shape)
        return leaf.at[:, :, 1::3].set(values)

    return jax.tree.map(change, leaves)


@pytest.mark.parametrize("s, slot_heads, t", [(300, 1, 1), (300, 3, 5), (300, 1, 16), (24, 3, 1)])
def test_equals_the_gather(rng, t, slot_heads, s):
    """Slots that come twice, or lie beyond the end or before the beginning, among them."""
    leaves, _ = data(rng, 2, 3, s, 1)
    slot = rng.integers(0, s, (2, slot_heads, t))
    slot[0, 0, -1] = slot[0, 0, 0]
    slot[1, 0, 0], slot[1, -1, -1] = s + 7, -3
    check_take(odd_numbers(leaves), jnp.asarray(slot, jnp.int32))


@pytest.mark.parametrize("slot_heads", [1, 3])
def test_heads_of_one_serve_many(rng, slot_heads):
    """A leaf of one head and slots of many: every head gets its own token; slots of one head: the leaf keeps one."""
    one, _ = data(rng, 2, 1, 200, 1)
    many, _ = data(rng, 2, 3, 200, 1)
    slot = jnp.asarray(rng.integers(0, 200, (2, slot_heads, 2)), jnp.int32)
    check_take((one, many), slot)
    assert take((one, many), slot)[0]["pos"].shape == (2, slot_heads, 2)


def test_taking_does_not_race(rng):
    leaves, _ = data(rng, 1, 2, 256, 1)
    check_take(leaves, jnp.asarray([[[130, 3]]], jnp.int32), interpret=pltpu.InterpretParams(detect_races=True))


def test_too_many_are_not_taken_one_by_one(rng):
    leaves, _ = data(rng, 1, 3, 128, 1)
    with pytest.raises(ValueError, match="too many"):
        tpu.take(leaves, jnp.zeros((1, 1, 17), jnp.int32), interpret=True)
