"""The Hopper kernel of paged attention, interpreted, against the definition."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from kvjax.kernels.decode.gpu import NEEDED
from kvjax.kernels.hopper import interpreter
from kvjax.kernels.paged import PagedRequest, gpu, reference
from tests.kernels.test_paged_tpu import make as make_any

old = jax.__version_info__ < NEEDED
interpreted = pytest.mark.skipif(old, reason=f"the kernel needs JAX {NEEDED}, whose interpreter reads its tiles")
make = functools.partial(make_any, q="bfloat16")


def check(request: PagedRequest, tolerance: float, programs: int = 3, **options) -> None:
    """Equal to the definition, which sees the same numbers."""
    run = functools.partial(gpu.attend, programs=programs, interpret=interpreter(**options))
    found, wanted = jax.jit(run)(request), jax.jit(reference.attend)(request)
    np.testing.assert_allclose(found.out, wanted.out, atol=tolerance, rtol=0)
    np.testing.assert_allclose(found.lse, wanted.lse, atol=tolerance, rtol=1e-6)


# Products are taken in bfloat16, and packed codes are scaled in it.
CASES = {
    "Quest": (dict(k="bfloat16", page=16, pages=9, d=128, hq=4, g=1, m=5, cut=8), 0.01),
    "Quest, window": (dict(k="bfloat16", page=16, pages=9, hq=4, g=1, m=6, cut=8, pos=True, window=60), 0.01),
    "Quest, int8": (dict(k="int8", page=16, pages=9, hq=4, g=1, m=6, cut=8), 0.02),
    "pages of 8": (dict(k="bfloat16", page=8, pages=20, hq=2, m=11), 0.01),
    "pages of 96": (dict(k="4 channel 32 float16", v="4 token 32 float16", page=96, pages=3, hq=2, m=3), 0.03),
    "pages of 128": (dict(k="bfloat16", cut=24, pages=3), 0.01),
    "float8": (dict(k="float8_e4m3fn", page=64, pages=3), 0.02),
    "4-bit": (dict(k="4 token 64 float16", page=64, pages=3), 0.03),
    "KIVI": (dict(k="2 channel 32 float16", v="2 token 32 float16", page=64, cut=32), 0.05),
    "pool": (dict(k="bfloat16", pool=True, pages=6, page=64, m=7), 0.01),
    "pool of int8": (dict(k="int8", pool=True, pages=6, page=64, m=7), 0.02),
    "KIVI pool": (dict(k="2 channel 32 float16", v="2 token 32 float16", pool=True, page=32, pages=5, m=4), 0.05),
    "positions": (dict(k="bfloat16", pos=True, t=3, window=100, softcap=4.0, page=64, m=4), 0.01),
    "positions in a pool": (dict(k="int8", pos=True, pool=True, page=64), 0.02),
    "one head for all": (dict(k="bfloat16", page=64, hk=1, hq=6), 0.01),
}


@interpreted
@pytest.mark.parametrize("name", CASES)
def test_equals_the_definition(rng, name):
    """Tables name pages in any order, and some that do not exist; NaN is wherever nobody looks."""
    case, tolerance = CASES[name]
    check(make(rng, **case), tolerance)


@interpreted
def test_padding_sees_nothing(rng):
    request = make(rng, k="bfloat16", t=2, page=64)
    check(dataclasses.replace(request, q_pos=request.q_pos.at[0].set(-1).at[1, 1].set(-1)), 0.01)


@interpreted
@pytest.mark.parametrize("case", [dict(k="bfloat16", page=16, pages=9, m=9), dict(k="4 token 32", page=64)])
def test_no_races(rng, capfd, case):
    """Copies overwrite only what has been read."""
    check(make(rng, b=1, **case), 0.03, programs=2, detect_races=True)
    assert "RACE DETECTED" not in capfd.readouterr().out


@pytest.mark.skipif(old, reason="an old JAX is refused before anything else")
@pytest.mark.parametrize(
    "change, says",
    [
        (dict(page=20), "pages of 20 slots cannot be copied"),
        (dict(page=16, pages=3, cut=4), "44 slots cannot be copied"),
        (dict(page=32, k="2 channel 64"), "which pages of 32 would cut"),
        (dict(d=80), "k has 80 channels"),
        (dict(q="float32"), "queries are float32"),
        (dict(k="float32"), "k is stored as float32"),
    ],
)
def test_refusals_say_why(rng, change, says):
    with pytest.raises(ValueError, match=says):
        gpu.attend(make(rng, **(dict(k="bfloat16", page=64) | change)))
