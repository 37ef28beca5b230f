"""A plan as tables for people, and as JSON for programs."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from kvjax.sharding.plan.hlo import Collective
from kvjax.sharding.plan.planner import Planned
from kvjax.sharding.plan.roofline import Roofline
from kvjax.sharding.plan.suggest import show_mesh


def as_dict(planned: Planned) -> dict[str, Any]:
    """Everything, for `json.dumps`; bytes, seconds."""
    question, chip, memory = planned.question, planned.topology.chip, planned.memory

    def roofline(work: Roofline) -> dict[str, Any]:
        bound, seconds = work.bound(chip)
        return dataclasses.asdict(work) | {"seconds": work.seconds(chip), "bound": bound, "least_seconds": seconds}

    return {
        "model": question.model,
        "layers": planned.layers,
        "policy": question.written,
        "context": question.context,
        "batch": question.batch,
        "dtype": question.dtype,
        "topology": str(planned.topology),
        "devices": planned.topology.devices,
        "mesh": show_mesh(question.mesh),
        "chip": dataclasses.asdict(chip),
        "fits": planned.fits,
        "refused": planned.refused,
        "cache_bytes": planned.cache_bytes,
        "memory": dataclasses.asdict(memory) | {"total": memory.total},
        "decode": roofline(planned.decode),
        "collectives": [dataclasses.asdict(one) | {"sent": one.sent} for one in planned.collectives],
        "kernels": dict(planned.kernels),
        "prefill": roofline(planned.prefill)
        | {
            "peak": planned.peak,
            "collectives": [dataclasses.asdict(one) | {"sent": one.sent} for one in planned.prefill_collectives],
            "kernels": dict(planned.prefill_kernels),
        },
        "compiler": planned.compiler,
        "compiled_layers": list(planned.compiled),
        "compile_seconds": planned.seconds,
        "remarks": list(planned.remarks),
        "suggestions": list(planned.suggestions),
    }


def report(planned: Planned) -> Group:
    """Tables and sentences for a terminal."""
    question, topology = planned.question, planned.topology
    heading = (
        f"{question.model}, {question.written}: {question.batch} x {question.context:,} tokens on {topology} "
        f"({topology.devices} devices, {show_mesh(question.mesh)})"
    )
    parts: list[Any] = [Text(heading, style="bold"), Text(), _memory(planned), Text(_verdict(planned))]
    parts += [Text(), _times(planned)]
    for of, found in (("decode step", planned.collectives), ("prompts", planned.prefill_collectives)):
        if found:
            parts += [Text(), _collectives(of, found)]
    parts += [Text(line, style="dim") for line in _notes(planned)]
    if not planned.fits:
        heading = "What fits:" if planned.suggestions else "No mesh, budget or length fits."
        parts += [Text(), Text(heading, style="bold"), *(Text(f"  {line}") for line in planned.suggestions)]
    return Group(*parts)


def _memory(planned: Planned) -> Table:
    memory, table = planned.memory, _table("bytes on a device", "", "share")
    for name in ("params", "cache", "padding", "temporaries", "results", "code", "total", "limit"):
        value = getattr(memory, name)
        if value or name in ("params", "cache", "temporaries"):
            known = planned.compiled or name in ("params", "cache", "total", "limit")
            table.add_row(name, size(value) if known else "?", f"{value / memory.limit:.1%}" if known else "")
    return table


def _verdict(planned: Planned) -> str:
    memory = planned.memory
    if planned.refused:
        return f"Does not fit. {planned.refused}"
    if not memory.fits:
        return f"Does not fit: {size(memory.total - memory.limit)} too much."
    if planned.peak is None:
        return f"Fits: {size(memory.limit - memory.total)} of {size(memory.limit)} stay free while it decodes."
    most = max(planned.peak, memory.total)
    prompts = f"The prompts take {size(planned.peak)} at their peak, parameters and cache included."
    if most > memory.limit:
        return f"Does not fit: {size(most - memory.limit)} too much. {prompts}"
    return f"Fits: {size(memory.limit - most)} of {size(memory.limit)} stay free. {prompts}"


def _times(planned: Planned) -> Table:
    chip = planned.topology.chip
    table = _table("at least", "memory", "arithmetic", "links", "bound by", "")
    tokens = planned.question.batch
    for name, work in (("a decode step", planned.decode), ("the prompts", planned.prefill)):
        seconds, (bound, least) = work.seconds(chip), work.bound(chip)
        row = [duration(seconds[part]) if part in seconds else "?" for part in ("memory", "arithmetic", "links")]
        rate = f"{tokens / least:,.0f} tokens/s" if work is planned.decode else ""
        table.add_row(name, *row, bound, rate)
    return table


def _collectives(of: str, found: Sequence[Collective]) -> Table:
    table = _table(f"per {of}", "devices", "count", "bytes", "largest", "sent")
    for one in found:
        row = (str(one.devices), f"{one.count:,.0f}", size(one.bytes), size(one.largest), size(one.sent))
        table.add_row(one.kind, *row)
    return table


def _notes(planned: Planned) -> Iterator[str]:
    if planned.compiled:
        calls = (*planned.kernels, *planned.prefill_kernels)
        called = ", ".join(f"{name} {count:,.0f} times" for name, count in calls)
        yield f"Compiled in {planned.seconds:.1f} s by {planned.compiler}. Kernels: {called or 'none'}."
    chip = planned.topology.chip
    yield (
        f"Times are of published peaks ({chip.source}): {chip.bandwidth / 1e9:,.0f} GB/s of memory, "
        f"{chip.flops / 1e12:,.0f} TFLOP/s, {chip.link / 1e9:,.0f} GB/s to neighbours; no latency is counted."
    )
    yield from planned.remarks


def _table(*columns: str) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right", no_wrap=True)
    return table


def size(number: float) -> str:
    """1234567 -> "1.23 MB"."""
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if abs(number) >= unit:
            return f"{number / unit:.2f} {name}"
    return f"{number:.0f} B"


def duration(seconds: float) -> str:
    """0.00123 -> "1.23 ms"."""
    for unit, name in ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")):
        if seconds >= unit:
            return f"{seconds / unit:.2f} {name}"
    return f"{seconds / 1e-9:.0f} ns"
