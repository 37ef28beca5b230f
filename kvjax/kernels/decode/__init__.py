"""Attention of a few new tokens over a stored cache: one function for every store and every device.

It never writes a dequantized cache to memory. On TPUs and NVIDIA GPUs a Pallas kernel reads each stored byte once;
elsewhere, and where a kernel cannot serve a call, blockwise JAX does.
"""

import importlib
from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.experimental import checkify

from kvjax.kernels import choose, tuning
from kvjax.kernels.choose import Choice, Implementation, KernelError
from kvjax.kernels.decode import reference, sharded, xla
from kvjax.kernels.decode.request import Request as Request, Tail as Tail
from kvjax.kernels.parts import Part, fold, merge
from kvjax.kernels.vectors import Vectors, as_vectors

PALLAS = ("tpu", "gpu")


def decode_attention(
    q: Array,
    k: Vectors | Array,
    v: Vectors | Array | None,
    lengths: Array | None = None,
    *,
    scale: float = 1.0,
    q_pos: Array | None = None,
    pos: Array | None = None,
    window: int = 0,
    softcap: float = 0.0,
    bias: Array | None = None,
    sinks: Array | None = None,
    tail: Tail | None = None,
    latent: int = 0,
    logits: bool = False,
    implementation: Implementation = "auto",
    **options: Any,
) -> Part:
    """Attends to stored tokens, and to a tail of tokens in full precision, in one pass.

    Args:
      q: Queries of T new tokens, rotated [B, H * G, T, D].
      k, v: What is stored, [B, H, S, D]; plain arrays are taken as they are. v None: values are the last `latent`
        channels of the keys.
      lengths: Occupied slots, [B] or [B, H] int32: only the first so many are read. Default: all.
      scale: Multiplies the logits.
      q_pos: Positions of the new tokens [B, T] int32, negative for padding, which attends to nothing. Needed with `pos`
        or a tail.
      pos: Positions of the slots [B, 1 or H, S] int32, where not every occupied slot is visible: negative ones are not,
        nor those beyond `q_pos` or the window.
      window: Only keys with `q_pos - pos < window` are visible; 0 for all.
      softcap: `cap * tanh(logits / cap)`; 0 for none.
      bias: Added to the logits [B, H, G * T, S] float32.
      sinks: A logit per query head that takes part in the softmax and has no value [H * G] float32.
      tail: More tokens, masked by position.
      logits: Return the logits too, `NEG` where masked.
      implementation: "auto", "tpu", "gpu", "xla" or "reference". A Pallas kernel that is named on another machine is
        interpreted: slow, for tests.
      **options: Of the implementation, such as `block`; by default what was measured for this kind of device.

    Returns:
      Output [B, H, G * T, D] float32, log-sum-exp [B, H, G * T] and, if asked for, logits [B, H, G * T, S + R]: a
      `Part`, to be merged with others or unfolded.

    Raises:
      KernelError: Shapes do not go together, or the implementation that was named cannot serve this.
    """
    request = make_request(
        q,
        k,
        v,
        lengths,
        scale=scale,
        q_pos=q_pos,
        pos=pos,
        window=window,
        softcap=softcap,
        bias=bias,
        tail=tail,
        latent=latent,
        logits=logits,
    )
    part = serve(request, implementation, **options)
    if sinks is None:
        return part
    if sinks.shape != q.shape[1:2]:
        raise KernelError(f"sinks must have one logit for each of the {q.shape[1]} query heads, got {sinks.shape}.")
    lse = jnp.repeat(sinks.astype(jnp.float32).reshape(request.q.shape[1], -1), request.tokens, -1)
    sink = Part(out=jnp.zeros_like(part.out), lse=jnp.broadcast_to(lse, part.lse.shape))
    both = merge([part, sink])
    return Part(out=both.out, lse=both.lse, logits=part.logits)


def serve(request: Request, implementation: Implementation = "auto", **options: Any) -> Part:
    """The answer to a request; see `decode_attention`. On a mesh every device answers for its own slots."""
    mine = sharded.where(request)
    if mine is not None:
        return sharded.decode(request, mine, lambda own: serve(own, implementation, **options))
    name = explain(request, implementation).implementation
    if name == "reference":
        return reference.decode(request)
    if name == "xla":
        return xla.decode(request, **(options or tuning.tuned("decode xla", tuning.shape(request))))
    options = options or tuning.tuned("decode", tuning.shape(request))
    return _module(name).decode(request, interpret=choose.interpreted(name), **options)


