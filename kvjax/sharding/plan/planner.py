"""From a question to its answer: everything that can be wrong is said before anything is compiled."""

import dataclasses
import math
from typing import Any

from kvjax.cache.types import tree_nbytes
from kvjax.models.config import Config
from kvjax.models.shapes import model_config
from kvjax.policies.registry import parse_policy
from kvjax.sharding.mesh import parse_mesh
from kvjax.sharding.plan.abstract import Program, device_bytes, extrapolate, sample
from kvjax.sharding.plan.chips import PlanError, Topology, parse_topology
from kvjax.sharding.plan.compile import CompileError, compiled, why_not
from kvjax.sharding.plan.hlo import Collective
from kvjax.sharding.plan.roofline import Roofline, decode_work, prefill_work
from kvjax.sharding.plan.suggest import Question, suggestions

UNITS = {"k": 2**10, "m": 2**20}


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device.

    Attributes:
      params, cache: Exact, from shapes and shardings.
      padding: What the compiler adds to them so that they fill its tiles.
      temporaries: What a step takes besides. results: Logits. code: The program.
      limit: What there is.
    """

    params: int
    cache: int
    limit: int
    padding: int = 0
    temporaries: int = 0
    results: int = 0
    code: int = 0

    @property
    def total(self) -> int:
        return self.params + self.cache + self.padding + self.temporaries + self.results + self.code

    @property
    def fits(self) -> bool:
        return self.total <= self.limit


@dataclasses.dataclass(frozen=True)
class Planned:
    """The answer.

    Attributes:
      question: What was asked. topology: Where.
      layers: Of the model; compiled: numbers of layers that were compiled, () if nothing was.
      cache_bytes: Of the whole cache, on all devices together.
      memory: Of a device while it decodes.
      decode: What a device does for one token more in every row. prefill: For the prompt, if it is evenly spread.
      working: Bytes that the prompt's layers take on a device besides parameters and cache; None if not compiled.
      collectives: Of a decode step; kernels: Pallas kernels, and how often each is called; the same of the prompt.
      compiler: Which one; seconds: how long it took.
      remarks: What one should know to read this right. suggestions: What would fit, if this does not.
    """

    question: Question
    topology: Topology
    layers: int
    cache_bytes: int
    memory: Memory
    decode: Roofline
    prefill: Roofline
    working: int | None = None
    compiled: tuple[int, ...] = ()
    collectives: tuple[Collective, ...] = ()
    kernels: tuple[tuple[str, float], ...] = ()
    prefill_collectives: tuple[Collective, ...] = ()
    prefill_kernels: tuple[tuple[str, float], ...] = ()
    compiler: str = ""
    seconds: float = 0.0
    refused: str = ""
    remarks: tuple[str, ...] = ()
    suggestions: tuple[str, ...] = ()

    @property
    def peak(self) -> int | None:
        """Bytes on a device while the prompt is read, when the whole cache is there already."""
        return None if self.working is None else self.memory.params + self.memory.cache + self.working

    @property
    def fits(self) -> bool:
        return self.memory.fits and not self.refused and (self.peak or 0) <= self.memory.limit


def parse_number(option: str, text: str) -> int:
    """ "1M" -> 1048576, "128k" -> 131072, "4000" -> 4000.

    Raises:
      PlanError: It is none, or not positive.
    """
    text = text.strip().lower().replace("_", "")
    unit = UNITS.get(text[-1:], 1)
    try:
        number = int(float(text[:-1]) * unit) if unit > 1 else int(text)
    except ValueError:
        raise PlanError(f"{option} is a number of tokens such as 131072, 128k or 1M; got {text!r}.") from None
    if number < 1:
        raise PlanError(f"{option} must be positive, got {number}.")
    return number


def ask(
    model: str, policy: str, context: int, batch: int, topology: str, mesh: str = "", dtype: str = "bfloat16"
) -> tuple[Question, Topology]:
    """A question, checked.

    Args:
      model: As `kvjax.models.shapes.model_config` reads it. policy: As `kvjax.parse_policy` does.
      context: Tokens of each prompt. batch: Rows.
      topology: "v5e:16x16". mesh: "seq=32,model=8"; "" for `default_mesh`.
      dtype: Of parameters and of what the policy does not compress.

    Raises:
      ValueError: Something is unknown, or does not go together; the message says what would.
    """
    if batch < 1:
        raise PlanError(f"--batch must be at least 1, got {batch}.")
    place, config = parse_topology(topology), model_config(model)
    mesh = mesh or default_mesh(config, place.devices)
    sizes = parse_mesh(mesh)
    taken = math.prod(sizes.values())
    if taken != place.devices:
        raise PlanError(
            f"{mesh} takes {taken} devices and {place} has {place.devices}: make the product of its axes "
            f"{place.devices}, such as {default_mesh(config, place.devices)}."
        )
    if batch % sizes["data"]:
        raise PlanError(f"A batch of {batch} rows does not divide over data={sizes['data']}.")
    question = Question(model, config, parse_policy(policy), str(policy), context, batch, sizes, dtype)
    question.program()  # Raises where the model, the policy, the prompt and the mesh do not go together.
    return question, place


def default_mesh(config: Config, devices: int) -> str:
    """KV heads along "model" as far as they divide, slots along "seq"."""
    model = math.gcd(devices, config.cache_heads, config.num_heads, config.mlp_size)
    return f"seq={devices // model},model={model}"


def answer(
    question: Question,
    topology: Topology,
    *,
    every_layer: bool = False,
    prefill: bool = False,
    arithmetic: bool = False,
) -> Planned:
    """Compiles a decode step where that is possible, and does the arithmetic in any case.

    Args:
      question, topology: Of `ask`.
      every_layer: Compile all layers, not as few as tell the rest.
      prefill: Compile what the prompt goes through, too.
      arithmetic: Compile nothing.

    Raises:
      CompileError: The compiler fails, other than for want of memory.
    """
    program, chip = question.program(), topology.chip
    memory = Memory(device_bytes(program.params), device_bytes(program.cache), chip.memory)
    planned = Planned(
        question=question,
        topology=topology,
        layers=program.config.num_layers,
        cache_bytes=tree_nbytes(program.cache),
        memory=memory,
        decode=decode_work(program),
        prefill=prefill_work(program, question.context),
        remarks=_remarks(question),
    )
    if reason := "Nothing was compiled." if arithmetic else why_not(topology):
        planned = dataclasses.replace(planned, remarks=(*planned.remarks, reason))
    elif memory.fits:
        planned = _compiled(planned, program, every_layer, prefill)
    else:
        reason = "Parameters and cache alone exceed the memory, so nothing was compiled."
        planned = dataclasses.replace(planned, remarks=(*planned.remarks, reason))
    if planned.fits:
        return planned
    memory = planned.memory
    besides = max(memory.total - memory.params - memory.cache, planned.working or 0)
    return dataclasses.replace(planned, suggestions=suggestions(question, topology, chip.memory - besides))


def _compiled(planned: Planned, program: Program, every_layer: bool, prefill: bool) -> Planned:
    question, layers = planned.question, program.config.num_layers
    counts = (layers,) if every_layer else sample(program.kinds)
    try:
        asked = {"topology": str(planned.topology), "layers": counts, "prefill": prefill}
        found = compiled(question.request() | asked)
    except CompileError as error:
        if not error.no_room:
            raise
        return dataclasses.replace(planned, refused=str(error))
    programs = found["programs"]

    def of_all(value: Any) -> float:
        return extrapolate(value(programs[0]), value(programs[-1]), counts, layers)

    def memory_of(name: str) -> int:
        return max(round(of_all(lambda one: one["memory"][name])), programs[-1]["memory"][name])

    memory = dataclasses.replace(
        planned.memory,
        padding=round(of_all(lambda one: one["memory"]["arguments"] - one["shapes"])),
        **{name: memory_of(name) for name in ("temporaries", "results", "code")},
    )
    collectives = _collectives([one["collectives"] for one in programs], counts, layers)
    names = sorted({name for one in programs for name in one["kernels"]})
    kernels = tuple((name, of_all(lambda one, name=name: one["kernels"].get(name, 0))) for name in names)
    remarks = planned.remarks
    if len(counts) > 1:
        remarks += (
            f"{counts[0]} and {counts[1]} of {layers} layers were compiled; what the others add follows from these. "
            "--every-layer compiles all.",
        )
    if not any(name.startswith(("kvjax_decode", "kvjax_paged")) for name in names):
        remarks += ("No kernel of kvjax attends in this program: XLA's own code does, which may read more than once.",)
    planned = _with_prefill(planned, found["prefill"])
    return dataclasses.replace(
        planned,
        memory=memory,
        decode=dataclasses.replace(planned.decode, sent=sum(one.sent for one in collectives)),
        compiled=counts,
        collectives=collectives,
        kernels=kernels,
        compiler=f"{found['compiler']}, for {found['device']}",
        seconds=max(one["seconds"] for one in (*programs, *found["prefill"])),
        remarks=remarks,
    )


def _collectives(of: list[list[dict[str, Any]]], counts: tuple[int, ...], layers: int) -> tuple[Collective, ...]:
    """Of all layers, from those of two numbers of them."""
    tables = [{(one["kind"], one["devices"]): Collective(**one) for one in found} for found in of]
    keys = sorted({key for table in tables for key in table})

    def at(table: dict[Any, Collective], key: tuple[str, int]) -> Collective:
        return table.get(key, Collective(*key, 0, 0, 0))

    found = []
    for key in keys:
        first, last = at(tables[0], key), at(tables[-1], key)
        count = extrapolate(first.count, last.count, counts, layers)
        size = extrapolate(first.bytes, last.bytes, counts, layers)
        if count > 0:
            found.append(Collective(*key, round(count), max(round(size), 0), max(first.largest, last.largest)))
    return tuple(sorted(found, key=lambda one: -one.sent))


def _with_prefill(planned: Planned, kinds: list[dict[str, Any]]) -> Planned:
    """What a prompt takes and sends, from a layer of every kind."""
    if not kinds:
        return planned
    working, sums, calls = 0, {}, {}
    for kind in kinds:
        for part, besides in (("layer", -kind["weights"]), ("compress", kind["hidden"])):
            if not (one := kind[part]):
                continue
            memory = one["memory"]
            # A layer's weights are parameters, and what compression gives is the cache: they are counted already.
            made = memory["results"] if part == "layer" else 0
            working = max(working, memory["arguments"] + made + memory["temporaries"] + memory["code"] + besides)
            for found in one["collectives"]:
                key, count, size = (found["kind"], found["devices"]), found["count"], found["bytes"]
                old = sums.get(key, Collective(*key, 0, 0, 0))
                sums[key] = Collective(
                    *key,
                    old.count + kind["layers"] * count,
                    old.bytes + kind["layers"] * size,
                    max(old.largest, found["largest"]),
                )
            for name, count in one["kernels"].items():
                calls[name] = calls.get(name, 0) + kind["layers"] * count
    collectives = tuple(sorted(sums.values(), key=lambda one: -one.sent))
    return dataclasses.replace(
        planned,
        working=working,
        prefill=dataclasses.replace(planned.prefill, sent=sum(one.sent for one in collectives)),
        prefill_collectives=collectives,
        prefill_kernels=tuple(sorted(calls.items())),
    )


def _remarks(question: Question) -> tuple[str, ...]:
    config, remarks = question.config, ()
    if question.context > config.max_length:
        remarks += (f"{question.context:,} tokens are beyond the model's context of {config.max_length:,}.",)
    if question.policy.divided:
        remarks += (f"{question.policy} divides its budget by what it sees; here every layer is given the same.",)
    return remarks
