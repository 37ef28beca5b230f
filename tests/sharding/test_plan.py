"""Plans: exact arithmetic, what is read from compiled programs, what is suggested, and how mistakes are told."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, PartitionSpec

from kvjax.sharding import plan
from kvjax.sharding.plan import compile, hlo
from kvjax.sharding.plan.abstract import device_bytes, extrapolate, sample
from kvjax.sharding.plan.planner import default_mesh

ROOT = Path(__file__).parents[2]
# As XLA for TPUs writes it, from a decode step on v5e:16x16: an all-gather that is spread over two fusions and runs
# once, groups by axes of a mesh, groups by iota, several arrays reduced at once, a kernel whose line is broken.
TPU = """HloModule jit_step, is_scheduled=true

%async_collective_fusion.1 (param_0.1516: s32[4,1,1,3332]) -> s32[4,1,1,106624] {
  %param_0.1516 = s32[4,1,1,3332]{0,2,1,3:T(1,128)S(1)} parameter(0)
  ROOT %all-gather.13 = s32[4,1,1,106624]{0,2,1,3:T(1,128)} all-gather(%param_0.1516), channel_id=20, \
replica_groups=[8,32]<=[32,8]T(1,0), dimensions={3}, use_global_device_ids=true, frontend_attributes={chain_id="0"}
}

%async_collective_fusion.2 (param_0.1520: s32[4,1,1,3332]) -> s32[4,1,1,106624] {
  %param_0.1520 = s32[4,1,1,3332]{0,2,1,3:T(1,128)S(1)} parameter(0)
  ROOT %all-gather.15 = s32[4,1,1,106624]{0,2,1,3:T(1,128)S(1)} all-gather(%param_0.1520), channel_id=20, \
replica_groups=[8,32]<=[32,8]T(1,0), dimensions={3}, use_global_device_ids=true, frontend_attributes={chain_id="0"}
}

