"""The Hopper kernels of prefill attention, interpreted, against the definition in NumPy float64."""

import functools

import jax
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from kvjax.kernels.choose import KernelError
from kvjax.kernels.hopper import interpreter
from kvjax.kernels.prefill import ColumnSums, Statistics, gpu, prefill_attention
from kvjax.kernels.prefill.request import make_request
from tests.kernels.prefill_cases import Case, check, draw

interpreted = pytest.mark.skipif(
    not hasattr(plgpu, "InterpretGPUParams"), reason="the interpreter of this JAX cannot read transposed tiles"
)
FORWARD = Statistics(lse=True, entropy=True)
SUMS = Statistics(lse=True, column_sums=(ColumnSums(), ColumnSums(forgetting=0.95, window=40, normalized=True)))
bf16 = functools.partial(Case, dtype="bfloat16", kv_heads=1)
CASES = {
    "shorter than a block": bf16(13, (13, 6), statistics=SUMS),
    "ragged ends": bf16(200, (200, 120), group=1, statistics=FORWARD),
    "128 channels, window, soft-cap": bf16(200, (200, 120), dim=128, window=50, softcap=4.0, statistics=SUMS),
    "256 channels, values of 64": bf16(140, (140, 129), dim=256, value_dim=64, statistics=FORWARD),
    "values of 256": bf16(100, (100, 70), value_dim=256, group=1, statistics=FORWARD),
    "packed": bf16(200, (200, 165), packed=(50, 15, 95, 40), statistics=SUMS),
    "past by head": Case(100, (100, 1), past=128, by_head=True, dtype="bfloat16", statistics=SUMS),
}


def run(case: Case, **options):
    args, keywords = draw(case)
    arrays = {name: keywords.pop(name) for name in ("past", "segments")}

    def prefill(args, arrays):
        return gpu.prefill(make_request(*args, **keywords, **arrays), interpret=interpreter(**options))

    return jax.jit(prefill)(args, arrays)


@interpreted
@pytest.mark.parametrize("name", CASES)
def test_against_numpy(name):
    # Weights are rounded to bfloat16 before they meet values; statistics are not.
    check(run(CASES[name]), CASES[name], out_tolerance=0.02)


@interpreted
def test_no_races(capfd):
    case = bf16(130, (130, 120), group=1, window=100, statistics=SUMS)
    check(run(case, detect_races=True), case, out_tolerance=0.02)
    assert "RACE DETECTED" not in capfd.readouterr().out


def test_what_is_refused():
    def ask(case: Case):
        args, keywords = draw(case)
        return prefill_attention(*args, **keywords, implementation="gpu")

    with pytest.raises(KernelError, match="bfloat16 keys and values, not float32: cast them first"):
        ask(Case(13, (13, 6)))
    with pytest.raises(KernelError, match="64, 128, 192 or 256 channels, not 80 and 64"):
        ask(bf16(13, (13, 6), dim=80, value_dim=64))
    with pytest.raises(KernelError, match="a past of a multiple of 64 slots, not 30"):
        ask(bf16(13, (13, 6), past=30))
