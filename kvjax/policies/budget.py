"""How much is kept: one `Budget` for every policy, and how it is spread over layers."""

import dataclasses
import math
import re
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


@dataclasses.dataclass(frozen=True)
class Budget:
    """A number of tokens per layer and head, a ratio of the prompt, bytes of the whole cache of one sequence, or a part
    of the bytes that the uncompressed cache would take.

    Exactly one field is set. A budget of more than there is keeps everything.
    """

    tokens: int | None = None
    ratio: float | None = None
    bytes: int | None = None
    size: float | None = None

    def __post_init__(self):
        given = [value for value in (self.tokens, self.ratio, self.bytes, self.size) if value is not None]
        if len(given) != 1:
            raise ValueError(f"A budget is tokens, a ratio, bytes or a size: exactly one of them, got {self!r}.")
        if given[0] <= 0:
            raise ValueError(f"A budget must be positive, got {self}.")
        for name, part in (("ratio", self.ratio), ("size", self.size)):
            if part is not None and part > 1:
                raise ValueError(
                    f"A {name} is the part that is kept, between 0 and 1; got {part}. For tokens give an int."
                )

    @classmethod
    def of(cls, value: "Budget | int | float | str") -> "Budget":
        """From what people write: 512 (tokens), 0.25 (ratio kept), "25%", "64KiB" or "2MB", "25%B" (a quarter of the
        bytes of the uncompressed cache).

        Raises:
          ValueError: It is none of these.
        """
        if isinstance(value, Budget):
            return value
        if isinstance(value, bool):
            raise ValueError("A budget is a number, not a truth value.")
        if isinstance(value, int):
            return cls(tokens=value)
        if isinstance(value, float):
            return cls(ratio=value)
        match = re.fullmatch(r"\s*([0-9.]+)\s*([A-Za-z%]+)\s*", value) if isinstance(value, str) else None
        if match and match[2] == "%":
            return cls(ratio=float(match[1]) / 100)
        if match and match[2] == "%B":
            return cls(size=float(match[1]) / 100)
        if match and match[2] in UNITS:
            return cls(bytes=math.floor(float(match[1]) * UNITS[match[2]]))
        raise ValueError(
            f"Cannot read the budget {value!r}: give an int (tokens), a float up to 1.0 (ratio kept), bytes such as "
            "'64KiB', or '25%B' (a quarter of the uncompressed cache's bytes)."
        )

    def __str__(self) -> str:
        if self.ratio is not None:
            return repr(float(self.ratio))
        if self.size is not None:
            return f"'{100 * self.size:g}%B'"
        return str(self.tokens) if self.tokens is not None else f"'{self.bytes}B'"

    @property
    def in_bytes(self) -> bool:
        """Whether it depends on the model how many tokens that is."""
        return self.bytes is not None or self.size is not None

    def mean(self, length: Any) -> Any:
        """Slots per layer and head for prompts of `length` tokens [...]: a fraction where the budget is a ratio."""
        if self.in_bytes:
            raise ValueError("A budget in bytes depends on the model: `policies.plan` turns it into tokens first.")
        return self.ratio * length if self.tokens is None else self.tokens + 0 * length


def whole(slots: Any) -> Any:
    """Rounds down; 1e-3 forgives the float error of a ratio times a length (0.1 * 2000 is 200 in float32 too)."""
    return np_like(slots).floor(slots + 1e-3).astype(np.int32)


def np_like(x: Any) -> Any:
    """jnp for JAX arrays, NumPy for the rest, so that one rule plans on the host and runs under `jit`."""
    return jnp if isinstance(x, jax.Array) else np


class Allocate(Protocol):
    """Spreads an average budget over the layers that a policy compresses, known before anything is computed."""

    def __call__(self, mean: Any, length: Any, layers: int, least: int) -> Any:
        """Slots of each layer, [layers, ...] int32, at most `mean * layers` together and never more than `length` each.

        Args:
          mean: Average slots per layer [...], float.
          length: Tokens of the prompts [...] int32.
          layers: How many layers are compressed. Layers that are not (sliding windows) have no part in this.
          least: Slots below which the method makes no sense: the floor of every layer.
        """
        ...


@runtime_checkable
class Divide(Protocol):
    """Spreads an average budget over layers by what is seen of them: decided on the host, between compiled stages."""

    @property
    def cascades(self) -> bool:
        """Whether layers are cut to their share as soon as the next one is seen, so that all layers together never
        hold much more than the budget. Otherwise all wait, whole, for the last one."""
        ...

    @property
    def needs(self) -> Any:
        """The statistics of a prompt (`Needs`) that it weighs layers by."""
        ...

    def weigh(self, prompt: Any, obs: Any, spec: Any) -> jax.Array:
        """How much one layer asks for: [B] float32, from a `Prompt` and its `Observation`."""
        ...

    def divide(self, weights: np.ndarray, mean: Any, length: Any, layers: int, least: int) -> np.ndarray:
        """Slots [seen, B] int32 of the layers seen so far, at most `mean * layers` together.

        Args:
          weights: Of the layers seen so far [seen, B].
          mean: Average slots per layer [B], float.
          length: Tokens of the prompts [B] int32.
          layers: How many layers are compressed in all.
          least: Floor of every layer.
        """
        ...


@dataclasses.dataclass(frozen=True)
class Uniform:
    """The same for every layer."""

    def __call__(self, mean: Any, length: Any, layers: int, least: int) -> Any:
        del least
        xp = np_like(length)
        return xp.stack([xp.minimum(whole(mean), length)] * layers)


@dataclasses.dataclass(frozen=True)
class Pyramid:
    """PyramidKV's arithmetic sequence: many slots for early layers, few for late ones (arXiv 2406.02069, section 4.2).

    The last layer gets `mean / beta` and the first what makes the average right; if the first would get more than all
    but the window, it gets just that and the last the rest. Where that would leave a layer less than the floor, all get
    the same.

    Attributes:
      beta: Steepness.
    """

    beta: float = 20.0

    def __call__(self, mean: Any, length: Any, layers: int, least: int) -> Any:
        xp = np_like(length)
        flat = Uniform()(mean, length, layers, least)
        if layers == 1:
            return flat
        first, top = 2 * mean - mean / self.beta, length - least
        first = xp.where(first >= top, top, first)
        last = 2 * mean - first
        layer = xp.arange(layers).reshape((layers,) + (1,) * xp.ndim(length))
        slots = xp.round(first - layer * (first - last) / (layers - 1)).astype(np.int32)
        excess = xp.maximum(slots.sum(0) - whole(mean * layers), 0)  # Rounding must not spend more than there is.
        slots = slots - (layer < excess)
        return xp.where((first >= last) & (slots.min(0) >= least), slots, flat)
