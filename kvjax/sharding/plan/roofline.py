"""The least time a step can take: every resource at its published peak, none waiting for another."""

import dataclasses
import math

import jax

from kvjax.cache.types import tree_nbytes
from kvjax.sharding.plan.abstract import Program, device_bytes
from kvjax.sharding.plan.chips import Chip


@dataclasses.dataclass(frozen=True)
class Roofline:
    """What one device does in one step.

    Attributes:
      bytes: Read from memory. flops: Of matrix products. sent: Bytes to other devices; None where unknown.
    """

    bytes: float
    flops: float
    sent: float | None = None

    def seconds(self, chip: Chip) -> dict[str, float]:
        """The time that each resource needs by itself."""
        times = {"memory": self.bytes / chip.bandwidth, "arithmetic": self.flops / chip.flops}
        return times if self.sent is None else times | {"links": self.sent / chip.link}

    def bound(self, chip: Chip) -> tuple[str, float]:
        """The resource that takes longest, and how long."""
        times = self.seconds(chip)
        slowest = max(times, key=lambda name: times[name])
        return slowest, times[slowest]


def decode_work(program: Program) -> Roofline:
    """A decode step: all parameters but the embedding of other tokens, and all that is stored, are read once."""
    config, params, cache = program.config, program.params, program.cache
    read = params if config.tied else {name: value for name, value in params.items() if name != "embed"}
    rows = program.tokens.sharding.shard_shape(program.tokens.shape)[0]
    share = device_bytes(cache.layers) / max(tree_nbytes(cache.layers), 1)
    return Roofline(
        bytes=device_bytes(read) + device_bytes(cache),
        flops=2 * rows * matrix_elements(read) + share * attention_flops(program),
    )


def prefill_work(program: Program, context: int) -> Roofline:
    """A prompt: products of all tokens with all matrices and, causally, with each other, evenly spread."""
    config, mesh = program.config, program.mesh
    layers = matrix_elements({"layers": program.params["layers"]}) * mesh.shape["model"]
    seen = (min(config.sliding_window, context) if kind == "sliding" else context / 2 for kind in config.layer_types)
    products = 2 * (config.key_dim + config.value_dim) * config.num_heads * context * sum(seen)
    devices = math.prod(mesh.shape.values())
    return Roofline(
        bytes=device_bytes(program.params) + device_bytes(program.cache),
        flops=program.batch * (2 * context * layers + products) / devices,
    )


def matrix_elements(params: object) -> int:
    """Elements of matrices that one device holds."""
    matrices = (x for x in jax.tree.leaves(params) if len(x.shape) > 1)
    return sum(math.prod(x.sharding.shard_shape(x.shape)) for x in matrices)


def attention_flops(program: Program) -> float:
    """Of one token in every row over what is held, on all devices together."""
    config = program.config
    return 2.0 * (config.key_dim + config.value_dim) * config.num_heads * program.batch * sum(program.held)
