"""Writing tokens with the TPU kernel, interpreted, against the scatter."""

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
