"""The TPU kernels of prefill attention, interpreted, against the definition in NumPy float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from kvjax.kernels.prefill import ColumnSums, Statistics, prefill_attention, tpu
from kvjax.kernels.prefill.blocks import Tiles, make_tables
from kvjax.kernels.prefill.request import make_request
from kvjax.kernels.prefill.xla import prefill as blockwise
from tests.kernels.prefill_cases import EVERY_SUM, Case, check, draw

FORWARD = Statistics(lse=True, entropy=True)
SUMS = Statistics(lse=True, column_sums=(ColumnSums(), ColumnSums(forgetting=0.95, window=40, normalized=True)))
CASES = {
    "shorter than a tile": Case(13, (13, 6), statistics=SUMS),
    "ragged ends": Case(300, (300, 170), group=1, statistics=FORWARD),
    "128 channels": Case(300, (300, 300), dim=128, group=3, kv_heads=1, statistics=SUMS),
    "256 channels, values of 64": Case(140, (140, 129), dim=256, value_dim=64, kv_heads=1, statistics=SUMS),
    "window, soft-cap": Case(520, (520, 300), window=50, softcap=4.0, kv_heads=1, statistics=SUMS),
    "packed": Case(400, (400, 330), packed=(100, 30, 190, 80), kv_heads=1, statistics=SUMS),
    "past by head, window": Case(140, (140, 1), past=150, by_head=True, window=60, statistics=FORWARD),
    "past": Case(140, (140, 100), past=150, kv_heads=1, statistics=SUMS),
    "every kind of sum": Case(40, (40, 13), kv_heads=1, group=1, packed=(15, 25), statistics=EVERY_SUM),
    "bfloat16": Case(200, (200, 120), dim=128, kv_heads=1, past=40, dtype="bfloat16", statistics=FORWARD),
}


def run(case: Case, interpret=True, **options):
    args, keywords = draw(case)
    arrays = {name: keywords.pop(name) for name in ("past", "segments")}

    def prefill(args, arrays):
        return tpu.prefill(make_request(*args, **keywords, **arrays), interpret=interpret, **options)

    return jax.jit(prefill)(args, arrays)


@pytest.mark.parametrize("name", CASES)
def test_against_numpy(name):
    case = CASES[name]
    check(run(case, block=128, keys=128), case, out_tolerance=0.02 if case.dtype == "bfloat16" else None)


@pytest.mark.parametrize("length, group", [(300, 2), (520, 1)])
def test_default_blocks(length, group):
    """Blocks of three tiles, and of four: queries in turn by one or two."""
    case = Case(length, (length, 170), group=group, kv_heads=1, statistics=FORWARD)
    check(run(case), case)


def test_no_races(capfd):
    """Uninitialised memory is NaN here, and two cores share the parallel axes."""
    case = Case(200, (200, 120), group=1, kv_heads=1, window=100, statistics=SUMS)
    params = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2)
    check(run(case, params, block=128, keys=128), case)
    assert "RACE DETECTED" not in capfd.readouterr().out


def test_by_name():
    """Named on another machine, the kernel is interpreted; its gradient is that of the blockwise definition."""
    (q, k, v, pos), keywords = draw(Case(30, (30, 30), group=1, kv_heads=1, statistics=Statistics()))

    def loss(values, implementation):
        return (prefill_attention(*values, pos, **keywords, implementation=implementation).out ** 2).sum()

    (got, mine), (want, theirs) = (
        jax.jit(functools.partial(jax.value_and_grad(loss), implementation=name))((q, k, v)) for name in ("tpu", "xla")
    )
    np.testing.assert_allclose(got, want, rtol=1e-5)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-4), mine, theirs)


def test_blocks_that_see_nothing_are_left_out():
    """Steps stay within the window, and tables name no block beyond what is visible."""
    length, window, tiles = 2048, 100, Tiles(heads=1, queries=256, keys=128)
    pos = jnp.arange(length, dtype=jnp.int32)[None]
    place = jnp.where(pos < 1100, pos, -1)
    tables = make_tables(jnp.maximum(place - window + 1, 0), place, place[:, None], tiles)
    assert tables.first.tolist() == [0, 1, 3, 5, 7, 0, 0, 0]
    assert tables.last.tolist() == [1, 3, 5, 7, 8, -1, -1, -1]
    by_keys = make_tables(jnp.zeros_like(place), place, place[:, None], tiles, counted=place >= 1000)
    assert by_keys.first.tolist() == [3] * 8 + [4] + [0] * 7
    assert by_keys.last.tolist() == [4] * 9 + [-1] * 7
    assert tpu._steps(window, 256, 128, 16) == 4
    assert tpu._steps(0, 256, 128, 16) == 16


@pytest.mark.tpu
@pytest.mark.skipif(jax.default_backend() != "tpu", reason="needs a TPU")
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_on_hardware(dim):
    rng = np.random.default_rng(0)
    shape = lambda heads: jnp.asarray(rng.normal(size=(2, heads, 2048, dim)), jnp.bfloat16)  # noqa: E731
    pos = jnp.arange(2048, dtype=jnp.int32)
    pos = jnp.stack([pos, jnp.where(pos < 1500, pos, -1)])
    request = make_request(shape(8), shape(2), shape(2), pos, scale=dim**-0.5, statistics=SUMS)
    got, want = jax.jit(tpu.prefill)(request), jax.jit(blockwise)(request)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a.astype(jnp.float32), b.astype(jnp.float32), atol=0.05, rtol=0.02)