%fused_computation.56 (param_0.142: s32[4], param_1.613: s32[4,8,1]) -> (f32[4,1,1,8,128], f32[4,1,1,8,1]) {
  %param_0.142 = s32[4]{0:T(128)S(1)} parameter(0)
  %param_1.613 = s32[4,8,1]{2,1,0:T(8,128)S(1)} parameter(1)
  ROOT %kvjax_decode.4 = (f32[4,1,1,8,128]{4,3,2,1,0:T(8,128)S(1)}, f32[4,1,1,8,1]{4,3,2,1,0:T(8,128)S(1)}) \
custom-call(%param_0.142, %param_1.613), custom_call_target="tpu_custom_call", backend_config={"cost_estimate": {
"bytes_accessed":1548336,
"flops":54525952,
}
}

ENTRY %main.42_spmd (param: s32[4,1,1,3332]) -> bf16[4,1,4096] {
  %param = s32[4,1,1,3332]{0,2,1,3:T(1,128)S(1)} parameter(0)
  %fusion.1 = s32[4,1,1,106624]{0,2,1,3:T(1,128)} fusion(%param), kind=kOutput, calls=%async_collective_fusion.1
  %fusion.2 = s32[4,1,1,106624]{0,2,1,3:T(1,128)} fusion(%param), kind=kOutput, calls=%async_collective_fusion.2
  %fusion.3 = (f32[4,1,1,8,128]{4,3,2,1,0}, f32[4,1,1,8,1]{4,3,2,1,0}) fusion(%param), calls=%fused_computation.56
  %all-reduce.16 = (s32[4]{0:T(128)S(1)}, /*index=1*/s32[4]{0:T(128)S(1)}) all-reduce(%param, %param), channel_id=9, \
replica_groups=mesh['axis_0'=1,'axis_1'=8,'axis_2'=1,'axis_3'=32], device_ids=([32,8]T(1,0)) {'axis_1','axis_2'}, \
use_global_device_ids=true, to_apply=%region_1.2.clone
  %pmax.14 = f32[4,1,4]{2,0,1:T(4,128)S(1)} all-reduce(%param), channel_id=1, \
replica_groups={{0,8,16,24},{1,9,17,25}}, use_global_device_ids=true, to_apply=%region_1.2.clone
  ROOT %all-reduce.5 = bf16[4,1,4096]{2,0,1:T(4,128)(2,1)S(1)} all-reduce(%param), channel_id=8, \
replica_groups=mesh['axis_0'=8,'axis_1'=1,'axis_2'=32], device_ids=([32,8]T(1,0)) {'axis_0'}, to_apply=%add.6.clone
}
"""


def ask(**changes):
    asked = {
        "model": "llama3.1-8b",
        "policy": "full",
        "context": 2**20,
        "batch": 4,
        "topology": "v5e:16x16",
        "mesh": "seq=32,model=8",
    }
    return plan.ask(**(asked | changes))


def test_bytes_of_parameters_and_cache_are_exact():
    question, place = ask()
    planned = plan.answer(question, place, arithmetic=True)
    hidden, mlp, kv, vocab = 4096, 14336, 1024, 128256
    matrices = 32 * (2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * mlp) + 2 * vocab * hidden
    assert planned.memory.params == 2 * matrices // 8 + 2 * 65 * hidden
    slots = question.program().cache.layers[0].capacity
    assert 2**20 < slots <= 2**20 * 1.04 and slots % 32 == 0
    # Keys and values lie along both axes, positions along slots alone.
    assert planned.memory.cache == 32 * (2 * 2 * 4 * slots * 128 + 4 * 4 * slots) // 32 + 4 * 4
    assert planned.fits and planned.memory.total == planned.memory.params + planned.memory.cache


def test_roofline_follows_from_bytes_and_operations():
    question, place = ask()
    work = plan.answer(question, place, arithmetic=True).decode
    program = question.program()
    embedding = device_bytes(program.params["embed"])
    assert work.bytes == device_bytes((program.params, program.cache)) - embedding
    products = 2 * 4 * sum(math.prod(x.shape) for x in jax.tree.leaves(program.params) if len(x.shape) > 1) / 8
    attention = 4 * 128 * 32 * 32 * 4 * 2**20 / 256
    # Positions, which are not divided by heads, make the cache's share of a device a little larger than 1 / 256.
    assert products - 2 * 4 * embedding / 2 + attention == pytest.approx(work.flops, rel=0.03)
    assert work.bound(place.chip) == ("memory", work.bytes / 819e9)


def test_a_smaller_cache_is_planned_for_a_policy():
    full, fewer = (plan.answer(*ask(policy=name), arithmetic=True) for name in ("full", "snapkv(0.1) | kivi(bits=2)"))
    assert fewer.memory.params == full.memory.params
    assert fewer.cache_bytes < full.cache_bytes / 30
    assert fewer.decode.flops < full.decode.flops


def test_what_does_not_fit_gets_suggestions_that_fit():
    asked = {"topology": "v5e:2x2", "batch": 1, "context": 2**17}
    planned = plan.answer(*ask(**asked, mesh="seq=4"), arithmetic=True)
    assert not planned.fits
    mesh = next(line for line in planned.suggestions if line.startswith("--mesh")).split()[1]
    assert mesh == "seq=2,model=2"  # The nearest.
    assert plan.answer(*ask(**asked, mesh=mesh), arithmetic=True).fits


def test_suggested_budgets_and_contexts_fit_and_larger_ones_do_not():
    asked = {"topology": "v5e:2x2", "mesh": "model=4", "batch": 1}
    planned = plan.answer(*ask(**asked), arithmetic=True)
    assert not planned.fits
    line = next(line for line in planned.suggestions if line.startswith("--policy"))
    policy = line.split('"')[1]
    share = float(policy[len("snapkv(") : -1])

    def fits(policy: str) -> bool:
        return plan.answer(*ask(**asked, policy=policy), arithmetic=True).fits

    assert fits(policy) and not fits(f"snapkv({share * 1.1:.4f})")
    context = int(next(line for line in planned.suggestions if line.startswith("--context")).split()[1])
    fitting = plan.answer(*ask(**asked, context=context), arithmetic=True)
    assert fitting.fits and not plan.answer(*ask(**asked, context=2 * context), arithmetic=True).fits


def test_budgets_are_lowered_where_there_is_one():
    planned = plan.answer(*ask(policy="h2o(0.9)", topology="v5e:2x2", mesh="model=4", batch=1), arithmetic=True)
    line = next(line for line in planned.suggestions if line.startswith("a budget of"))
    share = float(line.split()[3])
    assert share < 0.9
    small = ask(policy=f"h2o({share})", topology="v5e:2x2", mesh="model=4", batch=1)
    assert plan.answer(*small, arithmetic=True).fits


def test_layers_that_tell_of_the_rest():
    assert sample(("a",) * 32) == (3, 6)
    assert sample(("a",) * 6) == (6,)
    assert sample(("s", "s", "s", "s", "s", "f") * 8) == (6, 12)
    kinds = (("s",) * 5 + ("f",)) * 10 + ("s", "s")
    low, high = sample(kinds)
    assert (low, high) == (8, 14)
    # Of every kind as many as there are: what one costs may differ.
    cost = {"s": 3.0, "f": 10.0}
    total = [sum(cost[kind] for kind in kinds[:n]) for n in (low, high, len(kinds))]
    assert extrapolate(total[0], total[1], (low, high), len(kinds)) == total[2]
    assert sample(("a",) * 16 + ("b",) * 16) == (32,)


def test_collectives_of_a_program_for_tpus():
    found = {(one.kind, one.devices): one for one in hlo.collectives(TPU, 256)}
    assert found["all-gather", 32] == hlo.Collective("all-gather", 32, 1, 4 * 4 * 106624, 4 * 4 * 106624)
    reduced = found["all-reduce", 8]
    assert (reduced.count, reduced.bytes, reduced.largest) == (2, 32 + 2 * 4 * 4096, 2 * 4 * 4096)
    assert reduced.sent == reduced.bytes * 2 * 7 / 8
    assert found["all-reduce", 4].bytes == 4 * 16
    assert len(found) == 3 and hlo.kernels(TPU) == {"kvjax_decode": 1}


def test_collectives_of_a_program_compiled_here():
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    apart, along = PartitionSpec("a", "b"), PartitionSpec("a")

    def f(x):
        def body(x, _):
            return jax.lax.ppermute(jax.lax.psum(x, "b"), "a", [(0, 1), (1, 0)]) * 0.5, None

        x, _ = jax.lax.scan(body, x, length=5)
        gathered = jax.lax.all_gather(x, ("a", "b"), axis=0, tiled=True).sum(0, keepdims=True)
        scattered = jax.lax.psum_scatter(x, "b", scatter_dimension=1, tiled=True)
        return x, gathered, scattered, jax.lax.all_to_all(x, "b", 1, 0, tiled=True)

    specs = (along, PartitionSpec(("a", "b")), apart, apart)
    step = jax.jit(jax.shard_map(f, mesh=mesh, in_specs=along, out_specs=specs, check_vma=False))
    compiled = step.lower(jax.ShapeDtypeStruct((16, 64), jnp.float32)).compile()
    local = 8 * 64 * 4  # Bytes on a device.
    assert {(one.kind, one.devices, one.count, one.bytes) for one in hlo.collectives(compiled.as_text() or "", 8)} == {
        ("all-reduce", 4, 5, 5 * local),
        ("collective-permute", 2, 5, 5 * local),
        ("all-gather", 8, 1, 8 * local),
        ("reduce-scatter", 4, 1, local),
        ("all-to-all", 4, 1, local),
    }


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model": "llama3-8b"}, "llama3.1-8b"),
        ({"policy": "snapvk(0.1)"}, "snapkv"),
        ({"topology": "v5x:16x16"}, "v5e"),
        ({"topology": "v5e:4x4x4"}, "2 positive dimension"),
        ({"topology": "v5e:32x32"}, "at most 256"),
        ({"mesh": "seq=16,model=8"}, "takes 128 devices and v5e:16x16 has 256.*seq=32,model=8"),
        ({"mesh": "seq=2,heads=128"}, "data, seq, model"),
        ({"mesh": "model=256"}, "do not divide over model=256"),
        ({"mesh": "data=32,model=8"}, "4 rows does not divide over data=32"),
        ({"batch": 0}, "at least 1"),
        ({"policy": "snapkv(16)"}, "needs at least"),
    ],
)
def test_mistakes_are_told_before_anything_is_compiled(changes, says):
    with pytest.raises(ValueError, match=says):
        ask(**changes)


def test_numbers():
    assert plan.parse_number("--context", "1M") == 2**20
    assert plan.parse_number("--context", "128k") == 2**17
    assert plan.parse_number("--context", "1000") == 1000
    for wrong in ("", "many", "1.5", "-3"):
        with pytest.raises(plan.PlanError, match="--context"):
            plan.parse_number("--context", wrong)


def test_default_meshes():
    config = ask()[0].config
    assert [default_mesh(config, n) for n in (1, 4, 256)] == ["seq=1,model=1", "seq=1,model=4", "seq=32,model=8"]


def test_what_is_not_exact_is_said():
    question, place = ask(policy="cake(0.1)")
    remarks = " ".join(plan.answer(question, place, arithmetic=True).remarks)
    assert "beyond the model's context of 131,072" in remarks and "divides its budget" in remarks


def test_compilers_that_die_are_told_in_a_sentence(monkeypatch):
    # The interpreter itself says no: the process ends without an answer.
    monkeypatch.setitem(compile.ENVIRONMENT, "JAX_PLATFORMS", "no_such_platform")
    monkeypatch.setitem(compile.ENVIRONMENT, "PYTHONHOME", "/nowhere")
    with pytest.raises(plan.CompileError, match="The compiler's process ended with 1; the last it said"):
        compile.compiled({})


def command(*args: str, folder: Path) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200", "JAX_PLATFORMS": "cpu"}
    return subprocess.run(
        [sys.executable, "-m", "kvjax", "plan", *args], cwd=folder, env=environment, capture_output=True, text=True
    )


@pytest.mark.slow
def test_command(tmp_path):
    done = command("--context", "1M", "--topology", "h200:8", "--json", "plan.json", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "warning: 1,048,576 tokens are beyond the 131,072" in done.stderr
    assert "no compiler for h200" in done.stdout and "Fits" in done.stdout
    found = json.loads((tmp_path / "plan.json").read_text())
    assert found["fits"] and found["mesh"] == "model=8" and found["decode"]["bound"] == "memory"
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]

    done = command("--context", "1M", "--topology", "v5e:1x1", "--arithmetic", "--json", "-", folder=tmp_path)
    assert done.returncode == 1
    assert json.loads(done.stdout)["suggestions"]

    done = command("--model", "lama3.1-8b", folder=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and "Did you mean llama3.1-8b" in done.stderr
    assert "Traceback" not in done.stderr
