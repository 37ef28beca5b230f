"""Attention in parts: what every kernel returns, and how parts are joined.

Products accumulate in float32 and the softmax is float32 whatever the storage. Query heads of one KV head are folded
into the row axis ([B, H, G * T, D]): one matrix product per KV head, which on CPUs is five times faster than a
broadcast one.

Attention over a cache comes in parts: each store attends to what it holds and says with which total weight
(`Part.lse`), and `merge` joins the parts. So tiers, pages, prefixes and shards are all read the same way.
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import Array

FEW_ROWS = 16  # Up to so many queries, XLA's product for CPUs is two to three times faster with the keys on its left.
NEG = -1e30  # Stands for -inf: a row without any visible key stays finite and is zeroed afterwards.


def fold(x: Array, kv_heads: int) -> Array:
    """[B, H * G, T, D] -> [B, H, G * T, D]."""
    b, heads, t, d = x.shape
    return x.reshape(b, kv_heads, heads // kv_heads * t, d)


def unfold(x: Array, length: int) -> Array:
    """[B, H, G * T, D] -> [B, H * G, T, D]."""
    b, h, n, d = x.shape
    return x.reshape(b, h * n // length, length, d)


def dot_keys(q: Array, k: Array) -> Array:
    """[B, H, N, D] x [B, H, S, D] -> [B, H, N, S] float32."""
    if q.shape[2] <= FEW_ROWS:
        return jnp.swapaxes(jnp.einsum("bhsd,bhnd->bhsn", k, q, preferred_element_type=jnp.float32), 2, 3)
    return jnp.einsum("bhnd,bhsd->bhns", q, k, preferred_element_type=jnp.float32)


def dot_values(p: Array, v: Array) -> Array:
    """[B, H, N, S] x [B, H, S, D] -> [B, H, N, D] float32."""
    return jnp.einsum("bhns,bhsd->bhnd", p.astype(v.dtype), v, preferred_element_type=jnp.float32)


def visible(q_pos: Array, k_pos: Array, window: int = 0) -> Array:
    """Which keys a query may see: present, not later, and inside the window.

    Args:
      q_pos: [..., T]. k_pos: [..., S]. Both `EMPTY` (negative) where there is no token.
      window: 0 for no limit.

    Returns:
      [..., T, S] bool.
    """
    q, k = q_pos[..., :, None], k_pos[..., None, :]
    seen = (k >= 0) & (k <= q)
    return seen & (q - k < window) if window else seen


def masked_softmax(logits: Array, mask: Array, softcap: float = 0.0) -> Array:
    """Softmax over the last axis of float32 logits where mask is true; a row without any true entry is all zero."""
    if softcap:
        logits = softcap * jnp.tanh(logits / softcap)
    logits = jnp.where(mask, logits, NEG)
    weights = jnp.exp(logits - logits.max(-1, keepdims=True)) * mask
    return weights / jnp.maximum(weights.sum(-1, keepdims=True), 1e-30)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """Attention of N = G * T query rows over some of the keys.

    Attributes:
      out: Their softmax-weighted values [B, H, N, D] float32; zero where no key is visible.
      lse: Log of the sum of exponentiated logits [B, H, N] float32; `NEG` where no key is visible.
      logits: What the softmax was taken of [B, H, N, S] float32, `NEG` where masked; None where nobody can ask for
        single weights. Costs nothing under `jit` unless it is used.
    """

    out: Array
    lse: Array
    logits: Array | None = None


def attend_part(logits: Array, mask: Array, mix: Callable[[Array], Array], softcap: float = 0.0) -> Part:
    """Attention over one store.

    Args:
      logits: [B, H, G * T, S] float32, scaled.
      mask: Which slots a query sees [B, 1 or H, T, S] bool; alike for the G query heads of a group.
      mix: Values weighted by p [B, H, G * T, S] float32, which is zero where masked: -> [B, H, G * T, D] float32.
      softcap: `cap * tanh(logits / cap)` before the mask; 0 for none.
    """
    batch, heads, rows, slots = logits.shape
    length = mask.shape[2]
    if softcap:
        logits = softcap * jnp.tanh(logits / softcap)
    grouped = logits.reshape(batch, heads, rows // length, length, slots)
    logits = jnp.where(mask[:, :, None], grouped, NEG).reshape(logits.shape)
    top = logits.max(-1, keepdims=True, initial=NEG)
    weights = jnp.where(logits > NEG, jnp.exp(logits - top), 0.0)
    total = weights.sum(-1, keepdims=True)
    out = mix(weights) / jnp.maximum(total, 1e-30)
    lse = jnp.where(total > 0, top + jnp.log(jnp.maximum(total, 1e-30)), NEG)
    return Part(out=out, lse=lse[..., 0], logits=logits)


def merge(parts: Sequence[Part]) -> Part:
    """Attention over all keys of the parts together, which share none. Logits follow one another, if all have them."""
    if len(parts) == 1:
        return parts[0]
    lses = jnp.stack([part.lse for part in parts])
    top = lses.max(0)
    shares = jnp.where(lses > NEG, jnp.exp(lses - top), 0.0)
    total = shares.sum(0)
    shares = shares / jnp.maximum(total, 1e-30)
    out = jnp.stack([part.out * share[..., None] for part, share in zip(parts, shares, strict=True)]).sum(0)
    lse = jnp.where(total > 0, top + jnp.log(jnp.maximum(total, 1e-30)), NEG)
    logits = [part.logits for part in parts if part.logits is not None]
    return Part(out=out, lse=lse, logits=jnp.concatenate(logits, -1) if len(logits) == len(parts) else None)


def part_weights(part: Part) -> Array:
    """Softmax weights [B, H, N, S] of a part that knows its logits; rows that see nothing are zero."""
    assert part.logits is not None
    return jnp.where(part.logits > NEG, jnp.exp(part.logits - part.lse[..., None]), 0.0)
