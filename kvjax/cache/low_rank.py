"""Old tokens at a distance: keys as low-rank factors, values in the host's memory, and a landmark per chunk.

Keys before rotation are nearly the same few directions for all tokens and heads of a layer, so they are held as two
factors; a query looks at the mean key of every chunk of neighbours, and only the chunks that it finds most alike are
rebuilt, rotated to their positions and attended to, with values that are fetched for them (Sun et al., ShadowKV, arXiv
2410.21465). What the factors or the means describe badly belongs in a layout beside this one: see `far_and_near`.
"""

import dataclasses
import typing

import jax
import jax.numpy as jnp
from jax import Array, lax

from kvjax.cache.host import fetch, to_device, to_host
from kvjax.cache.layer import Layer
from kvjax.cache.slots import Slots, take_slots
from kvjax.cache.tiers import Tiers
from kvjax.cache.types import EMPTY, LayerSpec, Tokens, static
from kvjax.kernels import decode_attention
from kvjax.kernels.parts import Part, attend_part, dot_keys, dot_values, fold, masked_softmax, visible


@typing.no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class FarChunks(Layer):
    """Chunks of a prompt that are read where their landmarks ask for it. Never changes; N chunks per head.

    Attributes:
      u: Factor of the keys of all tokens before rotation [B, S, R]; heads share it.
      basis: The other factor [B, H, R, D].
      v: Values [B, H, N, P, D] of the chunks' P tokens, on the host.
      landmarks: Mean rotated key of each chunk [B, H, N, D].
      chunks: Which P tokens of `u` and `where` each chunk is [B, H, N] int32, increasing; `EMPTY` behind the last.
      where: Positions of the tokens [B, 1 or H, S] int32.
      reads: Chunks that a query reads in each row [B] int32.
      length: Length of the prompt [B] int32: embeddings that depend on it rotate rebuilt keys as they were.
      most: The largest of `reads`.
      scale: Of the landmarks' logits; 0 for the layer's own.
      host_gather: Whether the host gathers what one query reads, so that nothing else crosses the link; otherwise all
        values of the layer cross it, and are gone after the step.
    """

    u: Array
    basis: Array
    v: Array
    landmarks: Array
    chunks: Array
    where: Array
    reads: Array
    length: Array
    most: int = static()
    scale: float = static(default=0.0)
    host_gather: bool = static(default=True)

    @property
    def size(self) -> int:
        """Tokens of a chunk."""
        return self.v.shape[3]

    @property
    def pos(self) -> Array:
        return self._positions(self.chunks)

    def _tokens(self, chunks: Array) -> Array:
        """Their tokens: [B, H, K] -> [B, H, K * P], of `EMPTY` ones the first."""
        tokens = jnp.maximum(chunks, 0)[..., None] * self.size + jnp.arange(self.size, dtype=jnp.int32)
        return tokens.reshape(*chunks.shape[:2], -1)

    def _positions(self, chunks: Array) -> Array:
        there = jnp.repeat(chunks != EMPTY, self.size, -1)
        return jnp.where(there, take_slots(self.where, self._tokens(chunks)), EMPTY)

    def _keys(self, chunks: Array, pos: Array, spec: LayerSpec) -> Array:
        """Keys of chunks [B, H, K] at pos [B, H, K * P], rebuilt and rotated: [B, H, K * P, D] in the model's dtype."""
        assert spec.rotate is not None
        u = take_slots(self.u[:, None], self._tokens(chunks))
        k = jnp.einsum("bhsr,bhrd->bhsd", u, self.basis, preferred_element_type=jnp.float32).astype(self.basis.dtype)
        batch, heads, tokens, dim = k.shape
        # Heads have positions of their own, so they pass as rows. The prompt's last position goes along for embeddings
        # whose frequencies depend on how far a row reaches.
        last = jnp.broadcast_to((self.length - 1)[:, None, None], (batch, heads, 1))
        pos = jnp.concatenate([jnp.maximum(pos, 0), last], -1).reshape(batch * heads, -1)
        k = jnp.pad(k.reshape(batch * heads, 1, tokens, dim), ((0, 0), (0, 0), (0, 1), (0, 0)))
        return spec.rotate(spec.rope, k, pos)[:, :, :-1].reshape(batch, heads, tokens, dim)

    def held(self, spec: LayerSpec) -> tuple[Array, Array, Array]:
        v = to_device(self.v)
        k = self._keys(self.chunks, self.pos, spec)
        return self.pos, k.astype(jnp.float32), v.reshape(k.shape).astype(jnp.float32)

    def choose(self, new: Tokens, spec: LayerSpec) -> tuple[Array, Array]:
        """Chunks that new queries read: indices into `chunks` [B, H, T, `most`], best first, and which of them count.

        A chunk's score is its share of the softmax over all landmarks, the largest within the query group.
        """
        batch, heads, number, _ = self.landmarks.shape
        q = fold(new.q * (self.scale or spec.scale), heads)
        logits = dot_keys(q, self.landmarks.astype(q.dtype)).reshape(batch, heads, -1, new.q.shape[2], number)
        there = (self.chunks != EMPTY)[:, :, None, None]
        shares = jnp.where(there[:, :, 0], masked_softmax(logits, there).max(2), -1.0)
        share, index = lax.top_k(shares, self.most)
        return index, (jnp.arange(self.most) < self.reads[:, None, None, None]) & (share >= 0)

    def read(self, new: Tokens, spec: LayerSpec, shared: None = None, *, logits: bool = False) -> Part:
        del shared, logits
        index, counts = self.choose(new, spec)
        if new.q.shape[2] == 1:  # Only what is chosen is rebuilt and fetched.
            index, counts = index[:, :, 0], counts[:, :, 0]
            chunks = jnp.where(counts, jnp.take_along_axis(self.chunks, index, -1), EMPTY)
            pos = self._positions(chunks)
            v = fetch(self.v if self.host_gather else to_device(self.v), index)
            return decode_attention(
                new.q,
                self._keys(chunks, pos, spec),
                v.reshape(*pos.shape, -1),
                scale=spec.scale,
                q_pos=new.pos,
                pos=pos,
                window=spec.window,
                softcap=spec.softcap,
                implementation=spec.kernels,
            )
        # Many queries: all chunks once for all of them, and each sees those that it has chosen.
        pos = self.pos
        k, v = self._keys(self.chunks, pos, spec), to_device(self.v).reshape(*pos.shape, -1)
        none = jnp.zeros((*index.shape[:3], self.chunks.shape[-1]), bool)
        chosen = jnp.put_along_axis(none, index, counts, -1, inplace=False)
        mask = visible(new.pos[:, None], pos, spec.window) & jnp.repeat(chosen, self.size, -1)
        products = dot_keys(fold(new.q * spec.scale, k.shape[1]), k)
        part = attend_part(products, mask, lambda p: dot_values(p, v), spec.softcap)
        return dataclasses.replace(part, logits=None)  # They are of the chosen chunks, not of all that is held.


