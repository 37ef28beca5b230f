"""Decode attention in plain JAX, block by block: runs everywhere, and is fast in its own right on CPUs.

What is stored in few bits is read in few bits: a block of slots is decoded into a buffer that stays in the processor's
cache, used, and overwritten by the next. Blocks that lie beyond every row's length are never touched. The softmax is
joined from block to block as in flash attention (arXiv 2205.14135). Scales and zeros are applied to queries, logits,
weights and outputs wherever that is less work than applying them to the codes.
"""

import dataclasses
import math

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from kvjax.kernels import choose
from kvjax.kernels.decode.request import Request, Tail
from kvjax.kernels.packing import unpack
from kvjax.kernels.parts import NEG, Part, attend_part, dot_keys, dot_values, merge, visible
from kvjax.kernels.vectors import Vectors

BLOCK_BYTES = 2**18  # Of one head's decoded block: a few of them fit a core's second-level cache.


def default_block(request: Request) -> int:
    """Slots per step: all where nothing is to be decoded, else a power of two whose decoded block is small."""
    if all(x is not None and x.codes.dtype == request.q.dtype for x in (request.k, request.v)):
        return request.k.slots
    slots = BLOCK_BYTES // (4 * request.k.dim)
    return max(128, 1 << (slots.bit_length() - 1))


def decode(request: Request, *, block: int = 0) -> Part:
    """The answer to a request.

    Args:
      block: Slots per step; 0 chooses. Rounded up to whole groups of tokens.
    """
    old = _stored(request, block or default_block(request))
    return old if request.tail is None else merge([old, _tail(request, request.tail)])


def _tail(request: Request, tail: Tail) -> Part:
    mask = visible(request.q_pos[:, None], tail.pos, request.window)
    v = Vectors(codes=tail.v)
    logits = dot_keys(request.q, tail.k.astype(request.q.dtype))
    part = attend_part(logits, mask, lambda p: mix(p, v, mask.any(2), request.q.dtype), request.softcap)
    return part if request.logits else Part(out=part.out, lse=part.lse)


