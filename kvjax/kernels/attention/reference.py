"""Exact attention in plain jnp: what the kernels must equal, and what runs where there is no kernel.

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
from jax import Array, lax

BLOCK = 256  # Queries that attend to a prompt at once.
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


def _attend(q, k, v, q_pos, k_pos, window, softcap):
    """One block: q [B, H, G, T, D] scaled, k, v [B, H, S, D] -> output [B, H, G, T, D], weights [B, H, G, T, S]."""
    b, h, g, t, d = q.shape
    logits = dot_keys(q.reshape(b, h, g * t, d), k).reshape(b, h, g, t, -1)
    weights = masked_softmax(logits, visible(q_pos, k_pos, window)[:, None, None], softcap)
    out = dot_values(weights.reshape(b, h, g * t, -1), v)
    return out.reshape(b, h, g, t, -1), weights


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
    """Causal self-attention of a prompt in blocks of queries, so that no [T, T] matrix is ever whole.

    Args:
      q: [B, H * G, T, D], rotated. k, v: [B, H, T, D]; values may have another number of channels than keys.
      pos: [B, T] int32, increasing where present, `EMPTY` for padding; a padding query returns zeros.
      column_sums: Also return the attention that each key receives, summed over all queries (H2O's statistic).
      block: Queries per block.

    Returns:
      Output [B, H * G, T, D] in v's dtype; column sums [B, H * G, T] float32 or None.
    """
    b, heads, length, d = q.shape
    kv_heads = k.shape[1]
    padded = -length % block if length > block else 0
    if padded:
        widths = ((0, 0), (0, 0), (0, padded), (0, 0))
        q, k, v = (jnp.pad(x, widths) for x in (q, k, v))
        pos = jnp.pad(pos, ((0, 0), (0, padded)), constant_values=-1)
    total = length + padded
    block = min(block, total)
    blocks = total // block
    q = (q * scale).astype(k.dtype).reshape(b, kv_heads, heads // kv_heads, blocks, block, d)
    q, q_pos = jnp.moveaxis(q, 3, 0), jnp.moveaxis(pos.reshape(b, blocks, block), 1, 0)
    sums = jnp.zeros((b, kv_heads, heads // kv_heads, total if column_sums else 0), jnp.float32)

    def run(q, q_pos, k, v, k_pos):
        out, weights = _attend(q, k, v, q_pos, k_pos, window, softcap)
        return out.astype(v.dtype), weights.sum(3) if column_sums else None

    reach = window + block if window else total  # Keys that one block of queries can see.
    if reach < total:

        def local(sums, xs):
            i, q, q_pos = xs
            start = jnp.clip((i + 1) * block - reach, 0, total - reach)
            k_, v_ = (lax.dynamic_slice_in_dim(x, start, reach, 2) for x in (k, v))
            out, col = run(q, q_pos, k_, v_, lax.dynamic_slice_in_dim(pos, start, reach, 1))
            if col is not None:
                old = lax.dynamic_slice_in_dim(sums, start, reach, 3)
                sums = lax.dynamic_update_slice_in_dim(sums, old + col, start, 3)
            return sums, out

        sums, out = lax.scan(local, sums, (jnp.arange(blocks), q, q_pos))
    else:
        # Groups of blocks share a static prefix of keys: near the causal triangle's cost with few compiled bodies.
        outs, group = [], -(-blocks // 8)
        for first in range(0, blocks, group):
            last = min(first + group, blocks)
            end = last * block

            def prefix(sums, xs, end=end):
                q, q_pos = xs
                out, col = run(q, q_pos, k[:, :, :end], v[:, :, :end], pos[:, :end])
                return (sums if col is None else sums.at[..., :end].add(col)), out

            sums, out = lax.scan(prefix, sums, (q[first:last], q_pos[first:last]))
            outs.append(out)
        out = jnp.concatenate(outs) if len(outs) > 1 else outs[0]
    out = jnp.moveaxis(out, 0, 3).reshape(b, heads, total, -1)[:, :, :length]
    return out, sums.reshape(b, heads, total)[..., :length] if column_sums else None
