"""Prefill attention and its statistics: the reference and the blocks of XLA against a softmax in NumPy float64."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.cache import EMPTY
from kvjax.kernels.choose import KernelError
from kvjax.kernels.parts import masked_softmax, visible
from kvjax.kernels.prefill import ColumnSums, Past, Statistics, causal_attention, explain, prefill_attention
from kvjax.kernels.prefill.request import make_request
from tests.kernels.prefill_cases import ALL, EVERY_SUM, Case, check, draw

SUMS = Statistics(column_sums=(ColumnSums(),))
CASES = {
    # Case, queries of a block
    "one token": (Case(1, (1, 1)), None),
    "one block": (Case(13, (13, 6)), None),
    "blocks that do not divide the length": (Case(13, (13, 6)), 4),
    "eight groups of one block, soft-cap": (Case(32, (32, 17), softcap=5.0, statistics=SUMS), 4),
    "groups of several blocks": (Case(70, (70, 1), statistics=SUMS), 4),
    "a row without tokens": (Case(9, (9, 0)), 4),
    "window": (Case(13, (13, 6), window=4), None),
    "window of a block": (Case(32, (32, 17), window=8), 8),
    "keys cut at both ends": (Case(37, (37, 20), window=5, softcap=3.0), 8),
    "window of one": (Case(37, (37, 20), window=1), 8),
    "window that hides nothing": (Case(37, (37, 20), window=100, statistics=SUMS), 8),
    "packed": (Case(40, (40, 33), packed=(11, 2, 20, 7)), 8),
    "packed, window": (Case(40, (40, 33), packed=(11, 2, 20, 7), window=5), 8),
    "past": (Case(20, (20, 11), past=23), 8),
    "past by head, window, soft-cap": (Case(20, (20, 11), past=23, by_head=True, window=9, softcap=4.0), 8),
    "values of their own size, one KV head": (Case(20, (20, 11), dim=128, value_dim=48, kv_heads=1, group=3), 8),
    "256 channels, all heads apart": (Case(20, (20, 11), dim=256, kv_heads=3, group=1, past=5), 8),
    "every kind of sum": (Case(20, (20, 11), packed=(5, 15), statistics=EVERY_SUM), None),
    "bfloat16": (Case(40, (40, 33), dtype="bfloat16", past=12, window=20), 32),
}


def call(*args, segments=None, past=None, **keywords):
    """`prefill_attention`, compiled."""
    return jax.jit(functools.partial(prefill_attention, **keywords))(*args, segments=segments, past=past)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("name", CASES)
def test_against_numpy(name, implementation):
    case, block = CASES[name]
    rounded = case.dtype == "bfloat16"
    args, keywords = draw(case)
    got = call(*args, **keywords, implementation=implementation, block=block)
    check(got, case, out_tolerance=0.02 if rounded else None)


def test_only_what_is_asked_for():
    args, keywords = draw(Case(13, (13, 6)))
    full = call(*args, **keywords)
    bare = call(*args, **keywords | {"statistics": Statistics()})
    assert jax.tree.leaves(bare) == [bare.out]
    np.testing.assert_array_equal(bare.out, full.out)
    for name in ("lse", "entropy", "window"):
        asked = {name: getattr(ALL, name)}
        got = call(*args, **keywords | {"statistics": Statistics(**asked)})
        assert len(jax.tree.leaves(got)) == 2
        np.testing.assert_allclose(getattr(got, name), getattr(full, name), atol=1e-6)


def test_chunks_are_the_whole():
    """A prompt in two chunks, the second with the first as its past, says what the whole prompt says."""
    (q, k, v, pos), keywords = draw(Case(30, (30, 30)))
    asked = Statistics(lse=True, entropy=True, column_sums=(ColumnSums(),))
    keywords, cut = keywords | {"statistics": asked}, 17
    whole = call(q, k, v, pos, **keywords)
    first = call(*(x[:, :, :cut] for x in (q, k, v)), pos[:, :cut], **keywords)
    past = Past(k=k[:, :, :cut], v=v[:, :, :cut], pos=pos[:, None, :cut])
    second = call(*(x[:, :, cut:] for x in (q, k, v)), pos[:, cut:], **keywords | {"past": past})
    for name in ("out", "lse", "entropy"):
        joined = jnp.concatenate([getattr(first, name), getattr(second, name)], 2)
        np.testing.assert_allclose(joined, getattr(whole, name), atol=2e-5)
    sums = second.column_sums[0].at[..., :cut].add(first.column_sums[0])
    np.testing.assert_allclose(sums, whole.column_sums[0], atol=2e-5)


def test_packed_prompts_are_prompts():
    """Two prompts in one row say what each says alone, statistics included."""
    (q, k, v, _), keywords = draw(Case(30, (30, 30)))
    asked = dataclasses.replace(ALL, window=0)
    keywords = {"scale": keywords["scale"], "statistics": asked}
    sizes = (12, 18)
    pos = jnp.tile(jnp.concatenate([jnp.arange(n) for n in sizes]), (2, 1))
    segments = jnp.tile(jnp.repeat(jnp.arange(2), np.array(sizes)), (2, 1))
    packed = call(q, k, v, pos, **keywords, segments=segments)
    alone = [call(*(x[:, :, a:b] for x in (q, k, v)), pos[:, a:b], **keywords) for a, b in ((0, 12), (12, 30))]
    together = jax.tree.map(lambda a, b: jnp.concatenate([a, b], 2), *alone)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), packed, together)


def test_memory_grows_with_the_length():
    """Twice the tokens take about twice the memory: nothing of [T, T] is whole, whatever is asked for."""

    def temp(length: int, past: int, asked: Statistics) -> int:
        shape = lambda *dims: jax.ShapeDtypeStruct(dims, jnp.float32)  # noqa: E731
        ints = lambda *dims: jax.ShapeDtypeStruct(dims, jnp.int32)  # noqa: E731
        k = shape(1, 1, length, 16)
        old = Past(k=shape(1, 1, past, 16), v=shape(1, 1, past, 16), pos=ints(1, 1, past)) if past else None
        attend = functools.partial(prefill_attention, scale=1.0, implementation="xla", statistics=asked, block=64)
        compiled = jax.jit(attend).lower(shape(1, 2, length, 16), k, k, ints(1, length), past=old).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    most = Statistics(lse=True, entropy=True, column_sums=(ColumnSums(), ColumnSums(normalized=True)), window=16)
    for asked, past in ((Statistics(), 0), (most, 1)):
        small, large = (temp(n, n * past, asked) for n in (1024, 2048))
        assert large < 2.2 * small
        assert large < 2048 * 2048 * 4


def test_gradient():
    """Through blocks and through the definition."""
    args, keywords = draw(Case(20, (20, 20), dim=16))
    keywords |= {"statistics": Statistics(entropy=True)}

    def loss(q, implementation):
        seen = call(q, *args[1:], **keywords, implementation=implementation, block=10)
        return (seen.out**2).sum() + seen.entropy.sum()

    np.testing.assert_allclose(*(jax.grad(loss)(args[0], name) for name in ("xla", "reference")), atol=1e-4)


def test_causal_attention_is_a_short_form():
    args, keywords = draw(Case(37, (37, 20), window=5))
    keywords = {name: keywords[name] for name in ("scale", "window", "softcap")}
    out, sums = causal_attention(*args, **keywords, column_sums=True, block=8)
    alone, nothing = causal_attention(*args, **keywords, block=8)
    full = call(*args, **keywords, statistics=SUMS, block=8)
    assert nothing is None
    np.testing.assert_array_equal(out, full.out)
    np.testing.assert_array_equal(out, alone)
    np.testing.assert_array_equal(sums, full.column_sums[0])


def test_what_is_refused():
    (q, k, v, pos), keywords = draw(Case(13, (13, 6), past=4))
    with pytest.raises(KernelError, match="either segments or a past"):
        prefill_attention(q, k, v, pos, **keywords | {"segments": pos})
    del keywords["past"]
    with pytest.raises(KernelError, match=r"\[B, H, T, D\] for queries"):
        prefill_attention(q, k[..., :8], v, pos, **keywords)
    with pytest.raises(KernelError, match=r"\[2, 13\], got \(2, 12\)"):
        prefill_attention(q, k, v, pos[:, 1:], **keywords)
    with pytest.raises(KernelError, match="channels and positions|keys and values"):
        past = Past(k=k, v=v, pos=pos[:, None, 1:])
        prefill_attention(q, k, v, pos, **keywords | {"past": past})
    with pytest.raises(KernelError, match="multiple of 16 channels, not 40 and 64"):
        prefill_attention(q[..., :40], k[..., :40], v, pos, **keywords, implementation="tpu")
    with pytest.raises(KernelError, match="not float16: cast them first. implementation='xla' can"):
        half = [x.astype(jnp.float16) for x in (q, k, v)]
        prefill_attention(*half, pos, **keywords, implementation="tpu")
    with pytest.raises(KernelError, match="one of auto, xla, reference, tpu, gpu, got 'cuda'"):
        prefill_attention(q, k, v, pos, **keywords, implementation="cuda")
    request = make_request(q, k, v, pos, **keywords)
    assert (explain(request).implementation, explain(request, "tpu").implementation) == ("xla", "tpu")
    with pytest.raises(ValueError, match="at most 1, got 1.5"):
        ColumnSums(forgetting=1.5)
    with pytest.raises(ValueError, match="got -3"):
        ColumnSums(window=-3)


def test_visible():
    q_pos, k_pos = np.array([2, EMPTY, 5]), np.array([0, 2, 4, EMPTY, 6])
    assert np.asarray(visible(q_pos, k_pos)).tolist() == [
        [True, True] + [False] * 3,
        [False] * 5,
        [True] * 3 + [False] * 2,
    ]
    assert np.asarray(visible(q_pos, k_pos, 2)).tolist() == [
        [False, True] + [False] * 3,
        [False] * 5,
        [False, False, True] + [False] * 2,
    ]


def test_a_row_that_sees_nothing_is_zero():
    weights = masked_softmax(jnp.array([[1.0, 2.0], [3.0, jnp.nan]]), jnp.array([[False, False], [True, False]]))
    assert np.asarray(weights).tolist() == [[0.0, 0.0], [1.0, 0.0]]
