"""Decode attention as its definition says, everything dense and in float32: what the other implementations equal."""

import jax.numpy as jnp
from jax import Array

from kvjax.kernels.decode.request import Request
from kvjax.kernels.parts import Part, attend_part, merge, visible


def decode(request: Request) -> Part:
    """The answer to a request; materialises keys, values and logits."""
    k = request.k.decode()
    v = k[..., -request.latent :] if request.v is None else request.v.decode()
    logits = jnp.einsum("bhnd,bhsd->bhns", request.q.astype(jnp.float32), k)
    logits = logits if request.bias is None else logits + request.bias
    old = _attend(logits, stored_mask(request), v, request.softcap)
    if request.tail is None:
        return old if request.logits else Part(out=old.out, lse=old.lse)
    tail = request.tail
    logits = jnp.einsum("bhnd,bhsd->bhns", request.q.astype(jnp.float32), tail.k.astype(jnp.float32))
    mask = visible(request.q_pos[:, None], tail.pos, request.window)
    part = merge([old, _attend(logits, mask, tail.v.astype(jnp.float32), request.softcap)])
    return part if request.logits else Part(out=part.out, lse=part.lse)


def stored_mask(request: Request) -> Array:
    """Which stored slots each new token sees: [B, H, T, S] bool."""
    slot = jnp.arange(request.k.slots, dtype=jnp.int32)
    mask = (slot < request.lengths[..., None])[:, :, None] & (request.q_pos >= 0)[:, None, :, None]
    if request.pos is None:
        return mask
    return mask & visible(request.q_pos[:, None], request.pos, request.window)


def _attend(logits: Array, mask: Array, v: Array, softcap: float) -> Part:
    seen = mask.any(2)[..., None]  # What nobody sees may hold anything, and 0 * NaN would be NaN.
    return attend_part(logits, mask, lambda p: jnp.einsum("bhns,bhsd->bhnd", p, jnp.where(seen, v, 0.0)), softcap)
