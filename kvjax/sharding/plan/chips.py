"""Accelerators as published, and topologies by name: "v5e:16x16", "v5p:4x4x4", "h200:8"."""

import dataclasses
import difflib
import math

GIB = 2**30


class PlanError(ValueError):
    """A plan was asked for that cannot be made; the message says what could."""


@dataclasses.dataclass(frozen=True)
class Chip:
    """One accelerator; rates are published peaks, which no program reaches.

    Attributes:
      name: As topologies name it.
      memory: Bytes that a program may use.
      bandwidth: Bytes per second of its memory.
      flops: bfloat16 operations per second of its matrix units, without sparsity.
      link: Bytes per second that it can send to its neighbours, over all its links together.
      source: Where the numbers are from.
      axes: Dimensions of a topology: 2 or 3 of a TPU's torus, 1 of GPUs behind switches.
      most: Chips of the largest topology.
      compiler: The platform that `jax.experimental.topologies` compiles for; "" if there is none.
    """

    name: str
    memory: int
    bandwidth: float
    flops: float
    link: float
    source: str
    axes: int
    most: int
    compiler: str = ""


_CLOUD, _NVIDIA = "https://docs.cloud.google.com/tpu/docs/", "https://www.nvidia.com/en-us/data-center/"
# Memory of TPUs: what libtpu's compiler says is available, a little less than the 16, 95 and 32 GB that are published.
# Links: half of the bandwidth that is published for both directions together.
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v5e", int(15.75 * GIB), 819e9, 197e12, 200e9, _CLOUD + "v5e", 2, 256, "tpu"),
        Chip("v5p", int(95.74 * GIB), 2765e9, 459e12, 600e9, _CLOUD + "v5p", 3, 6144, "tpu"),
        Chip("v6e", int(31.25 * GIB), 1640e9, 918e12, 400e9, _CLOUD + "v6e", 2, 256, "tpu"),
        Chip("a100", 80 * 10**9, 2039e9, 312e12, 300e9, _NVIDIA + "a100/", 1, 4096),
        Chip("h100", 80 * 10**9, 3350e9, 989e12, 450e9, _NVIDIA + "h100/", 1, 4096),
        Chip("h200", 141 * 10**9, 4800e9, 989e12, 450e9, _NVIDIA + "h200/", 1, 4096),
    )
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """Chips that are connected, such as 16x16 of v5e."""

    chip: Chip
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    @property
    def devices(self) -> int:
        return math.prod(self.shape)


def parse_topology(text: str) -> Topology:
    """ "v5e:16x16" -> its chips and their shape.

    Raises:
      PlanError: The chip is unknown, or there is no such shape of it.
    """
    name, _, size = text.strip().lower().partition(":")
    if name not in CHIPS:
        near = difflib.get_close_matches(name, CHIPS, cutoff=0.4)
        hint = f" Did you mean {' or '.join(near)}?" if near else ""
        raise PlanError(f"No chip called {name!r} is known.{hint} Known are {', '.join(CHIPS)}; write v5e:16x16.")
    chip = CHIPS[name]
    example = {1: f"{name}:8", 2: f"{name}:4x8", 3: f"{name}:4x4x8"}[chip.axes]
    sizes = size.split("x")
    if not all(part.isdecimal() and int(part) for part in sizes) or len(sizes) != chip.axes:
        raise PlanError(f"A topology of {name} has {chip.axes} positive dimension(s), such as {example}; got {text!r}.")
    topology = Topology(chip, tuple(map(int, sizes)))
    if topology.devices > chip.most:
        raise PlanError(
            f"{topology} has {topology.devices} chips, and there are at most {chip.most} of {name} at once."
        )
    return topology
