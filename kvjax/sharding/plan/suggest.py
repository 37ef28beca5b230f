"""What would fit, where a plan does not: other meshes, smaller budgets, fewer rows, more chips. Exact arithmetic on
shapes, nothing is compiled.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

from kvjax.models.config import Config
from kvjax.policies.budget import Budget
from kvjax.policies.policy import Policy
from kvjax.policies.registry import parse_policy
from kvjax.sharding.mesh import AXES
from kvjax.sharding.plan.abstract import Program, abstract_mesh, device_bytes, make_program
from kvjax.sharding.plan.chips import Topology


@dataclasses.dataclass(frozen=True)
class Question:
    """What is planned for: a model, a policy, prompts, and how they lie.

    Attributes:
      model: Name or path. config: What it is.
      policy: What compresses. written: As it was written.
      context: Tokens of each prompt. batch: Rows.
      mesh: Devices along each axis. dtype: Of parameters and plain keys and values.
    """

    model: str
    config: Config
    policy: Policy
    written: str
    context: int
    batch: int
    mesh: dict[str, int]
    dtype: str = "bfloat16"

    def program(self) -> Program:
        """On devices that need not be described."""
        mesh = abstract_mesh(show_mesh(self.mesh))
        return make_program(self.config, self.policy, self.context, self.batch, mesh, self.dtype)

    def request(self) -> dict[str, Any]:
        """As `worker` reads it."""
        fields = ("model", "context", "batch", "dtype")
        asked = {name: getattr(self, name) for name in fields}
        return asked | {"policy": self.written, "mesh": show_mesh(self.mesh)}


def show_mesh(sizes: dict[str, int]) -> str:
    """ "seq=32,model=8": the axes that have more than one device."""
    return ",".join(f"{name}={sizes[name]}" for name in AXES if sizes[name] > 1) or "seq=1"


def needed(question: Question) -> float:
    """Bytes of parameters and cache on one device; infinite where it cannot be served."""
    try:
        program = question.program()
    except ValueError:
        return math.inf
    return device_bytes((program.params, program.cache))


def suggestions(question: Question, topology: Topology, room: int) -> tuple[str, ...]:
    """What fits, the nearest first: options of the command, and what they mean.

    Args:
      question: What does not fit. room: Bytes of a device for parameters and cache.
    """
    found = [other_mesh(question, topology.devices, room), *less(question, room)]
    if not any(found):
        leanest = min(
            meshes(question, topology.devices), key=lambda mesh: needed(on(question, mesh)), default=question.mesh
        )
        found = [
            f"--mesh {show_mesh(leanest)} {sentence}" for sentence in less(on(question, leanest), room) if sentence
        ]
    return tuple(sentence for sentence in (*found, more_chips(question, topology, room)) if sentence)


def less(question: Question, room: int) -> tuple[str, ...]:
    """What fits on the same mesh."""
    return smaller_budget(question, room), fewer_rows(question, room), shorter_context(question, room)


def on(question: Question, mesh: dict[str, int]) -> Question:
    """The same on another mesh."""
    return dataclasses.replace(question, mesh=mesh)


def meshes(question: Question, devices: int) -> Iterator[dict[str, int]]:
    """All that the model and the batch can lie on."""
    config = question.config
    for model in divisors(devices):
        if config.num_heads % model or config.mlp_size % model:
            continue
        for data in divisors(devices // model):
            if question.batch % data == 0:
                yield {"data": data, "seq": devices // model // data, "model": model}


def divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def distance(a: dict[str, int], b: dict[str, int]) -> float:
    """How far one mesh is from another: doublings and halvings of its axes."""
    return sum(abs(math.log2(a[name] / b[name])) for name in AXES)


def other_mesh(question: Question, devices: int, room: int) -> str:
    """The nearest mesh of as many devices that fits."""
    candidates = sorted(meshes(question, devices), key=lambda mesh: distance(mesh, question.mesh))
    for mesh in candidates:
        if mesh != question.mesh and (size := needed(on(question, mesh))) <= room:
            return f"--mesh {show_mesh(mesh)}  ({size / 1e9:.2f} GB of parameters and cache on a device)"
    return ""


def smaller_budget(question: Question, room: int) -> str:
    """The largest budget that fits, of a policy that has one, or of SnapKV before one that has none."""
    policy = question.policy

    def kept(share: float) -> Question:
        if policy.stages:
            last = dataclasses.replace(policy.stages[-1], budget=Budget(ratio=share))  # type: ignore[type-var]
            return dataclasses.replace(question, policy=dataclasses.replace(policy, stages=(*policy.stages[:-1], last)))
        return dataclasses.replace(question, policy=parse_policy(f"snapkv({share})") | policy)

    try:
        shares = [digit * 10.0**power for power in (-4, -3, -2) for digit in range(10, 100)]
        best = last_that(lambda share: needed(kept(round(share, 5))) <= room, shares)
    except ValueError:  # A store that takes no eviction before it.
        return ""
    if best is None:
        return ""
    if not policy.stages:
        after = "" if policy == Policy() else f" | {question.written}"
        return f'--policy "snapkv({best:.3g}){after}"  (keeps {best:.1%} of the tokens)'
    now = policy.stages[-1].budget
    return f"a budget of {best:.3g} in place of {now}" if now.ratio is None or best < now.ratio else ""


def last_that(fits: Any, values: list[float]) -> float | None:
    """The last of ascending values that fits, None if the first does not."""
    if not fits(values[0]):
        return None
    low, high = 0, len(values)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(values[middle]) else (low, middle)
    return values[low]


def fewer_rows(question: Question, room: int) -> str:
    """The largest batch that fits, by halves."""
    rows, step = question.batch // 2, question.mesh["data"]
    while rows >= step:
        if rows % step == 0 and needed(dataclasses.replace(question, batch=rows)) <= room:
            return f"--batch {rows}"
        rows //= 2
    return ""


def shorter_context(question: Question, room: int) -> str:
    """The longest context that fits, by halves."""
    tokens = question.context // 2
    while tokens >= 1024:
        if needed(dataclasses.replace(question, context=tokens)) <= room:
            return f"--context {tokens}"
        tokens //= 2
    return ""


def more_chips(question: Question, topology: Topology, room: int) -> str:
    """So many times more devices along "seq"."""
    times = 2
    while topology.devices * times <= min(topology.chip.most, topology.devices * 64):
        mesh = question.mesh | {"seq": question.mesh["seq"] * times}
        if needed(on(question, mesh)) <= room:
            return f"{topology.devices * times} chips with --mesh {show_mesh(mesh)}"
        times *= 2
    return ""