def far_and_near(
    k: Array,
    v: Array,
    k_raw: Array,
    pos: Array,
    *,
    rank: int,
    size: int,
    local: int,
    outliers: int,
    reads: Array,
    most: int,
    length: Array,
    scale: float = 0.0,
    host_gather: bool = True,
) -> Layer:
    """A prompt as `FarChunks` and, exactly, what they would describe badly or what is new.

    Args:
      k, v: Rotated keys and values [B, H, S, D]. k_raw: Keys before rotation.
      pos: [B, 1 or H, S] int32, `EMPTY` at the end of shorter rows.
      rank: Of the keys' factors; at most S and H * D.
      size: Tokens of a chunk.
      local: Chunks at the end that stay exact, with the tokens behind them that fill no chunk.
      outliers: Chunks per head that stay exact: those with a key that is least alike the chunk's mean.
      reads, most: Chunks that a query reads [B] int32, and the largest of them.
      length: Tokens of the prompts [B] int32.
      scale: Of the landmarks' logits; 0 for the layer's own.
      host_gather: See `FarChunks`.
    """
    batch, heads, slots, dim = k.shape
    held = jnp.broadcast_to(pos != EMPTY, (batch, heads, slots))
    cut = max(slots // size - local, 0)  # Chunks of the longest row before its local ones.
    number = max(cut - outliers, 0)
    if not number:
        return Slots(k=k, v=v, pos=pos)

    def in_chunks(x: Array) -> Array:
        return x[:, :, : cut * size].reshape(*x.shape[:2], cut, size, *x.shape[3:])

    whole = jnp.arange(cut) < (held.sum(-1) // size - local)[..., None]
    means, alike = _landmarks(in_chunks(k))
    _, worst = lax.top_k(jnp.where(whole, -alike, -jnp.inf), outliers)
    rows = jnp.arange(batch)[:, None, None], jnp.arange(heads)[None, :, None]
    far = whole.at[*rows, worst].set(False)
    chunks, there = _first(far, number)
    tokens_far = jnp.pad(jnp.repeat(far, size, -1), ((0, 0), (0, 0), (0, slots - cut * size)))
    near, counts = _first(held & ~tokens_far, min((local + outliers + 1) * size - 1, slots))
    u, basis = _factors(jnp.where(held[..., None], k_raw, 0), rank)
    return Tiers(
        tiers=(
            FarChunks(
                u=u[:, : cut * size],
                basis=basis,
                v=to_host(take_slots(in_chunks(v), chunks)),
                landmarks=take_slots(means, chunks).astype(k.dtype),
                chunks=jnp.where(there, chunks, EMPTY),
                where=pos[..., : cut * size],
                reads=reads,
                length=length,
                most=min(most, number),
                scale=scale,
                host_gather=host_gather,
            ),
            Slots(
                k=take_slots(k, near),
                v=take_slots(v, near),
                pos=jnp.where(counts, take_slots(pos, near), EMPTY),
            ),
        )
    )


def _landmarks(k: Array) -> tuple[Array, Array]:
    """Means of chunks k [B, H, N, P, D] -> [B, H, N, D] float32, and the smallest cosine of a key with it [B, H, N]."""
    k = k.astype(jnp.float32)
    means = k.mean(3)
    norms = jnp.linalg.norm(k, axis=-1) * jnp.linalg.norm(means, axis=-1)[..., None]
    cosines = jnp.einsum("bhnpd,bhnd->bhnp", k, means) / jnp.maximum(norms, 1e-12)
    return means, cosines.min(-1)


def _factors(k: Array, rank: int) -> tuple[Array, Array]:
    """Best approximation of k [B, H, S, D], heads side by side: u [B, S, R], basis [B, H, R, D] in k's dtype."""
    batch, heads, slots, dim = k.shape
    together = jnp.swapaxes(k, 1, 2).reshape(batch, slots, heads * dim).astype(jnp.float32)
    u, s, vt = jnp.linalg.svd(together, full_matrices=False)
    basis = (s[:, :rank, None] * vt[:, :rank]).reshape(batch, -1, heads, dim)
    return u[:, :, :rank].astype(k.dtype), jnp.swapaxes(basis, 1, 2).astype(k.dtype)


def _first(where: Array, number: int) -> tuple[Array, Array]:
    """Indices of the first `number` true entries of where [..., S], increasing, and which of them count."""
    slots = where.shape[-1]
    index = jnp.sort(jnp.where(where, jnp.arange(slots, dtype=jnp.int32), slots), axis=-1)[..., :number]
    return jnp.minimum(index, slots - 1), index < slots
