"""Checksums: the two sums they are defined as, however an array is cut; and what they notice."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.checkpoints import checksum
from kvjax.checkpoints.checksum import checksums

SPECS = [
    jax.P("a", "b"),
    jax.P(None, ("a", "b")),
    jax.P(),
    jax.P(None, None, "a", "b"),
    jax.P(None, None, None, "b"),
    jax.P("b", None, "a"),
]


def by_definition(x) -> tuple[int, int]:
    bits = [int(element) for element in checksum._bits(np.asarray(x)).reshape(-1)]
    return sum(bits) % 2**32, sum(bit * place for place, bit in enumerate(bits)) % 2**32


def draw(rng, dtype, shape=(8, 16, 4, 6)):
    return jnp.asarray(rng.normal(size=shape) * 5).astype(dtype)


def add_parts(x) -> tuple[int, int]:
    """The sums of every part of an array, as the processes that hold them would add them."""
    parts = [part for part in x.addressable_shards if part.replica_id == 0]
    total = np.zeros(2, np.uint32)
    for part in parts:
        start = [index.indices(size)[0] for index, size in zip(part.index, x.shape, strict=True)]
        total += checksum._sums(np.asarray(part.data), start, x.shape)
    return int(total[0]), int(total[1])


@pytest.mark.parametrize(
    "dtype", ["bfloat16", "float32", "float8_e4m3fn", "int4", "uint8", "int32", "bool", "complex64"]
)
def test_the_parts_add_up_to_the_whole(dtype, rng):
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    x = draw(rng, dtype)
    want = by_definition(x)
    assert checksums({"x": x, "y": np.asarray(x)}) == {"x": want, "y": want}
    for spec in SPECS:
        assert add_parts(jax.device_put(x, jax.sharding.NamedSharding(mesh, spec))) == want, spec


def test_large_arrays_and_scalars(rng):
    """Rows longer and shorter than what is worked on at once."""
    for shape in ((), (1,), (checksum.BLOCK * 2 + 3,), (checksum.BLOCK + 1, 3), (3, checksum.BLOCK + 1)):
        x = rng.integers(0, 256, shape, np.uint8)
        assert checksums({"x": x})["x"] == by_definition(x)


def test_what_is_noticed(rng):
    x = rng.integers(0, 2**16, (5, 7), np.uint16)
    whole = checksums({"x": x})["x"]
    for place in np.ndindex(x.shape):
        for bit in (0, 15):
            other = x.copy()
            other[place] ^= 1 << bit
            assert checksums({"x": other})["x"] != whole
    assert checksums({"x": x[::-1]})["x"] != whole and checksums({"x": x.T})["x"] != whole
    assert checksums({"x": np.roll(x, 1, 1)})["x"] != whole
