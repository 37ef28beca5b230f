"""The TPU kernel of decode attention, interpreted, against the definition."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from kvjax.kernels.decode import Request, Tail, reference, tpu
from kvjax.kernels.packing import pack
from kvjax.kernels.parts import NEG
from kvjax.kernels.vectors import Vectors
from tests.aot.compile_tpu import request

FLOAT8 = jnp.float8_e4m3fn
FAST = {"xla_backend_optimization_level": 0}  # To compile: little is computed.


def stored(rng, kind: str, shape: tuple[int, int, int, int], dead: np.ndarray) -> Vectors:
    """Random vectors [B, H, S, D] of a kind: "bfloat16", "int8", "4 token 32" (bits, scales per token and 32 channels)
    "2 channel 32 float16" (bits, scales per channel and 32 tokens, of that type). Slots that are dead [B, H, S] hold
    NaN wherever a float can be, and codes at random."""
    name, *rest = kind.split()
    b, h, s, d = shape
    poison = lambda x, dead: jnp.asarray(np.where(dead[..., None], np.nan, x))  # noqa: E731
    if name in ("float32", "bfloat16", "float16"):
        return Vectors(codes=poison(rng.standard_normal(shape), dead).astype(name))
    axis, group, dtype = (*rest, "float32")[:3] if rest else ("token", str(d), "float32")
    if axis == "token":
        wide = (b, h, s, d // int(group))
    else:
        wide = (b, h, s // int(group), d)
        dead = dead.reshape(b, h, wide[2], int(group)).all(-1)
    scale = poison(rng.uniform(0.5, 1.5, wide), dead)
    if name == "int8":
        codes = jnp.asarray(rng.integers(-127, 128, shape), jnp.int8)
        return Vectors(codes=codes, scale=(scale / 64).astype(dtype))
    if name == "float8_e4m3fn":
        return Vectors(codes=poison(rng.standard_normal(shape), dead).astype(FLOAT8), scale=scale.astype(dtype))
    bits = int(name)
    codes = pack(jnp.asarray(rng.integers(0, 2**bits, shape)), bits)
    zero = poison(rng.uniform(-2, 0, wide), dead)
    return Vectors(codes=codes, scale=(3 * scale / 2**bits).astype(dtype), zero=zero.astype(dtype), bits=bits)


def make(
    rng,
    k="bfloat16",
    v=None,
    *,
    s=256,
    d=64,
    b=2,
    h=2,
    g=2,
    t=1,
    lengths=None,
    pos=False,
    r=0,
    q="float32",
    latent=0,
    **kw,
) -> Request:
    """A random request; `v` as `k` unless it is given, values in the keys with `latent`."""
    lengths = np.asarray(rng.integers(1, s, (b, h)) if lengths is None else lengths)
    lengths = np.broadcast_to(lengths, (b, h))
    dead = np.arange(s) >= lengths[..., None]
    q_pos = np.broadcast_to(np.arange(s, s + t), (b, t)).copy()
    where = None
    if pos:  # Any order, some slots empty, some from the future.
        where = np.stack([rng.permutation(s + 4) for _ in range(b)])[:, None, :s] + t - 2
        where[:, :, 5:9] = -1
        window = kw.get("window") or 2**30
        unseen = (where < 0) | (where > q_pos[:, None, -1:]) | (where <= q_pos[:, None, :1] - window)
        dead = dead | unseen
    tail = None
    if r:
        t_pos = np.broadcast_to(np.arange(s + t - r, s + t), (b, 1, r)).copy()
        t_pos[0, :, 0] = -1
        none = np.broadcast_to(t_pos < 0, (b, h, r))[..., None]
        k_, v_ = (jnp.asarray(np.where(none, np.nan, rng.standard_normal((b, h, r, n))), q) for n in (d, latent or d))
        tail = Tail(k=k_, v=v_, pos=jnp.asarray(t_pos, jnp.int32))
    return Request(
        q=jnp.asarray(rng.standard_normal((b, h, g * t, d)) / d**0.5, q),
        k=stored(rng, k, (b, h, s, d), dead),
        v=None if latent else stored(rng, v or k, (b, h, s, d), dead),
        lengths=jnp.asarray(lengths, jnp.int32),
        q_pos=jnp.asarray(q_pos, jnp.int32),
        pos=None if where is None else jnp.asarray(where, jnp.int32),
        tail=tail,
        latent=latent,
        **kw,
    )


@functools.partial(jax.jit, static_argnames=("block", "splits", "interpret"), compiler_options=FAST)
def run(request, block=128, splits=1, interpret=True):
    return tpu.decode(request, block=block, splits=splits, interpret=interpret)


def check(request: Request, **kw):
    """Within 2e-5 of the reference for float32 queries; for bfloat16 ones, whose weights and queries are rounded to
    eight bits, within 2 % of the largest value."""
    want, got = jax.jit(reference.decode, compiler_options=FAST)(request), run(request, **kw)
    error = 2e-5 if request.q.dtype == jnp.float32 else 2e-2
    for name in ("out", "lse", "logits"):
        a, b = (np.asarray(getattr(part, name)) if getattr(part, name) is not None else None for part in (want, got))
        if a is None:
            assert b is None
            continue
        assert a.shape == b.shape and b.dtype == np.float32
        np.testing.assert_array_equal(b == np.float32(NEG), a == np.float32(NEG), err_msg=name)
        live = a != np.float32(NEG)
        np.testing.assert_allclose(
            b[live], a[live], rtol=0, atol=error * max(np.abs(a[live]).max(initial=0), 1), err_msg=name
        )


KINDS = [
    "float32",
    "bfloat16",
    "int8",
    "float8_e4m3fn",
    "4 token 32 float16",
    "2 token 64",
    "8 token 32 bfloat16",
    "4 channel 32 float16",
    "2 channel 128",
    "8 channel 64 bfloat16",
    "2 channel 256 float16",
    "int8 channel 32",
]
EDGES = [[0, 256], [130, 3]]  # Lengths: nothing, everything, a block and a bit, less than a block.
KIVI = dict(k="2 channel 32 float16", v="2 token 32 float16")


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_storage(rng, kind):
    check(make(rng, kind, lengths=EDGES))


@pytest.mark.parametrize(
    "d, k, v",
    [
        (128, "bfloat16", "4 token 64"),
        (128, "4 channel 32 float16", "8 token 64"),
        (128, "2 token 32", "2 channel 64"),
        (256, "int8", "float32"),
        (256, "4 channel 32 float16", "2 token 128 bfloat16"),
    ],
)
def test_wide_heads_and_mixed_storage(rng, d, k, v):
    check(make(rng, k, v, d=d, lengths=EDGES))


@pytest.mark.parametrize("d, kind", [(80, "bfloat16"), (96, "4 token 32"), (512, "8 token 64"), (16, "2 token 16")])
def test_heads_of_other_widths(rng, d, kind):
    check(make(rng, kind, d=d, b=1, h=1))


PLAIN = dict(k="bfloat16")
REQUESTS = {
    "window": dict(**PLAIN, pos=True, window=100, t=3),
    "window, packed": dict(**KIVI, pos=True, window=100, t=3),
    "positions and padding": dict(**KIVI, pos=True, t=16),
    "scores": dict(**PLAIN, softcap=5.0, logits=True, lengths=EDGES),
    "tail": dict(**KIVI, r=5, pos=True, window=150, logits=True, t=3),
    "tail alone": dict(**PLAIN, r=33, lengths=0, logits=True),
    "one new token in the tail": dict(**KIVI, r=1),
    "one query head": dict(**PLAIN, g=1, logits=True),
    "one KV head": dict(**KIVI, h=1, g=12, t=2),
    "ragged end": dict(**PLAIN, s=200 + 24),
    "ragged end, packed": dict(**KIVI, s=200 + 24),
    "few slots": dict(**KIVI, s=32),
}


@pytest.mark.parametrize("name", REQUESTS)
def test_every_request(rng, name):
    check(make(rng, **REQUESTS[name]))


def test_splits_of_a_long_sequence(rng):
    check(make(rng, **KIVI, s=1024, b=1, h=1, r=5, logits=True), splits=3)


def test_splits_without_a_token(rng):
    check(make(rng, **PLAIN, s=512, lengths=[[100, 0], [512, 256]]), splits=2, block=256)


@pytest.mark.parametrize("kind", ["bfloat16", "4 token 32"])
def test_bias(rng, kind):
    bias = np.where(rng.random((2, 2, 3, 256)) < 0.9, rng.standard_normal((2, 2, 3, 256)), np.nan)
    request = make(rng, kind, g=3, softcap=10.0, lengths=200)
    bias[..., :200] = np.nan_to_num(bias[..., :200])
    check(dataclasses.replace(request, bias=jnp.asarray(bias, jnp.float32)))


@pytest.mark.parametrize("kind", ["bfloat16", "4 token 32"])
def test_values_in_the_keys(rng, kind):
    check(make(rng, kind, d=96, latent=64, h=1, g=8, r=3, logits=True))


@pytest.mark.parametrize("kind", [PLAIN, dict(k="int8", v="4 token 32"), KIVI])
def test_bfloat16_queries(rng, kind):
    check(make(rng, **kind, q="bfloat16", g=8, r=7, d=128, lengths=EDGES))


@pytest.mark.parametrize("tokens, block", [(512, 128), (1024, 256), (1000, 512), (8, 128), (128, 1024)])
def test_groups_of_tokens_larger_and_smaller_than_blocks(rng, tokens, block):
    s = 1000 if tokens == 1000 else 1024
    check(make(rng, f"4 channel {tokens}", s=s, b=1, h=1, lengths=[[900]]), block=block)


def test_scales_of_all_heads(rng):
    request = make(rng, "4 token 32")
    share = lambda x: dataclasses.replace(x, scale=jnp.ones_like(x.scale[:, :1]), zero=jnp.zeros_like(x.zero[:, :1]))  # noqa: E731
    check(dataclasses.replace(request, k=share(request.k), v=share(request.v)))


def test_lengths_beyond_the_end_are_the_end(rng):
    request = make(rng, "bfloat16", s=224, lengths=224)
    check(dataclasses.replace(request, lengths=request.lengths + 1000))


def test_all_new_tokens_are_padding(rng):
    request = make(rng, "bfloat16", t=2, r=3)
    check(dataclasses.replace(request, q_pos=request.q_pos.at[0].set(-1).at[1, 1].set(-1)))


def test_nothing_races(rng):
    request = make(rng, "int8", "4 token 32", s=256, r=3, b=1)
    check(request, interpret=pltpu.InterpretParams(detect_races=True))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_bitcasts_unpack_as_we_pack(rng, bits):
    codes = rng.integers(0, 2**bits, (64, 128))
    form = tpu.Form(dim=64, lanes=True, bits=bits)
    words = pack(jnp.asarray(codes), bits, 0)
    got = jax.jit(lambda w: tpu.numbers_of(w, form, jnp.float32))(words)
    np.testing.assert_array_equal(got + form.offset, codes)


@pytest.mark.parametrize(
    "change, block, says",
    [
        (dict(t=17), None, "prefill"),
        (dict(k="float16"), None, "float16"),
        (dict(k="4 channel 48", s=240), None, "48 tokens share a scale"),
        (dict(k="4 token 8", d=128, g=8, t=16), None, "larger groups"),
        (dict(r=4200), None, "tail of 4200"),
        (dict(), 100, "multiple of 128"),
        (dict(k="4 channel 384", s=1536), 256, "one must divide"),
    ],
)
def test_refusals_say_why(rng, change, block, says):
    with pytest.raises(ValueError, match=says):
        tpu.decode(make(rng, **change), block=block, interpret=True)


@pytest.mark.parametrize("kind", KINDS)
def test_default_blocks_are_valid(kind):
    for d, s, kw in itertools.product((64, 128, 256, 576), (256, 1024, 100_096), ({}, dict(t=16), dict(logits=True))):
        if "token" in kind and d == 576 and kw:
            continue  # Refused: too many groups for so many rows.
        shapes = request(kind, d=d, s=s, **kw)
        block = tpu.default_block(shapes)
        assert tpu.check_block(shapes, block) is None and block % 128 == 0 and block <= 4096
        assert block >= min(256, s), (d, s, kw)