def explain(request: Request, implementation: Implementation = "auto") -> Choice:
    """Which implementation serves a request, and why.

    Raises:
      KernelError: See `decode_attention`.
    """
    if not request.k.slots and implementation == "auto":
        return Choice("xla", "nothing is stored")
    return choose.choose(implementation, {name: lambda name=name: _module(name).refuse(request) for name in PALLAS})


def _module(name: str) -> Any:
    """`tpu` or `gpu`; imported when first used, because Pallas takes its time."""
    return importlib.import_module(f"kvjax.kernels.decode.{name}")


def make_request(
    q: Array,
    k: Vectors | Array,
    v: Vectors | Array | None,
    lengths: Array | None = None,
    *,
    scale: float = 1.0,
    q_pos: Array | None = None,
    pos: Array | None = None,
    tail: Tail | None = None,
    **others: Any,
) -> Request:
    """Checks the arguments of `decode_attention` and brings them into one form."""
    k, v = as_vectors(k), None if v is None else as_vectors(v)
    batch, heads, slots = k.codes.shape[:3]
    if q.ndim != 4 or q.shape[0] != batch or q.shape[1] % heads:
        raise KernelError(
            f"q must be [batch, query heads, new tokens, head_dim], with the keys' batch ({batch}) and a multiple of "
            f"their {heads} heads; got {q.shape}."
        )
    check_vectors("k", k, (batch, heads, slots), q.shape[3])
    if v is not None:
        check_vectors("v", v, (batch, heads, slots), v.dim)
    elif not 0 < others.get("latent", 0) <= k.dim:
        raise KernelError(f"Without v, latent says which of the keys' {k.dim} channels are values: 1 ... {k.dim}.")
    if q_pos is None and (pos is not None or tail is not None):
        raise KernelError("q_pos is needed to mask pos or a tail by position.")
    if others.get("window") and pos is None:
        raise KernelError("A window needs the positions of the slots (pos).")
    if pos is not None and (pos.shape[0], pos.shape[-1]) != (batch, slots):
        raise KernelError(f"pos must be [{batch}, 1 or {heads}, {slots}], got {pos.shape}.")
    bias = others.get("bias")
    rows = q.shape[1] // heads * q.shape[2]
    if bias is not None and bias.shape != (batch, heads, rows, slots):
        raise KernelError(f"bias must be {(batch, heads, rows, slots)}, got {bias.shape}.")
    lengths = jnp.full((batch,), slots, jnp.int32) if lengths is None else jnp.asarray(lengths, jnp.int32)
    lengths = jnp.broadcast_to(lengths if lengths.ndim == 2 else lengths[:, None], (batch, heads))
    fits = jnp.all((lengths >= 0) & (lengths <= slots))
    checkify.debug_check(fits, f"lengths must be between 0 and the {slots} slots that are stored.")
    return Request(
        q=fold((q * scale).astype(q.dtype), heads),
        k=k,
        v=v,
        lengths=jnp.clip(lengths, 0, slots),
        q_pos=jnp.zeros((batch, q.shape[2]), jnp.int32) if q_pos is None else q_pos,
        pos=pos,
        tail=tail,
        **others,
    )


def check_vectors(name: str, vectors: Vectors, shape: tuple[int, int, int], dim: int) -> None:
    """Raises KernelError where vectors are not [*shape, dim], or their scales do not divide them."""
    if vectors.codes.shape[:3] != shape or vectors.dim != dim:
        found = (*vectors.codes.shape[:3], vectors.dim)
        raise KernelError(f"{name} must be {(*shape, dim)} ([batch, kv_heads, slots, head_dim]), got {found}.")
    if vectors.bits and vectors.codes.dtype != jnp.int32:
        raise KernelError(
            f"{name} has {vectors.bits}-bit codes, which are held in int32 words, not {vectors.codes.dtype}."
        )
    if vectors.bits not in (0, 2, 4, 8):
        raise KernelError(f"{name}: codes have 2, 4 or 8 bits, got {vectors.bits}.")
    for what, x in (("scale", vectors.scale), ("zero", vectors.zero)):
        if x is None or not shape[2]:
            continue
        if shape[2] % x.shape[2] or dim % x.shape[3] or x.shape[1] not in (1, shape[1]):
            raise KernelError(
                f"{name}.{what} must be [{shape[0]}, 1 or {shape[1]}, a divisor of {shape[2]} slots, a divisor of "
                f"{dim} channels], got {x.shape}."
            )
