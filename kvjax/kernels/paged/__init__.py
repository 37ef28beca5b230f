"""Attention of heads that read pages by a table: pools that heads share, and pages that a query chooses."""

import importlib
from typing import Any

from kvjax.kernels import choose
from kvjax.kernels.choose import Choice, Implementation
from kvjax.kernels.paged import reference, sharded, xla
from kvjax.kernels.paged.request import PagedRequest as PagedRequest
from kvjax.kernels.parts import Part

PALLAS = ("tpu", "gpu")


def paged_attention(request: PagedRequest, implementation: Implementation = "auto", **options: Any) -> Part:
    """Attends to the pages that each head's table names.

    Args:
      request: What is stored and what is asked. Page numbers that do not exist are skipped.
      implementation: "auto", "tpu", "gpu", "xla" or "reference". A Pallas kernel that is named on another machine is
        interpreted: slow, for tests.
      **options: Of the implementation.

    Returns:
      Output [B, Hq, N, D] float32 and log-sum-exp [B, Hq, N].

    Raises:
      KernelError: The implementation that was named cannot serve this.
    """
    mine = sharded.where(request)
    if mine is not None:
        return sharded.attend(request, mine, lambda own: paged_attention(own, implementation, **options))
    name = explain(request, implementation).implementation
    if name == "reference":
        return reference.attend(request)
    if name == "xla":
        return xla.attend(request, **options)
    return _module(name).attend(request, interpret=choose.interpreted(name), **options)


def explain(request: PagedRequest, implementation: Implementation = "auto") -> Choice:
    """Which implementation serves a request, and why.

    Raises:
      KernelError: See `paged_attention`.
    """
    return choose.choose(implementation, {name: lambda name=name: _module(name).refuse(request) for name in PALLAS})


def _module(name: str) -> Any:
    return importlib.import_module(f"kvjax.kernels.paged.{name}")
