"""Decode steps and prompts of whole pods compile with the default kernels, and caches stay where they are."""

import importlib.util

import pytest

from kvjax.sharding import plan

needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs pip install libtpu")
GB = 10**9


CONTEXT, BATCH = 2**20, 4


def planned(model: str, policy: str, topology: str, mesh: str, prefill: bool) -> plan.Planned:
    question, place = plan.ask(model, policy, CONTEXT, BATCH, topology, mesh)
    return plan.answer(question, place, prefill=prefill)


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize(
    ("model", "policy", "topology", "mesh", "at_most"),
    [
        ("llama3.1-8b", "full", "v5e:16x16", "seq=32,model=8", 4.4 * GB),
        ("llama3.1-8b", "full", "v5p:4x4x4", "seq=8,model=8", 10.9 * GB),
        ("llama3.1-70b", "full", "v5p:4x4x4", "seq=8,model=8", 40 * GB),
        ("llama3.1-8b", "snapkv(0.1) | kivi(bits=2)", "v5e:16x16", "seq=32,model=8", 2.4 * GB),
    ],
)
def test_a_million_tokens(model, policy, topology, mesh, at_most):
    found = planned(model, policy, topology, mesh, prefill=policy == "full")
    memory, layers = found.memory, found.layers
    assert found.fits and memory.total <= at_most
    # What the compiler takes for its arguments is what shapes and shardings say.
    assert 0 <= memory.padding <= 0.01 * (memory.params + memory.cache)
    # No temporary is of the size of a layer's cache.
    assert memory.temporaries / layers <= 0.1 * max(memory.cache, 0.05 * memory.params) / layers + 4e6
    assert dict(found.kernels)["kvjax_decode"] == layers
    # Per layer, two reductions of the queries' size and two of the hidden states; nothing is gathered.
    assert {one.kind for one in found.collectives} == {"all-reduce"}
    assert sum(one.count for one in found.collectives) <= 5 * layers + 8
    assert max(one.largest for one in found.collectives) <= 2**20
    if policy == "full":
        check_prompts(found)


def check_prompts(found: plan.Planned) -> None:
    """A layer at a time: what it works on is a few times the hidden states of a device's own tokens."""
    question, memory = found.question, found.memory
    hidden = CONTEXT * BATCH // question.mesh["seq"] * question.config.hidden_size * 2
    assert found.working is not None and hidden < found.working <= 5 * hidden
    assert found.peak == memory.params + memory.cache + found.working <= memory.limit
    assert dict(found.prefill_kernels)["prefill_flash"] >= found.layers
    # Keys and values go from neighbour to neighbour, one device's part at a time; nothing is gathered.
    sent = {one.kind: one.largest for one in found.prefill_collectives}
    assert set(sent) == {"all-reduce", "collective-permute"}
    assert sent["collective-permute"] <= 2 * memory.cache / found.layers
    assert sent["all-reduce"] <= hidden


@pytest.mark.slow
@needs_libtpu
def test_prompts_go_around_a_ring_layer_by_layer():
    question, place = plan.ask("gemma3-4b", "snapkv(0.25)", 2**15, 1, "v5e:2x2", "seq=2,model=2")
    found = plan.answer(question, place, prefill=True)
    memory, calls = found.memory, dict(found.prefill_kernels)
    assert found.fits and found.peak is not None
    # What a layer works on is a few times the hidden states and keys of its tokens, not all layers' keys.
    hidden = 2**15 // 2 * 2560 * 2
    assert memory.params + memory.cache + 2 * hidden < found.peak < memory.params + memory.cache + 30 * hidden
    assert calls["prefill_flash"] >= found.layers
    assert "collective-permute" in {one.kind for one in found.prefill_collectives}
    assert found.prefill.bound(place.chip)[0] == "arithmetic"


@pytest.mark.slow
@needs_libtpu
def test_topologies_that_do_not_exist_are_told():
    question, place = plan.ask("llama3.1-8b", "full", 1024, 1, "v5e:3x3", "seq=9")
    with pytest.raises(plan.CompileError, match="libtpu knows no topology v5e:3x3"):
        plan.answer(question, place)
