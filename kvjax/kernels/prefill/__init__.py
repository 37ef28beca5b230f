"""Attention of a prompt, or of a chunk of one, over itself and what came before; and what can be seen of it."""

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from kvjax.kernels.prefill import reference, tpu, xla
from kvjax.kernels.prefill.request import Past as Past, Prefill as Prefill, Request as Request, make_request
from kvjax.kernels.prefill.statistics import ColumnSums as ColumnSums, Statistics as Statistics
from kvjax.kernels.prefill.xla import BLOCK as BLOCK

Implementation = Literal["auto", "reference", "xla", "tpu"]


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
        sees its own, positions start anew in each, and "last" means the last token of its own. Exclusive with `past`.
      past: Keys and values that the queries see besides, by position.
      statistics: What to say besides the output, over the keys of the past and the new ones.
      implementation: "auto" takes the Pallas kernels on TPUs, if they can serve the request, and XLA elsewhere.
      block: Queries that attend at once: bounds memory, changes no result but by rounding.

    Returns:
      The output and the statistics. Gradients with respect to q, k and v (and those of the past) are XLA's.

    Raises:
      ValueError: Shapes do not fit, or the implementation that is asked for cannot serve the request.
    """
    request = make_request(
        q, k, v, pos, scale=scale, window=window, softcap=softcap, segments=segments, past=past, statistics=statistics
    )
    if implementation == "auto":
        implementation = "tpu" if jax.default_backend() == "tpu" and tpu.refuse(request) is None else "xla"
    reason = refuse(request, implementation)
    if reason is not None:
        raise ValueError(f"{reason}. Others: {', '.join(alternatives(request, implementation))}.")
    if implementation == "tpu":
        return _on_tpu(request, block)
    return reference.prefill(request) if implementation == "reference" else xla.prefill(request, block=block)


def refuse(request: Request, implementation: Implementation) -> str | None:
    """Why an implementation cannot serve a request, in one sentence without its full stop, or None."""
    if implementation not in ("auto", "reference", "xla", "tpu"):
        return f'there is no implementation "{implementation}" of prefill attention'
    return tpu.refuse(request) if implementation == "tpu" else None


def alternatives(request: Request, implementation: Implementation) -> list[str]:
    """Other implementations that can serve the request, in quotes."""
    names: tuple[Implementation, ...] = ("auto", "xla", "tpu", "reference")
    return [f'"{name}"' for name in names if name != implementation and refuse(request, name) is None]


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


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _on_tpu(request: Request, block: int | None) -> Prefill:
    """The kernels, with the gradient of the blockwise definition."""
    return tpu.prefill(request, block=block)


def _forward(request: Request, block: int | None) -> tuple[Prefill, Request]:
    return _on_tpu(request, block), request


def _backward(block: int | None, request: Request, gradient: Prefill) -> tuple[Any]:
    leaves, tree = jax.tree.flatten(request)
    floats = [jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in leaves]

    def run(*given: Array) -> Prefill:
        rest = iter(given)
        full = [next(rest) if real else leaf for leaf, real in zip(leaves, floats, strict=True)]
        return xla.prefill(jax.tree.unflatten(tree, full), block=block)

    _, pull = jax.vjp(run, *(leaf for leaf, real in zip(leaves, floats, strict=True) if real))
    pulled = iter(pull(gradient))
    nothing = lambda leaf: np.zeros(leaf.shape, jax.dtypes.float0)  # noqa: E731
    return (
        jax.tree.unflatten(
            tree, [next(pulled) if real else nothing(leaf) for leaf, real in zip(leaves, floats, strict=True)]
        ),
    )


_on_tpu.defvjp(_forward, _backward)
