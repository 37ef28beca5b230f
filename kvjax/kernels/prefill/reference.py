"""Attention of a prompt over itself in plain jnp: what the kernels must equal, and what runs where there is none."""

import jax.numpy as jnp
from jax import Array, lax

from kvjax.kernels.parts import dot_keys, dot_values, masked_softmax, visible

BLOCK = 256  # Queries that attend to a prompt at once.


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
