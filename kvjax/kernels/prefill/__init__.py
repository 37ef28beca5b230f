"""Attention of a prompt, or of a chunk of one, over itself and what came before; and what can be seen of it.

Where the tokens of a prompt lie on several devices of the mesh in use, keys go around among them (`ring`).
"""

import functools
import importlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from kvjax.kernels import choose
from kvjax.kernels.choose import Choice, Implementation
from kvjax.kernels.prefill import pieces, reference, ring, xla
from kvjax.kernels.prefill.request import Past as Past, Prefill as Prefill, Request as Request, make_request
from kvjax.kernels.prefill.statistics import ColumnSums as ColumnSums, Statistics as Statistics
from kvjax.kernels.prefill.xla import BLOCK as BLOCK

PALLAS = ("tpu", "gpu")
AUTOMATIC = ("tpu",)  # XLA serves GPUs, until the kernels there have been measured against it.


def prefill_attention(
    q: Array,
    k: Array,
    v: Array,
    pos: Array,
    *,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    segments: Array | None = None,
    past: Past | None = None,
    statistics: Statistics = Statistics(),  # noqa: B008
    implementation: Implementation = "auto",
    block: int | None = None,
) -> Prefill:
    """Causal attention of a prompt over itself and what came before, with statistics in memory that grows with its
    length, not with its square.

    Args:
      q: [B, H * G, T, D], rotated. k, v: [B, H, T, D]; values may have another number of channels than keys.
      pos: [B, T] int32, increasing where present, negative for padding at the ends of rows, which sees nothing, is not
        seen, and may hold anything in q, k and v.
      scale: Of the logits. softcap: `cap * tanh(logits / cap)` after it; 0 for none.
      window: A query sees keys less than so many positions before it; 0 for all.
      segments: Which prompt each token belongs to [B, T] int32, where rows hold several, one after another: a query
        sees its own, positions start anew in each, and "last" in sums means the last token of its own. Not with `past`.
      past: Keys and values that the queries see besides, by position.
      statistics: What to say besides the output, over the keys of the past and the new ones.
      implementation: "auto", "tpu", "gpu", "xla" or "reference"; "auto" is "tpu" on TPUs and "xla" elsewhere. A Pallas
        kernel that is named on another machine is interpreted: slow, for tests.
      block: Queries that attend at once in XLA: bounds memory, changes results by rounding. Kernels have their own.

    Returns:
      The output and the statistics. Gradients with respect to floats are XLA's, whoever computes the output.

    Raises:
      KernelError: Shapes do not go together, or the implementation that was named cannot serve this.
    """
    request = make_request(
        q, k, v, pos, scale=scale, window=window, softcap=softcap, segments=segments, past=past, statistics=statistics
    )
    mine = ring.where(request)
    if mine is not None:
        return ring.prefill(request, mine, lambda own: _local(own, implementation, block))
    name = explain(request, implementation).implementation
    if name == "reference":
        return reference.prefill(request)
    if name == "xla":
        return xla.prefill(request, block=block)
    return _kernel(request, name, block)


def explain(request: Request, implementation: Implementation = "auto") -> Choice:
    """Which implementation serves a request, and why.

    Raises:
      KernelError: See `prefill_attention`.
    """
    names = AUTOMATIC if implementation == "auto" else PALLAS
    return choose.choose(implementation, {name: lambda name=name: _module(name).refuse(request) for name in names})


def causal_attention(
    q: Array,
    k: Array,
    v: Array,
    pos: Array,
    *,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    column_sums: bool = False,
    block: int = BLOCK,
) -> tuple[Array, Array | None]:
    """`prefill_attention` of a prompt over itself: output, and plain column sums or None."""
    statistics = Statistics(column_sums=(ColumnSums(),) if column_sums else ())
    seen = prefill_attention(
        q, k, v, pos, scale=scale, window=window, softcap=softcap, statistics=statistics, block=block
    )
    return seen.out, seen.column_sums[0] if column_sums else None


def _local(request: Request, implementation: Implementation, block: int | None) -> ring.Local:
    """How one device of several does its part of a request."""
    if explain(request, implementation).implementation == "tpu":
        return _module("tpu").local(request, interpret=choose.interpreted("tpu"))
    return pieces.local(request, block)


def _module(name: str) -> Any:
    """Imported when first used, because Pallas takes its time."""
    return importlib.import_module(f"kvjax.kernels.prefill.{name}")


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _kernel(request: Request, name: str, block: int | None) -> Prefill:
    """A Pallas kernel's answer, with the gradient of the blockwise definition."""
    del block  # Of the gradient alone.
    return _module(name).prefill(request, interpret=choose.interpreted(name))


def _forward(request: Request, name: str, block: int | None) -> tuple[Prefill, Request]:
    return _kernel(request, name, block), request


def _backward(name: str, block: int | None, request: Request, gradient: Prefill) -> tuple[Request]:
    del name
    leaves, tree = jax.tree.flatten(request)
    real = [jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in leaves]

    def run(floats: list[Array]) -> Prefill:
        rest = iter(floats)
        given = [next(rest) if is_real else leaf for leaf, is_real in zip(leaves, real, strict=True)]
        return xla.prefill(jax.tree.unflatten(tree, given), block=block)

    _, pull = jax.vjp(run, [leaf for leaf, is_real in zip(leaves, real, strict=True) if is_real])
    pulled = iter(pull(gradient)[0])
    pairs = zip(leaves, real, strict=True)
    back = [next(pulled) if is_real else np.zeros(leaf.shape, jax.dtypes.float0) for leaf, is_real in pairs]
    return (jax.tree.unflatten(tree, back),)


_kernel.defvjp(_forward, _backward)
