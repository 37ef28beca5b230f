"""The Hopper kernel, interpreted, against the definition; and what around it needs no GPU."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from kvjax.kernels.decode import Request, Tail, gpu, reference
from kvjax.kernels.decode.gpu_join import join
from kvjax.kernels.decode.gpu_schedule import Schedule, bounds, schedule
from kvjax.kernels.hopper import interpreter
from kvjax.kernels.packing import pack, round_to_nearest
from kvjax.kernels.vectors import Vectors

old = jax.__version_info__ < gpu.NEEDED
interpreted = pytest.mark.skipif(old, reason=f"the kernel needs JAX {gpu.NEEDED}, whose interpreter reads its tiles")

B, H, S = 2, 2, 192


def stored(key: Array, kind: str, dim: int, slots: int = S, heads: int = H) -> Vectors:
    """Random vectors: "bfloat16", "int8", "float8", or packed: "4-bit/32 channels", "2-bit/64 tokens float16"."""
    x = jax.random.normal(key, (B, heads, slots, dim))
    if kind == "bfloat16":
        return Vectors(codes=x.astype(jnp.bfloat16))
    top = jnp.abs(x).max(-1, keepdims=True)
    if kind == "int8":
        return Vectors(codes=jnp.round(x / top * 127).astype(jnp.int8), scale=top / 127)
    if kind == "float8":
        return Vectors(codes=(x / top * 448).astype(jnp.float8_e4m3fn), scale=top / 448)
    first, axis, *dtype = kind.split()
    bits, group = int(first[0]), int(first.split("/")[1])
    scale_dtype = jnp.dtype(dtype[0]) if dtype else jnp.float32
    codes, scale, zero = round_to_nearest(x, bits, group, -1 if axis == "channels" else -2, scale_dtype)
    return Vectors(codes=pack(codes, bits), scale=scale, zero=zero, bits=bits)


def make(kinds: tuple[str, str], dim: int = 64, group: int = 2, tokens: int = 1, lengths=None, **others) -> Request:
    keys = jax.random.split(jax.random.key(0), 3)
    slots = others.pop("slots", S)
    q = jax.random.normal(keys[0], (B, H, group * tokens, dim)) * dim**-0.5
    return Request(
        q=q.astype(jnp.bfloat16),
        k=stored(keys[1], kinds[0], dim, slots),
        v=stored(keys[2], kinds[1], dim, slots),
        lengths=jnp.asarray([[slots, 65], [0, 1]] if lengths is None else lengths, jnp.int32),
        q_pos=others.pop("q_pos", jnp.tile(jnp.arange(slots, slots + tokens, dtype=jnp.int32), (B, 1))),
        **others,
    )


def poison(x: Vectors, dead: Array) -> Vectors:
    """NaN in all floats of slots that are dead [B, H, S], and of groups of them."""

    def hurt(leaf: Array) -> Array:
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf
        groups = dead.reshape(*dead.shape[:2], leaf.shape[2], -1).all(-1)
        return jnp.where(groups[..., None], jnp.nan, leaf.astype(jnp.float32)).astype(leaf.dtype)

    return jax.tree.map(hurt, x)


def check(request: Request, tolerance: float, programs: int = 3, **options) -> None:
    """Equal to the definition, which sees the same numbers."""
    run = functools.partial(gpu.decode, programs=programs, interpret=interpreter(**options))
    found, wanted = jax.jit(run)(request), reference.decode(request)
    np.testing.assert_allclose(found.out, wanted.out, atol=tolerance, rtol=0)
    np.testing.assert_allclose(found.lse, wanted.lse, atol=tolerance, rtol=1e-6)


# Products are taken in bfloat16, and packed codes are scaled in it.
KINDS = {
    ("bfloat16", "bfloat16"): 0.004,
    ("int8", "int8"): 0.01,
    ("float8", "float8"): 0.01,
    ("8-bit/64 channels", "8-bit/64 channels"): 0.03,
    ("4-bit/32 channels bfloat16", "4-bit/32 channels bfloat16"): 0.03,
    ("4-bit/32 tokens float16", "4-bit/32 channels float16"): 0.03,
    ("2-bit/32 tokens float16", "2-bit/32 channels float16"): 0.05,
    ("4-bit/64 tokens", "4-bit/64 channels"): 0.03,
    ("bfloat16", "2-bit/64 channels"): 0.05,
}


@interpreted
@pytest.mark.parametrize(("kinds", "tolerance"), KINDS.items(), ids=lambda x: " ".join(x) if type(x) is tuple else "")
def test_kinds(kinds: tuple[str, str], tolerance: float) -> None:
    request = make(kinds)
    dead = jnp.arange(S) >= request.lengths[..., None]
    check(dataclasses.replace(request, k=poison(request.k, dead), v=poison(request.v, dead)), tolerance)


@interpreted
@pytest.mark.parametrize(
    ("kinds", "dim"),
    [
        (("bfloat16", "int8"), 128),
        (("2-bit/128 tokens", "2-bit/32 channels"), 128),
        (("4-bit/32 tokens", "4-bit/32 channels"), 256),
        (("2-bit/64 tokens", "2-bit/128 channels"), 256),
    ],
)
def test_channels(kinds: tuple[str, str], dim: int) -> None:
    check(make(kinds, dim, slots=128, lengths=[[128, 3], [64, 0]]), 0.05)


@interpreted
@pytest.mark.parametrize("kinds", [("bfloat16", "bfloat16"), ("4-bit/32 tokens", "4-bit/32 channels")])
def test_masks_by_position(kinds: tuple[str, str]) -> None:
    """Positions in any order, a window, padding among the queries, and NaN wherever nobody looks."""
    order = jax.random.permutation(jax.random.key(1), S).astype(jnp.int32)
    pos = jnp.where(order % 5 == 0, -1, order)[None, None].repeat(B, 0)
    q_pos = jnp.asarray([[150, 20, -1, 151], [90, 91, 92, 93]], jnp.int32)
    request = make(kinds, group=3, tokens=4, pos=pos, q_pos=q_pos, window=40, softcap=5.0)
    dead = ~reference.stored_mask(request).any(2)
    request = dataclasses.replace(request, k=poison(request.k, dead), v=poison(request.v, dead))
    check(request, 0.03)


@interpreted
def test_last_block_overlaps() -> None:
    """Slots that are no multiple of the block, and heads that share scales."""
    request = make(("int8", "4-bit/32 channels"), slots=80, lengths=[[80, 79], [64, 70]])
    shared = dataclasses.replace(request.k, scale=request.k.scale[:, :1])
    check(dataclasses.replace(request, k=shared), 0.03)


def draw_tail(size: int, last: int = S + 3) -> Tail:
    """Tokens that queries up to a last position see or do not, some of them nowhere; NaN where nobody looks."""
    keys = jax.random.split(jax.random.key(2), 3)
    k, v = (jax.random.normal(key, (B, H, size, 64)) for key in keys[:2])
    pos = jax.random.randint(keys[2], (B, 1, size), last - 90, last + 60).at[0, 0, 0].set(last).at[1, 0, -1].set(-1)
    k, v = (jnp.where(((pos > last) | (pos < 0))[..., None], jnp.nan, x) for x in (k, v))
    return Tail(k=k.astype(jnp.bfloat16), v=v.astype(jnp.bfloat16), pos=pos)


@interpreted
@pytest.mark.parametrize(
    ("kinds", "size", "programs"),
    [
        (("bfloat16", "bfloat16"), 3, 3),
        (("bfloat16", "bfloat16"), 130, 7),
        (("2-bit/32 tokens float16", "2-bit/32 channels float16"), 66, 1),
        (("bfloat16", "4-bit/32 channels"), 64, 40),
        (("int8", "bfloat16"), 1, 2),
    ],
)
def test_tail(kinds: tuple[str, str], size: int, programs: int) -> None:
    """New tokens and a residual, whatever share of the work they fall into."""
    check(make(kinds, tokens=4, tail=draw_tail(size)), 0.03, programs)


@interpreted
def test_tail_of_masked_slots() -> None:
    pos = jax.random.permutation(jax.random.key(1), S).astype(jnp.int32)[None, None].repeat(B, 0)
    q_pos = jnp.asarray([[195, -1], [150, 151]], jnp.int32)
    request = make(("int8", "int8"), tokens=2, pos=pos, q_pos=q_pos, window=40, softcap=5.0, tail=draw_tail(40))
    check(request, 0.01)


@interpreted
def test_empty_tail() -> None:
    check(make(("bfloat16", "bfloat16"), tail=jax.tree.map(lambda x: x[:, :, :0], draw_tail(1))), 0.004)


@interpreted
@pytest.mark.parametrize("kinds", [("bfloat16", "bfloat16"), ("4-bit/32 tokens", "4-bit/32 channels")])
def test_bias(kinds: tuple[str, str]) -> None:
    """Before the soft-cap, on stored tokens alone; NaN where nobody looks."""
    slots = 200 if kinds[0] == "bfloat16" else S
    request = make(kinds, group=3, softcap=3.0, tail=draw_tail(2, slots), slots=slots)
    bias = 2 * jax.random.normal(jax.random.key(5), (B, H, 3, request.k.slots))
    dead = jnp.arange(request.k.slots) >= request.lengths[..., None]
    check(dataclasses.replace(request, bias=jnp.where(dead[:, :, None], jnp.nan, bias)), 0.02)


@interpreted
@pytest.mark.parametrize("kinds", [("bfloat16", "bfloat16"), ("2-bit/32 tokens", "4-bit/32 channels")])
def test_no_races(kinds: tuple[str, str], capfd) -> None:
    """Copies overwrite only what has been read."""
    bias = jnp.ones((B, H, 2, 320))
    request = make(kinds, slots=320, lengths=[[320, 200], [0, 64]], bias=bias, tail=draw_tail(70, 320))
    check(request, 0.05, programs=2, detect_races=True)
    assert "RACE DETECTED" not in capfd.readouterr().out


def shares(plan: Schedule) -> list[tuple[int, list[tuple[int, range]]]]:
    """For each program where its share starts, and its rows with the blocks that it reads of each."""
    programs, found = plan.first_row.shape[0], []
    for program in range(programs):
        begin, end = (int(x) for x in bounds(plan.offsets[-1], program, programs))
        rows = []
        for row in range(int(plan.first_row[program]), int(plan.last_row[program]) + 1):
            low, high = (int(x) for x in plan.offsets[row : row + 2])
            rows.append((row, range(max(begin, low) - low, min(end, high) - low)))
        found.append((begin, rows))
    return found


def place(plan: Schedule, program: int, begin: int, row: int) -> int:
    """Which part a program writes of a row."""
    return row if plan.offsets[row] >= begin else plan.offsets.shape[0] - 1 + program


@pytest.mark.parametrize("programs", [1, 3, 7, 40])
@pytest.mark.parametrize("lengths", [[0, 0, 0], [640, 0, 1], [1, 64, 65, 0, 1000, 0], [0, 0, 5000]])
def test_shares_are_equal_and_cover_everything(lengths: list[int], programs: int) -> None:
    plan = schedule(-(-jnp.asarray(lengths, jnp.int32) // 64), programs)
    seen, slots, sizes = [], [], []
    for program, (begin, rows) in enumerate(shares(plan)):
        blocks = [(row, block) for row, some in rows for block in some]
        seen += blocks
        sizes.append(len(blocks))
        slots += [place(plan, program, begin, row) for row, some in rows if some]
    assert seen == [(row, block) for row, length in enumerate(lengths) for block in range(-(-length // 64))]
    assert len(set(slots)) == len(slots)
    assert max(sizes) == -(-len(seen) // programs)


@interpreted
@pytest.mark.parametrize("programs", [1, 3, 7, 40])
def test_join(programs: int) -> None:
    """A softmax in pieces is a softmax, whatever lies in slots that nobody wrote."""
    lengths = [700, 0, 1, 64, 130]
    logits = [9 * jax.random.normal(jax.random.key(n), (length, 8)) for n, length in enumerate(lengths)]
    values = [jax.random.normal(jax.random.key(9 + n), (length, 128)) for n, length in enumerate(lengths)]
    plan = schedule(-(-jnp.asarray(lengths, jnp.int32) // 64), programs)
    parts = programs + len(lengths)
    out, sums = np.full((parts, 128, 8), np.nan), np.full((parts, 2, 8), np.nan)
    for program, (begin, rows) in enumerate(shares(plan)):
        for row, blocks in rows:
            some = slice(blocks.start * 64, blocks.stop * 64)
            x = np.asarray(logits[row])[some] * np.log2(np.e)
            part = place(plan, program, begin, row)
            sums[part, 0] = x.max(0, initial=-1e30)
            weights = np.exp2(x - sums[part, 0])
            sums[part, 1], out[part] = weights.sum(0), np.asarray(values[row])[some].T @ weights
    found, lse = join(jnp.asarray(out, jnp.float32), jnp.asarray(sums, jnp.float32), plan, interpreter())
    for row, (x, v) in enumerate(zip(logits, values, strict=True)):
        if not len(x):
            assert not found[row].any() and (lse[row] == np.float32(-1e30)).all()
            continue
        np.testing.assert_allclose(lse[row], jax.nn.logsumexp(x, axis=0), rtol=1e-5)
        np.testing.assert_allclose(found[row], v.T @ jax.nn.softmax(x, axis=0), rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not old, reason="this JAX is new enough")
def test_refuses_old_versions() -> None:
    assert "or newer" in str(gpu.refuse(make(("bfloat16", "bfloat16"))))


@pytest.mark.skipif(old, reason="an old JAX is refused before anything else")
def test_refuses_with_the_reason() -> None:
    request = make(("bfloat16", "4-bit/32 channels"))
    assert gpu.refuse(request) is None
    exact = dataclasses.replace(request, q=request.q.astype(jnp.float32))
    for wrong, words in (
        (exact, "queries are float32"),
        (dataclasses.replace(request, v=None, latent=64), "latent"),
        (dataclasses.replace(request, logits=True), "logits"),
        (dataclasses.replace(request, k=Vectors(codes=jnp.zeros((B, H, S, 64)))), "k is stored as float32"),
        (make(("bfloat16", "int8"), 96), "k has 96 channels"),
        (make(("bfloat16", "int8"), slots=68), "68 slots"),
        (make(("bfloat16", "bfloat16"), slots=32), "fewer than a block"),
        (make(("bfloat16", "bfloat16"), 128, group=33), "33 query rows"),
        (make(("bfloat16", "bfloat16"), 128, group=17, bias=jnp.zeros((B, H, 17, S))), "17 query rows"),
        (make(("bfloat16", "4-bit/16 channels")), "among 16 channels"),
    ):
        assert words in str(gpu.refuse(wrong)), words
        with pytest.raises(ValueError, match=words):
            gpu.decode(wrong)
