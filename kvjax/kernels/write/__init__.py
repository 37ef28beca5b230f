"""Writing a few new tokens into their slots, in place."""

import importlib
from typing import Any

from jax import Array

from kvjax.kernels import choose
from kvjax.kernels.choose import Choice, Implementation
from kvjax.kernels.write import reference

PALLAS = ("tpu",)


def put(leaves: Any, slot: Array, values: Any, *, implementation: Implementation = "auto") -> Any:
    """Writes T tokens into their slots: in place where the leaves are donated or not used again.

    Args:
      leaves: A pytree of arrays [B, H or 1, S, ...].
      slot: Where each token goes [B, 1 or H, T] int32; outside `0 ... S - 1` nothing is written. No slot comes twice.
      values: What is written there, a pytree of arrays [B, H or 1, T, ...].
      implementation: "auto", "tpu" or "xla" (a scatter).

    Returns:
      The leaves with the tokens.

    Raises:
      KernelError: The implementation that was named cannot serve this.
    """
    name = explain(leaves, slot, implementation).implementation
    if name in ("xla", "reference"):
        return reference.put(leaves, slot, values)
    return _module(name).put(leaves, slot, values, interpret=choose.interpreted(name))


def explain(leaves: Any, slot: Array, implementation: Implementation = "auto") -> Choice:
    """Which implementation writes, and why.

    Raises:
      KernelError: See `put`.
    """
    return choose.choose(
        implementation, {name: lambda name=name: _module(name).refuse(leaves, slot) for name in PALLAS}
    )


def _module(name: str) -> Any:
    return importlib.import_module(f"kvjax.kernels.write.{name}")
