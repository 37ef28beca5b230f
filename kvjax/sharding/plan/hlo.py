"""What a compiled program sends between devices: read from its optimized HLO, loops and asynchronous pairs counted."""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterator

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
CALLS = "calls|to_apply|body|branch_computations|called_computations|true_computation|false_computation"


@dataclasses.dataclass(frozen=True)
class Collective:
    """All collectives of one kind among equally many devices, in one run of a program.

    Attributes:
      kind: One of `KINDS`.
      devices: That take part in each.
      count: How many run.
      bytes: Of all arrays that are gathered, reduced or sent, as one device has them whole.
      largest: Bytes of the largest of them.
    """

    kind: str
    devices: int
    count: float
    bytes: float
    largest: int

    @property
    def sent(self) -> float:
        """Bytes that a device has to send at least, which a ring does."""
        others = (self.devices - 1) / self.devices
        return self.bytes * {"all-reduce": 2 * others, "collective-permute": 1.0}.get(self.kind, others)


@dataclasses.dataclass(frozen=True)
class Op:
    """A line of a computation: its name, its result's type, what it does, and the line."""

    name: str
    type: str
    does: str
    line: str


def computations(text: str) -> dict[str, tuple[Op, ...]]:
    """A module's computations by name, callees before callers; the entry is "ENTRY"."""
    found: dict[str, list[Op]] = {}
    name = ""
    for line in map(str.strip, text.splitlines()):
        if head := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$", line):
            name = "ENTRY" if head[1] else head[2]
            found[name] = []
        elif name and (op := re.match(r"(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][a-z0-9\-]*)\(", line)):
            found[name].append(Op(op[1], op[2], op[3], line))
    return {name: tuple(ops) for name, ops in found.items()}


def times(modules: dict[str, tuple[Op, ...]]) -> dict[str, int]:
    """How often each computation runs: a loop's body as often as XLA knows, once where it does not; every branch."""
    count = Counter({"ENTRY": 1})
    for name in reversed(modules):
        for op in modules[name]:
            if op.does in ("async-update", "async-done"):  # Name the computation that "async-start" has started.
                continue
            loops = _trips(op, modules) if op.does == "while" else 1
            for callee in _callees(op.line):
                count[callee] += count[name] * loops
    return count


def _trips(op: Op, modules: dict[str, tuple[Op, ...]]) -> int:
    """How often a loop runs: as XLA says, or up to the constant that its condition compares with; 1 if neither."""
    if known := re.search(r'known_trip_count":\{"n":"(\d+)"', op.line):
        return int(known[1])
    condition = re.search(r"condition=%?([\w.\-]+)", op.line)
    ops = modules.get(condition[1], ()) if condition else ()
    limits = [int(found[1]) for one in ops if (found := re.search(r" s32\[\]\S* constant\((\d+)\)", one.line))]
    return limits[0] if len(limits) == 1 and any("direction=LT" in one.line for one in ops) else 1


def _callees(line: str) -> Iterator[str]:
    for names in re.findall(
        r"(?:calls|to_apply|body|branch_computations|called_computations)=(%?[\w.\-]+|\{[^}]*\})", line
    ):
        yield from (name.strip(" %") for name in names.strip("{}").split(","))


def collectives(text: str, devices: int) -> tuple[Collective, ...]:
    """A program's collectives, those that send most first.

    Args:
      text: `compiled.as_text()`. devices: Of the whole program.
    """
    modules = computations(text)
    runs, chains = times(modules), set()
    found: dict[tuple[str, int], list[tuple[int, int]]] = {}  # Of each kind and group: (how often, bytes).
    for name, ops in modules.items():
        for op in ops:
            kind = op.does.removesuffix("-start")
            if kind not in KINDS or not runs[name]:
                continue
            # One collective that is spread over several fusions occurs in each of them.
            if chain := re.search(r'chain_id="(\w+)"', op.line):
                channel = re.search(r"channel_id=(\d+)", op.line)
                key = (kind, channel[1] if channel else op.name, chain[1])
                if key in chains:
                    continue
                chains.add(key)
            group = _group(op.line, kind, devices)
            if group > 1:
                found.setdefault((kind, group), []).append((runs[name], _bytes(op, kind, group)))
    sums = (
        Collective(kind, group, sum(n for n, _ in of), sum(n * size for n, size in of), max(size for _, size in of))
        for (kind, group), of in found.items()
    )
    return tuple(sorted(sums, key=lambda one: -one.sent))


def _bytes(op: Op, kind: str, group: int) -> int:
    sizes = [_size(*array) for array in re.findall(r"([a-z]\w*)\[([\d,]*)\]", op.type)]
    if op.does in ("all-gather-start", "collective-permute-start"):  # (operands, results, contexts).
        sizes = [size for size in sizes if size > 4] or sizes
        sizes = sizes[len(sizes) // 2 :]
    return sum(sizes) * (group if kind == "reduce-scatter" else 1)


def _size(dtype: str, shape: str) -> int:
    bits = re.search(r"\d+", dtype)
    count = math.prod(int(n) for n in shape.split(",") if n)
    return -(-count * (8 if dtype == "pred" else int(bits[0]) if bits else 0) // 8)


def _group(line: str, kind: str, devices: int) -> int:
    """Devices that take part in one collective."""
    if kind == "collective-permute":
        return 2
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", line):
        return len(listed[1].split(","))
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]", line):
        return int(iota[2])
    # By axes of a mesh: mesh['a'=8,'b'=32] {'a'}.
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\].*?\{([^}]*)\}", line):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", mesh[2]))
    return devices


def kernels(text: str) -> dict[str, int]:
    """Pallas kernels in a program, and how often each is called."""
    modules = computations(text)
    runs, found = times(modules), Counter()
    for name, ops in modules.items():
        for op in ops:
            if re.search(r'custom_call_target="(tpu_custom_call|mosaic_gpu)', op.line):
                found[re.sub(r"(\.\d+|\.clone)*$", "", op.name)] += runs[name]
    return dict(found)
