"""Packing and rounding, for any shape, axis and width."""

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis.extra import numpy as hnp

from kvjax.kernels.packing import codes_per_word, expand, pack, round_to_nearest, unpack

FLOATS = st.floats(-1e3, 1e3, width=32, allow_subnormal=False)  # Which CPUs flush to zero.
EXAMPLES = settings(max_examples=20)
pack_, unpack_ = (jax.jit(f, static_argnums=(1, 2)) for f in (pack, unpack))
round_ = jax.jit(round_to_nearest, static_argnums=(1, 2, 3, 4))


# Shapes are few, so that little is compiled; numbers are many.
@pytest.mark.parametrize(
    "bits, shape, axis", [(2, (32,), -1), (2, (32, 5), 0), (4, (3, 16), 1), (4, (2, 16, 3), -2), (8, (2, 3, 4), -1)]
)
@given(st.data())
@EXAMPLES
def test_unpack_undoes_pack(bits, shape, axis, data):
    codes = data.draw(hnp.arrays(np.uint8, shape, elements=st.integers(0, 2**bits - 1)))
    words = pack_(codes, bits, axis)
    assert words.dtype == jnp.int32 and words.size * 32 == codes.size * bits
    np.testing.assert_array_equal(unpack_(words, bits, axis), codes)
    # Low bits first: code j of a word is at bit j * bits (KIVI's order).
    first = np.moveaxis(np.asarray(words), axis, 0)[0].astype(np.int64) & 0xFFFFFFFF
    want = np.moveaxis(codes, axis, 0)[: 32 // bits].astype(np.int64)
    np.testing.assert_array_equal(first, sum(code << (bits * j) for j, code in enumerate(want)))


@pytest.mark.parametrize(
    "bits, shape, group, axis, dtype",
    [
        (2, (32,), 16, -1, jnp.float32),
        (2, (2, 16, 3), 4, -2, jnp.float16),
        (4, (3, 16), 16, 1, jnp.float16),
        (4, (16, 5), 8, 0, jnp.float32),
        (8, (3, 16), 8, -1, jnp.float32),
    ],
)
@given(st.data())
@EXAMPLES
def test_rounding_errs_by_half_a_step(bits, shape, group, axis, dtype, data):
    x = data.draw(hnp.arrays(np.float32, shape, elements=FLOATS))
    codes, scale, zero = round_(x, bits, group, axis, dtype)
    assert codes.shape == shape and codes.dtype == jnp.uint8 and np.asarray(codes).max() < 2**bits
    assert scale.dtype == zero.dtype == dtype and scale.shape[axis] == shape[axis] // group
    step, low = (np.repeat(np.asarray(y, np.float32), group, axis) for y in (scale, zero))
    error = np.abs(np.asarray(codes) * step + low - x)
    # float16 numbers are off by 2^-11 of their size themselves; tiny scales may even vanish in it.
    slack = 1e-5 * np.abs(x).max() if dtype == jnp.float32 else 2.0**-10 * np.abs(x).max() + 2.0**-13 * 2**bits
    assert (error <= step / 2 + slack).all()


@given(FLOATS)
@EXAMPLES
def test_a_constant_group_is_exact(value):
    codes, scale, zero = (np.asarray(x) for x in round_(np.full((3, 16), value, np.float32), 8, 8, -1, jnp.float32))
    assert (codes == 0).all() and (scale == 0).all() and (zero == np.float32(value)).all()


@pytest.mark.parametrize("axis", [0, 1, 2, -1, -2, -3])
def test_expand_repeats(axis):
    x = np.arange(24.0).reshape(2, 3, 4)
    np.testing.assert_array_equal(expand(jnp.asarray(x), 5, axis), np.repeat(x, 5, axis))


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="bits must be 2, 4 or 8, got 3"):
        codes_per_word(3)
    with pytest.raises(ValueError, match="15 codes, not a multiple of 8"):
        pack(jnp.zeros((2, 15), jnp.uint8), 4)
    with pytest.raises(ValueError, match="10 entries, not a multiple of the group of 4"):
        round_to_nearest(jnp.zeros((3, 10)), 4, 4, -1)
