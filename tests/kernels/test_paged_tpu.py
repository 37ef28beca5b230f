"""Paged attention against its definition: the TPU kernel, interpreted, and blockwise JAX."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from kvjax.kernels.paged import PagedRequest, reference, tpu, xla
from kvjax.kernels.parts import NEG
from tests.kernels.test_decode_tpu import FAST, stored


def make(
    rng,
    k="float32",
    v=None,
    *,
    page=128,
    pages=4,
    d=64,
    b=2,
    hk=2,
    hq=4,
    g=2,
    t=1,
    m=3,
    pool=False,
    pos=False,
    cut=0,
    **kw,
) -> PagedRequest:
    """A random request whose tables name pages in any order, and in some columns pages that do not exist.

    `cut`: slots that the last page lacks. Slots that nobody can see hold NaN."""
    shape = (b, pages, page, d) if pool else (b, hk, pages * page - cut, d)
    lengths = rng.integers(1, shape[2] + 1, shape[:2])
    lengths[0, 0], lengths[-1, -1] = shape[2], 0
    dead = np.arange(shape[2]) >= lengths[..., None]
    table = np.stack([[rng.permutation(pages)[:m] for _ in range(hq)] for _ in range(b)])
    table = np.pad(table, ((0, 0), (0, 0), (0, m - table.shape[2])), constant_values=-1)
    table[0, 0, 0], table[-1, 0, -1] = -1, pages
    count = rng.integers(1, m + 1, (b, hq))
    count[0, 1], count[0, 0] = 0, m
    q_pos = np.broadcast_to(np.arange(t) + 2 * shape[2] // 3, (b, t))
    where = None
    if pos:
        where = np.stack([[rng.permutation(shape[2]) for _ in range(shape[1])] for _ in range(b)])
        where[..., 3:7] = -1
        dead = dead | (where < 0) | (where > q_pos[0, -1])
    q = kw.pop("q", "float32")
    return PagedRequest(
        q=jnp.asarray(rng.standard_normal((b, hq, g * t, d)) / d**0.5, q),
        k=stored(rng, k, shape, dead),
        v=stored(rng, v or k, shape, dead),
        table=jnp.asarray(table, jnp.int32),
        count=jnp.asarray(count, jnp.int32),
        lengths=jnp.asarray(lengths, jnp.int32),
        q_pos=jnp.asarray(q_pos, jnp.int32),
        pos=None if where is None else jnp.asarray(where, jnp.int32),
        page=page,
        pool=pool,
        **kw,
    )


@functools.partial(jax.jit, static_argnames=("how", "options"), compiler_options=FAST)
def run(request, how, options=()):
    if how == "reference":
        return reference.attend(request)
    return xla.attend(request, **dict(options)) if how == "xla" else tpu.attend(request, **dict(options))


def check(request: PagedRequest, how: str, **options):
    """Within 2e-5 of the reference for float32 queries, 2 % for bfloat16 ones, of the largest value."""
    options = (
        (("interpret", True), *options.items()) if how == "tpu" and "interpret" not in options else options.items()
    )
    want, got = run(request, "reference"), run(request, how, tuple(options))
    error = 2e-5 if request.q.dtype == jnp.float32 or how == "xla" else 2e-2
    for a, b in ((want.out, got.out), (want.lse, got.lse)):
        a, b = np.asarray(a), np.asarray(b)
        np.testing.assert_array_equal(a == np.float32(NEG), b == np.float32(NEG))
        live = a != np.float32(NEG)
        np.testing.assert_allclose(b[live], a[live], rtol=0, atol=error * max(np.abs(a[live]).max(initial=0), 1))


CASES = {
    "Quest": dict(page=16, pages=9, d=128, hq=4, g=1, m=5, cut=5),
    "bfloat16": dict(k="bfloat16", page=16, pages=9, d=128, m=9, q="bfloat16"),
    "narrow": dict(k="bfloat16", d=64),
    "int8": dict(k="int8", d=128, cut=28),
    "float8": dict(k="float8_e4m3fn", d=128),
    "packed": dict(k="4 token 32 float16"),
    "KIVI": dict(k="2 channel 32 float16", v="2 token 32 float16", d=128),
    "KIVI pool": dict(k="2 channel 32 float16", v="2 token 32 float16", pool=True, pages=5, m=4),
    "pool": dict(pool=True, pages=6, m=7, d=128),
    "positions": dict(pos=True, t=3, window=100, softcap=4.0, m=4),
    "positions in a pool": dict(pos=True, pool=True, k="int8", q="bfloat16"),
    "one head for all": dict(hk=1, hq=6),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("how", ["tpu", "xla"])
def test_equals_the_definition(rng, name, how):
    check(make(rng, **CASES[name]), how, block=256)


@pytest.mark.parametrize("how", ["tpu", "xla"])
def test_all_in_one_step(rng, how):
    check(make(rng, page=32, d=128, pages=8, m=8), how)


def test_short_pages_with_scales_in_jax(rng):
    check(make(rng, "2 channel 32", "4 token 32", page=64, pages=8, m=6), "xla", block=128)


def test_padding_sees_nothing(rng):
    request = make(rng, t=2)
    check(dataclasses.replace(request, q_pos=request.q_pos.at[0].set(-1).at[1, 1].set(-1)), "tpu")


def test_nothing_races(rng):
    check(make(rng, "int8", d=128, b=1), "tpu", interpret=pltpu.InterpretParams(detect_races=True))


@pytest.mark.parametrize(
    "change, says",
    [
        (dict(t=17), "prefill"),
        (dict(page=16, k="int8"), "make a page 128"),
        (dict(page=16, pos=True), "Positions"),
        (dict(page=128, k="2 channel 256"), "would cut"),
    ],
)
def test_refusals_say_why(rng, change, says):
    with pytest.raises(ValueError, match=says):
        tpu.attend(make(rng, **change), interpret=True)