def _stored(request: Request, block: int) -> Part:
    batch, heads, rows, _ = request.q.shape
    slots = request.k.slots
    if slots == 0:
        return _nothing(request)
    stored = [x for x in (request.k, request.v) if x is not None]
    whole = math.lcm(*(x.group[0] for x in stored))
    block = min(-(-block // whole) * whole, slots)
    bits = [_as_bits(x) for x in stored] if block < slots else stored
    top = jnp.full((batch, heads, rows), NEG, jnp.float32)
    total = jnp.zeros((batch, heads, rows), jnp.float32)
    out = jnp.zeros((batch, heads, rows, request.value_dim), jnp.float32)
    logits = jnp.full((batch, heads, rows, slots if request.logits else 0), NEG, jnp.float32)

    def step(i: Array, state: tuple[Array, ...]) -> tuple[Array, ...]:
        top, total, out, logits = state
        start = jnp.minimum(i * block, slots - block)  # The last block overlaps the one before: masked below.
        mask = _mask(request, start, block) & (start + jnp.arange(block) >= i * block)
        k, *v = (_from_bits(b.block(start, block), x.codes.dtype) for b, x in zip(bits, stored, strict=True))
        s = dot(request.q, k)
        if request.bias is not None:
            s = s + lax.dynamic_slice_in_dim(request.bias, start, block, 3)
        if request.softcap:
            s = request.softcap * jnp.tanh(s / request.softcap)
        s = s.reshape(batch, heads, -1, request.tokens, block)
        s = jnp.where(mask[:, :, None], s, NEG).reshape(batch, heads, rows, block)
        if request.logits:
            old = lax.dynamic_slice_in_dim(logits, start, block, 3)
            logits = lax.dynamic_update_slice_in_dim(logits, jnp.maximum(old, s), start, 3)
        new = jnp.maximum(top, s.max(-1))
        p = jnp.where(s > NEG, jnp.exp(s - new[..., None]), 0.0)
        fade = jnp.exp(top - new)
        values = v[0] if v else Vectors(codes=k.decode()[..., -request.latent :])
        mixed = mix(p, values, mask.any(2), request.q.dtype)
        return new, total * fade + p.sum(-1), out * fade[..., None] + mixed, logits

    used = jnp.minimum(-(-request.lengths.max() // block), -(-slots // block))
    top, total, out, logits = lax.fori_loop(0, used, step, (top, total, out, logits))
    lse = jnp.where(total > 0, top + jnp.log(jnp.maximum(total, 1e-30)), NEG)
    out = out / jnp.maximum(total, 1e-30)[..., None]
    return Part(out=out, lse=lse, logits=logits if request.logits else None)


def _nothing(request: Request) -> Part:
    shape = request.q.shape[:3]
    logits = jnp.zeros((*shape, 0), jnp.float32) if request.logits else None
    return Part(
        out=jnp.zeros((*shape, request.value_dim), jnp.float32), lse=jnp.full(shape, NEG, jnp.float32), logits=logits
    )


def _as_bits(x: Vectors) -> Vectors:
    """Small floats as integers: XLA for CPUs would convert all of them to float32 ahead of a loop that slices them."""
    bits = {2: jnp.uint16, 1: jnp.uint8}.get(x.codes.dtype.itemsize)
    if bits is None or not jnp.issubdtype(x.codes.dtype, jnp.floating) or choose.platform() != "cpu":
        return x
    return dataclasses.replace(x, codes=lax.bitcast_convert_type(x.codes, bits))


def _from_bits(x: Vectors, dtype: DTypeLike) -> Vectors:
    """The same vectors with codes of a type that `_as_bits` may have hidden."""
    if x.codes.dtype == dtype:
        return x
    if dtype == jnp.bfloat16:
        codes = lax.bitcast_convert_type(x.codes.astype(jnp.uint32) << 16, jnp.float32)
    else:
        codes = lax.bitcast_convert_type(x.codes, dtype).astype(jnp.float32)
    return dataclasses.replace(x, codes=codes)


def _mask(request: Request, start: Array, size: int) -> Array:
    """Which of `size` slots from start on each new token sees: [B, H, T, size] bool."""
    slot = start + jnp.arange(size, dtype=jnp.int32)
    mask = (slot < request.lengths[..., None])[:, :, None] & (request.q_pos >= 0)[:, None, :, None]
    if request.pos is None:
        return mask
    pos = lax.dynamic_slice_in_dim(request.pos, start, size, 2)
    return mask & visible(request.q_pos[:, None], pos, request.window)


def _per_token(vectors: Vectors) -> bool:
    """Whether each vector has one scale, which then multiplies products instead of vectors."""
    return vectors.scale is not None and vectors.scale.shape[2:] == (vectors.slots, 1)


def _numbers(vectors: Vectors) -> Array:
    """Codes [B, H, S, D] float32, without their scales."""
    codes = unpack(vectors.codes, vectors.bits) if vectors.bits else vectors.codes
    return codes.astype(jnp.float32)


def _scaled(vectors: Vectors) -> Array:
    """Codes times scales [B, H, S, D] float32, without zeros. The shape keeps the loop over words simple."""
    numbers, (tokens, channels) = _numbers(vectors), vectors.group
    per = 32 // vectors.bits if vectors.bits and channels % (32 // vectors.bits) == 0 else 1
    batch, heads, slots, dim = numbers.shape
    split = numbers.reshape(batch, heads, slots // tokens, tokens, dim // channels, channels // per, per)
    assert vectors.scale is not None
    scale = vectors.scale.astype(jnp.float32)[:, :, :, None, :, None, None]
    return (split * scale).reshape(numbers.shape)


def _row(x: Array) -> Array:
    """[B, H, S, E] -> [B, H, E, S] float32."""
    return jnp.swapaxes(x.astype(jnp.float32), 2, 3)


def dot(q: Array, k: Vectors) -> Array:
    """q [B, H, N, D] with the keys of a block [B, H, S, D]: [B, H, N, S] float32."""
    if k.scale is None:
        return dot_keys(q, _numbers(k).astype(q.dtype))
    batch, heads, rows, dim = q.shape
    tokens, channels = k.group
    q32 = q.astype(jnp.float32)
    if _per_token(k):
        s = dot_keys(q, _numbers(k).astype(q.dtype)) * _row(k.scale)
    elif tokens > 1 and channels == 1:  # A query for each group of tokens.
        asked = q32[:, :, None] * k.scale.astype(jnp.float32)[:, :, :, None]
        keys = _numbers(k).reshape(batch, heads, -1, tokens, dim)
        keys, asked = keys.astype(q.dtype), asked.astype(q.dtype)
        s = jnp.einsum("bhgsd,bhgnd->bhgsn", keys, asked, preferred_element_type=jnp.float32)
        s = jnp.swapaxes(s.reshape(batch, heads, -1, rows), 2, 3)
    else:
        s = dot_keys(q, _scaled(k).astype(q.dtype))
    if k.zero is None:
        return s
    zero = jnp.einsum(
        "bhnd,bhgd->bhng", q32.reshape(batch, heads, rows, -1, channels).sum(-1), k.zero.astype(jnp.float32)
    )
    return s + jnp.repeat(zero, tokens, 3)


def mix(p: Array, v: Vectors, seen: Array | None = None, dtype: DTypeLike = jnp.float32) -> Array:
    """Values weighted by p [B, H, N, S], which is zero where not seen [B, H, S]: [B, H, N, D] float32.

    Products are taken in `dtype`.
    """
    seen = jnp.ones((*p.shape[:2], p.shape[3]), bool) if seen is None else seen
    if not jnp.issubdtype(v.codes.dtype, jnp.integer):
        p = p if v.scale is None else p * jnp.where(seen[:, :, None], _row(v.scale), 0.0)
        x = v.codes if v.codes.dtype == dtype else _numbers(v).astype(dtype)
        out = dot_values(p, x)
        # What nobody sees may hold anything, and 0 * NaN is NaN. Rare, so it is repaired instead of prevented.
        clean = lambda: dot_values(p, jnp.where(seen[..., None], x, 0))  # noqa: E731
        return lax.cond(jnp.isnan(out).any(), clean, lambda: out)
    assert v.scale is not None
    tokens, channels = v.group
    held = seen.reshape(*seen.shape[:2], -1, tokens).any(-1)[..., None]
    scale = jnp.where(held, v.scale.astype(jnp.float32), 0.0)
    if _per_token(v):
        out = dot_values(p * _row(scale), _numbers(v).astype(dtype))
    else:
        out = dot_values(p, _scaled(dataclasses.replace(v, scale=scale)).astype(dtype))
    if v.zero is None:
        return out
    zero = jnp.where(held, v.zero.astype(jnp.float32), 0.0)
    together = p.reshape(*p.shape[:3], -1, tokens).sum(-1)
    return out + jnp.repeat(dot_values(together, zero), channels, -1)
