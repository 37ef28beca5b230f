"""Which implementation serves a call, and why: an explicit choice never falls back, "auto" tells its reason."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Literal

import jax

Implementation = Literal["auto", "xla", "tpu", "gpu", "reference"]
NATIVE: Mapping[str, str] = {"tpu": "tpu", "gpu": "gpu", "cuda": "gpu"}  # Of each JAX backend.


class KernelError(ValueError):
    """A kernel was asked for what it cannot serve; the message says why, and what can."""


@dataclasses.dataclass(frozen=True)
class Choice:
    """What will run.

    Attributes:
      implementation: "tpu", "gpu", "xla" or "reference".
      reason: Why, in one sentence.
    """

    implementation: str
    reason: str


def choose(asked: str, refuse: Mapping[str, Callable[[], str | None]]) -> Choice:
    """Picks an implementation.

    Args:
      asked: "auto", or the name of one.
      refuse: For every Pallas implementation there is, a function that says why it cannot serve this call, or None.
        "xla" and "reference" serve everything.

    Raises:
      KernelError: The one that was asked for is unknown, is not for this machine, or cannot serve the call.
    """
    backend = platform()
    native = NATIVE.get(backend)
    if asked == "auto":
        if native is None or native not in refuse:
            return Choice("xla", f"there is no Pallas kernel for {backend}")
        reason = refuse[native]()
        return Choice(native, f"this machine is a {backend}") if reason is None else Choice("xla", reason)
    known = ("auto", "xla", "reference", *refuse)
    if asked not in known:
        raise KernelError(f"implementation must be one of {', '.join(known)}, got {asked!r}.")
    if asked not in refuse:
        return Choice(asked, "asked for")
    reason = refuse[asked]()
    if reason is not None:
        raise KernelError(f"The {asked} kernel cannot serve this call: {reason} implementation='xla' can.")
    return Choice(asked, "asked for")


def platform() -> str:
    """What is compiled for: the device of the mesh in use, which may be described only, else JAX's default backend.

    So programs for machines that are elsewhere choose what will run there: see `jax.sharding.use_abstract_mesh`.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def device_kind() -> str:
    """Of the default device, as tuned tables name it: "cpu", "NVIDIA H200", "TPU v5 lite"."""
    return jax.devices()[0].device_kind


def unless_hopper() -> str | None:
    """Why kernels that are written for Hopper (sm_90a) cannot run on this machine's GPU; None where they can."""
    if jax.default_backend() != "gpu" or jax.sharding.get_abstract_mesh().abstract_device is not None:
        return None  # Interpreted, or compiled for a machine that is elsewhere.
    device = jax.devices()[0]
    if getattr(device, "compute_capability", "9.0") == "9.0":
        return None
    return f"it is written for Hopper GPUs (H100, H200), and this is a {device.device_kind}."


def interpreted(implementation: str) -> bool:
    """Whether a Pallas kernel has to be interpreted, because this machine is none of its kind."""
    return NATIVE.get(platform()) != implementation
