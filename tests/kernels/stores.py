"""Examples of everything that may be stored and asked, small and random, for tests of kernels."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.kernels import Tail, Vectors
from kvjax.kernels.decode.request import Request
from kvjax.kernels.packing import pack, round_to_nearest

KINDS = (
    "float32",
    "bfloat16",
    "int8",
    "float8",
    "8-bit channels",
    "4-bit token",
    "4-bit channels",
    "4-bit tokens",
    "2-bit channels",
    "2-bit tokens",
)


def normal(rng: np.random.Generator, shape: tuple[int, ...], dtype=jnp.float32):
    return jnp.asarray(rng.standard_normal(shape), dtype)


def make_store(rng: np.random.Generator, kind: str, shape: tuple[int, int, int, int], group: int = 32) -> Vectors:
    """Random vectors [B, H, S, D]. "channels" and "tokens" say along what groups go; "token": one scale for each."""
    x = normal(rng, shape)
    if kind in ("float32", "bfloat16"):
        return Vectors(codes=x.astype(kind))
    if kind in ("int8", "float8"):
        dtype, most = (jnp.int8, 127.0) if kind == "int8" else (jnp.float8_e4m3fn, 448.0)
        scale = jnp.abs(x).max(-1, keepdims=True) / most
        codes = x / scale
        return Vectors(codes=(jnp.round(codes) if kind == "int8" else codes).astype(dtype), scale=scale)
    bits, along = kind.split("-bit ")
    axis = -2 if along == "tokens" else -1
    codes, scale, zero = round_to_nearest(x, int(bits), shape[3] if along == "token" else group, axis)
    return Vectors(codes=pack(codes, int(bits)), scale=scale, zero=zero, bits=int(bits))


def poison(stored: Vectors, first: int) -> Vectors:
    """NaN in every float of the slots from `first` on; groups of tokens that begin before are left alone."""

    def spoil(leaf):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf
        tokens = stored.slots // leaf.shape[2]
        return leaf.at[:, :, -(-first // tokens) :].set(jnp.nan)

    return jax.tree.map(spoil, stored)


def example(
    rng: np.random.Generator,
    kind: str,
    dim: int,
    *,
    batch: int = 2,
    heads: int = 2,
    groups: int = 3,
    rows: int = 1,
    slots: int = 200,
    options: bool = False,
    dtype=jnp.float32,
) -> Request:
    """A request with ragged lengths; with `options`, also positions, window, soft-cap, bias, tail and logits."""
    slots -= slots % 64 if "tokens" in kind else 0
    k, v = (make_store(rng, kind, (batch, heads, slots, dim)) for _ in range(2))
    lengths = jnp.asarray(rng.integers(1, 140, (batch, heads)), jnp.int32).at[0, 0].set(140)
    if heads > 1:
        lengths = lengths.at[-1, -1].set(0)
    q = normal(rng, (batch, heads, groups * rows, dim), dtype) * dim**-0.5
    now = slots + 4 + jnp.arange(rows, dtype=jnp.int32)
    request = Request(q=q.astype(dtype), k=k, v=v, lengths=lengths, q_pos=jnp.broadcast_to(now, (batch, rows)))
    if not options:
        return request
    tail = 5 + rows
    k_tail, v_tail = (normal(rng, (batch, heads, tail, dim), dtype) for _ in range(2))
    order = rng.permuted(np.broadcast_to(np.arange(slots), (batch, 1, slots)), axis=-1)
    tail_pos = jnp.broadcast_to(slots - 1 + jnp.arange(tail, dtype=jnp.int32), (batch, 1, tail)).at[0, 0, 1].set(-1)
    return dataclasses.replace(
        request,
        q_pos=request.q_pos.at[0, -1].set(-1 if rows > 1 else request.q_pos[0, -1]),
        pos=jnp.asarray(order, jnp.int32).at[:, :, 3].set(-1),
        bias=normal(rng, (batch, heads, groups * rows, slots)),
        tail=Tail(k=k_tail, v=v_tail, pos=tail_pos),
        window=150,
        softcap=5.0,
        logits=True,
    )


def check(found, wanted, tolerance: float = 2e-5) -> None:
    """Two parts are the same, up to a share of the largest output."""
    most = float(jnp.abs(wanted.out).max())
    np.testing.assert_allclose(found.out, wanted.out, atol=tolerance * most, rtol=0)
    np.testing.assert_allclose(found.lse, wanted.lse, atol=tolerance * 10, rtol=tolerance)
    assert (found.logits is None) == (wanted.logits is None)
    if wanted.logits is not None:
        np.testing.assert_allclose(found.logits, wanted.logits, atol=tolerance * 10, rtol=tolerance)
