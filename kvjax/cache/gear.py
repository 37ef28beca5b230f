"""GEAR's layout: blocks of tokens as a packed backbone, exact outliers and a low-rank matrix of what is still missing.

A block is `X ~ D + S + L` (Kang et al., GEAR, arXiv 2403.05527, section 3). S: of every vector, a key channel over the
block's tokens or a value's token over the channels of all heads, the largest and the smallest entries are kept as they
are; the backbone sees the vector's mean in their place. D: those vectors packed to 2, 4 or 8 bits in groups. L: rank r,
of the error that D + S leaves, per head, by power iteration.

The prompt is one block, cut to a multiple of R tokens; the rest and what is decoded wait in a buffer in full precision.
As soon as R are together they become a block of their own, so nothing is ever compressed twice.
"""

import dataclasses
import typing
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from kvjax.cache.grouped import put_vectors
from kvjax.cache.layer import Layer
from kvjax.cache.slots import put_slots, take_slots
from kvjax.cache.types import EMPTY, LayerSpec, Tokens, static
from kvjax.kernels import Part, Tail, Vectors, decode_attention, merge, write
from kvjax.kernels.packing import pack, round_to_nearest
from kvjax.kernels.parts import fold, part_weights


@dataclasses.dataclass(frozen=True, kw_only=True)
class GearRecipe:
    """How blocks are compressed; a static argument.

    Attributes:
      bits: Width of a code.
      group: Tokens (keys) or channels (values) that share scale and zero; 0: the whole vector (KCVT), which for a value
        are the channels of all heads.
      sparsity: Share of a vector's entries that are outliers, half of them large, half small; rounded down.
      ranks: Of the prompt's block and of later ones; 0 leaves L out.
      loops: Of the power iteration.
      buffer: R, tokens.
      dtype: Of scales, zeros, outliers and factors.
      seed: Of the vectors that the power iteration starts from: the same for every row and every block.
    """

    bits: int = 2
    group: int = 64
    sparsity: float = 0.02
    ranks: tuple[int, int] = (4, 2)
    loops: int = 3
    buffer: int = 64
    dtype: str = "float16"
    seed: int = 0

    def outliers(self, size: int) -> int:
        """Outliers on each side of a vector of so many entries."""
        return int(size * self.sparsity / 2)

    def starts(self, heads: int, dims: tuple[int, int], rank: int) -> tuple[Array, Array]:
        """Of the power iterations for keys and values of dims channels: [H, D, rank] float32."""
        keys, values = jax.random.split(jax.random.key(self.seed))
        return jax.random.uniform(keys, (heads, dims[0], rank)), jax.random.uniform(values, (heads, dims[1], rank))


@typing.no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Blocks:
    """N blocks of T tokens of keys or of values.

    Attributes:
      packed: D, the backbone [B, H, N * T, D]; groups are of tokens for keys, of channels for values.
      outliers: S, kept entries: [B, H, N, D, n] of a key channel, [B, 1, N, T, n] of a value's token over all heads.
      index: Where they stand: token of the block, or head * D + channel; beyond the last where there is none.
      left, right: Factors of L: [B, H, N, T, r] and [B, H, N, D, r].
      keys: Whether these are keys.
    """

    packed: Vectors
    outliers: Array
    index: Array
    left: Array
    right: Array
    keys: bool = static()

    def _places(self) -> tuple[Array, Array, Array, Array]:
        """Batch, head, slot and channel of every outlier, which broadcast to the shape of `index`."""
        tokens, dim = self.left.shape[3], self.right.shape[3]
        batch, head, block, row, _ = jnp.ix_(*(jnp.arange(n, dtype=jnp.int32) for n in self.index.shape))
        index = self.index.astype(jnp.int32)
        if self.keys:
            slot = jnp.where(index < tokens, block * tokens + index, self.packed.slots)
            return batch, head, slot, row
        return batch, index // dim, block * tokens + row, index % dim

    def _beyond(self) -> Array:
        """What outliers have beyond the backbone in their place, zero where there is none; shaped as `index`."""
        tokens, heads, dim = self.left.shape[3], self.left.shape[1], self.right.shape[3]
        there = self.index < (tokens if self.keys else heads * dim)
        return jnp.where(there, self.outliers.astype(jnp.float32) - self.packed.at(*self._places()), 0.0)

    def dense(self) -> Array:
        """D + S: [B, H, N * T, D] float32."""
        return self.packed.decode().at[self._places()].set(self.outliers.astype(jnp.float32), mode="drop")

    def read_back(self) -> Array:
        """D + S + L: [B, H, N * T, D] float32."""
        low = jnp.einsum("bhntr,bhndr->bhntd", self.left.astype(jnp.float32), self.right.astype(jnp.float32))
        return self.dense() + low.reshape(self.packed.codes.shape[:3] + low.shape[-1:])

    def more_logits(self, q: Array) -> Array:
        """What S and L add to the products of q [B, H, M, D] with the keys of D: [B, H, M, N * T] float32."""
        q, slots = q.astype(jnp.float32), self.packed.slots
        near = jnp.einsum("bhmd,bhndr->bhmnr", q, self.right.astype(jnp.float32))
        low = jnp.einsum("bhmnr,bhntr->bhmnt", near, self.left.astype(jnp.float32))
        low = low.reshape(*q.shape[:3], slots)
        if not self.outliers.shape[-1]:
            return low
        batch, head, slot, _ = self._places()
        # One entry of the index moves a whole column of queries.
        each = self._beyond()[..., None] * jnp.swapaxes(q, 2, 3)[:, :, None, :, None]
        sparse = jnp.zeros((*q.shape[:2], slots, q.shape[2])).at[batch, head, slot].add(each, mode="drop")
        return low + jnp.swapaxes(sparse, 2, 3)

    def more_output(self, p: Array) -> Array:
        """What S and L add to the values of D weighted by p [B, H, M, N * T]: [B, H, M, D] float32."""
        (batch, heads, rows, _), (blocks, tokens, dim) = p.shape, (*self.left.shape[2:4], self.right.shape[3])
        split = p.reshape(batch, heads, rows, blocks, tokens)
        near = jnp.einsum("bhmnt,bhntr->bhmnr", split, self.left.astype(jnp.float32))
        low = jnp.einsum("bhmnr,bhndr->bhmd", near, self.right.astype(jnp.float32))
        if not self.outliers.shape[-1]:
            return low
        b, head, slot, channel = self._places()
        weights = jnp.swapaxes(p, 2, 3).at[b, head, slot].get(mode="clip")  # [B, 1, N, T, n, M].
        out = (
            jnp.zeros((batch, heads, dim, rows))
            .at[b, head, channel]
            .add(self._beyond()[..., None] * weights, mode="drop")
        )
        return low + jnp.swapaxes(out, 2, 3)

    def put(self, block: Array, new: "Blocks") -> "Blocks":
        """Overwrites block [B] with a new one (N = 1); beyond the last nothing is written."""
        old, fresh = ({name: getattr(x, name) for name in PER_BLOCK} for x in (self, new))
        leaves = write.put_block(old, dict.fromkeys(PER_BLOCK, block), fresh)
        packed = put_vectors(self.packed, block * self.left.shape[3], new.packed)
        return dataclasses.replace(self, packed=packed, **leaves)

    def resize(self, blocks: int, one: "Blocks") -> "Blocks":
        """Room for so many blocks in all; `one` has the shapes of a block."""

        def more(leaf: Array, of_one: Array) -> Array:
            extra = blocks * of_one.shape[2] - leaf.shape[2]
            return jnp.pad(leaf, ((0, 0), (0, 0), (0, extra)) + ((0, 0),) * (leaf.ndim - 3))

        return jax.tree.map(more, self, one)


PER_BLOCK = ("outliers", "index", "left", "right")  # Leaves with a block on the third axis.


def find_outliers(rows: Array, number: int, counts: Array, held: Array) -> tuple[Array, Array]:
    """The largest and the smallest entries of rows [B, H, R, E].

    Args:
      number: Of them on each side, at most.
      counts: How many of these count in each row of the batch [B] int32.
      held: Entries that are there [B, 1, 1, E] bool or broadcastable.

    Returns:
      Their values and indices [B, H, R, 2 * number], the index E where an entry does not count.
    """
    sides = [lax.top_k(jnp.where(held, signed, -jnp.inf), number)[1] for signed in (rows, -rows)]
    counting = (jnp.arange(number, dtype=jnp.int32) < counts[:, None])[:, None, None]
    index = jnp.concatenate([jnp.where(counting, side, rows.shape[-1]) for side in sides], -1)
    return jnp.take_along_axis(rows, jnp.minimum(index, rows.shape[-1] - 1), -1), index


def power_iteration(error: Array, start: Array, loops: int) -> tuple[Array, Array]:
    """Factors left [B, H, T, r], right [B, H, D, r] of error [B, H, T, D], nearly its best approximation of rank r.

    Args:
      start: Of the right factor, [H, D, r]. In the last loop it is made orthonormal before the product, left after.
    """
    right = jnp.broadcast_to(start.astype(jnp.float32), (error.shape[0], *start.shape))
    left = jnp.zeros((*error.shape[:3], start.shape[-1]), jnp.float32)
    for loop in range(loops):
        last = loop == loops - 1
        left = error @ (jnp.linalg.qr(right)[0] if last else right)
        left = jnp.linalg.qr(left)[0] if last else left
        right = jnp.swapaxes(error, -1, -2) @ left
    return left, right


def compress_block(x: Array, held: Array, recipe: GearRecipe, start: Array, keys: bool) -> Blocks:
    """One block (N = 1) of keys or values.

    Args:
      x: [B, H, T, D].
      held: Tokens of each row [B, T] bool, the first ones; of padding nothing matters.
      start: [H, D, r].
    """
    batch, heads, tokens, dim = x.shape
    x, dtype = jnp.where(held[:, None, :, None], x.astype(jnp.float32), 0.0), jnp.dtype(recipe.dtype)
    if keys:  # Vectors are channels; a shorter row has shorter ones, with fewer outliers.
        rows, valid, size = jnp.swapaxes(x, -1, -2), held[:, None, None], held.sum(-1, dtype=jnp.int32)
        counts = jnp.asarray([recipe.outliers(n) for n in range(tokens + 1)], jnp.int32)[size]
    else:  # Vectors are tokens, all heads together.
        rows, valid = jnp.moveaxis(x, 1, 2).reshape(batch, 1, tokens, -1), jnp.ones((1, 1, 1, 1), bool)
        size = jnp.full((batch,), heads * dim, jnp.int32)
        counts = jnp.full((batch,), recipe.outliers(heads * dim), jnp.int32)
    entries = rows.shape[-1]
    outliers, index = find_outliers(rows, recipe.outliers(entries), counts, valid)
    mean = rows.sum(-1, keepdims=True) / jnp.maximum(size, 1)[:, None, None, None]
    smooth = jnp.where(valid, rows, mean)  # Padding gets the mean as outliers do: that widens no group.
    place = jnp.ix_(*(jnp.arange(n, dtype=jnp.int32) for n in rows.shape[:3]))
    place = (*(axis[..., None] for axis in place), index)
    smooth = smooth.at[place].set(jnp.broadcast_to(mean, index.shape), mode="drop")
    by_head = (lambda y: y) if keys else lambda y: jnp.moveaxis(y.reshape(batch, tokens, heads, dim), 2, 1)
    if recipe.group:  # Groups of a value end with its head.
        smooth = by_head(smooth)
        codes, scale, zero = round_to_nearest(smooth, recipe.bits, min(recipe.group, smooth.shape[-1]), -1, dtype)
    else:
        codes, scale, zero = round_to_nearest(smooth, recipe.bits, entries, -1, dtype)
        codes = by_head(codes)
    if keys:
        codes, scale, zero = (jnp.swapaxes(x, -1, -2) for x in (codes, scale, zero))
    block = Blocks(
        packed=Vectors(codes=pack(codes, recipe.bits), scale=scale, zero=zero, bits=recipe.bits),
        outliers=outliers.astype(dtype)[:, :, None],
        index=index.astype(jnp.uint16 if entries < 2**16 else jnp.int32)[:, :, None],
        left=jnp.zeros((batch, heads, 1, tokens, 0), dtype),
        right=jnp.zeros((batch, heads, 1, dim, 0), dtype),
        keys=keys,
    )
    if not start.shape[-1]:
        return block
    error = jnp.where(held[:, None, :, None], x - block.dense(), 0.0)
    left, right = (f.astype(dtype)[:, :, None] for f in power_iteration(error, start, recipe.loops))
    return dataclasses.replace(block, left=left, right=right)


@typing.no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class GearSlots(Layer):
    """One layer in GEAR's layout: [the prompt's block | later blocks | the buffer], slot by slot.

    Attributes:
      k, v: The prompt's block (of P tokens; shorter rows fill its beginning) and the later ones, N of R tokens.
      k_buffer, v_buffer: [B, H, R, D], in the model's dtype, filled from the front.
      pos: Positions [B, 1 or H, P + N * R + R] int32, `EMPTY` where there is none.
      recipe: How blocks are compressed.
    """

    k: tuple[Blocks, Blocks]
    v: tuple[Blocks, Blocks]
    k_buffer: Array
    v_buffer: Array
    pos: Array
    recipe: GearRecipe = static()

    @property
    def first(self) -> int:
        """P: places of the prompt's block."""
        return self.k[0].left.shape[2] * self.k[0].left.shape[3]

    @property
    def blocks(self) -> int:
        """N: later blocks that there is room for."""
        return self.k[1].left.shape[2]

    @property
    def buffered(self) -> Array:
        """Tokens in the buffer [B] int32; all heads hold the same number."""
        return (self.pos[:, 0, -self.recipe.buffer :] != EMPTY).sum(-1, dtype=jnp.int32)

    @property
    def used(self) -> Array:
        """Later blocks in use [B] int32."""
        later = self.pos[:, 0, self.first : -self.recipe.buffer]
        return (later != EMPTY).sum(-1, dtype=jnp.int32) // self.recipe.buffer

    @property
    def room(self) -> Array:
        """The buffer's last place stays free unless there is a block for what it would complete."""
        return (self.blocks - self.used) * self.recipe.buffer + self.recipe.buffer - 1 - self.buffered

    def read(self, new: Tokens, spec: LayerSpec, shared: Any = None, *, logits: bool = False) -> Part:
        return self._ask(new, spec, None, logits)

    def read_both(self, new: Tokens, spec: LayerSpec, shared: Any = None, *, logits: bool = False) -> Part:
        return self._ask(new, spec, Tail(k=new.k, v=new.v, pos=new.pos[:, None]), logits)

    def _ask(self, new: Tokens, spec: LayerSpec, tail: Tail | None, logits: bool) -> Part:
        cuts = self.first, self.pos.shape[-1] - self.recipe.buffer
        of_blocks, buffered = jnp.split(self.pos, cuts, -1)[:2], self.pos[..., cuts[1] :]
        pairs = zip(self.k, self.v, of_blocks, strict=True)
        parts = [read_blocks(new, spec, k, v, pos) for k, v, pos in pairs if pos.shape[-1]]
        rest = decode_attention(
            new.q,
            self.k_buffer,
            self.v_buffer,
            scale=spec.scale,
            q_pos=new.pos,
            pos=buffered,
            window=spec.window,
            softcap=spec.softcap,
            tail=tail,
            logits=logits,
            implementation=spec.kernels,
        )
        return merge([*parts, rest])

    def held(self, spec: LayerSpec) -> tuple[Array, Array, Array]:
        del spec
        sides = ((*self.k, self.k_buffer), (*self.v, self.v_buffer))
        k, v = (
            jnp.concatenate([first.read_back(), later.read_back(), recent.astype(jnp.float32)], 2)
            for first, later, recent in sides
        )
        return jnp.broadcast_to(self.pos, k.shape[:3]), k, v

    def append(self, new: Tokens, marks: Array | None = None) -> "GearSlots":
        del marks
        tokens = (jnp.moveaxis(new.k, 2, 0)[:, :, :, None], jnp.moveaxis(new.v, 2, 0)[:, :, :, None], new.pos.T)
        if new.pos.shape[1] == 1:
            return self._append_one(*(x[0] for x in tokens))
        return lax.scan(lambda layer, token: (layer._append_one(*token), None), self, tokens)[0]

    def _append_one(self, k: Array, v: Array, pos: Array) -> "GearSlots":
        """k, v [B, H, 1, D], pos [B]; a row with `EMPTY`, or without room, stays as it is."""
        size, total = self.recipe.buffer, self.pos.shape[-1]
        fits = (pos != EMPTY) & (self.room > 0)
        slot = jnp.where(fits, self.buffered, size)[:, None, None]
        place = jnp.where(fits[:, None, None], total - size + slot, total)
        position = jnp.broadcast_to(pos[:, None, None], (*self.pos.shape[:2], 1))
        layer = dataclasses.replace(
            self,
            k_buffer=put_slots(self.k_buffer, slot, k, whole=True),
            v_buffer=put_slots(self.v_buffer, slot, v, whole=True),
            pos=put_slots(self.pos, place, position, whole=True),
        )
        if not self.blocks:
            return layer
        full = layer.buffered == size
        return write.when(full.any(), lambda layer: layer._flush(full), layer)

    def _flush(self, full: Array) -> "GearSlots":
        """The buffer becomes a block in rows where it is full [B]."""
        size, total, recipe = self.recipe.buffer, self.pos.shape[-1], self.recipe
        held = jnp.broadcast_to(full[:, None], (full.shape[0], size))
        block, starts = jnp.where(full, self.used, self.blocks), self._starts()
        k, v = (
            (first, later.put(block, compress_block(x, held, recipe, start, keys)))
            for (first, later), x, start, keys in zip(
                (self.k, self.v), (self.k_buffer, self.v_buffer), starts, (True, False), strict=True
            )
        )
        offset = jnp.arange(size, dtype=jnp.int32)
        target = jnp.where(full[:, None], self.first + block[:, None] * size + offset, total)[:, None]
        pos = put_slots(self.pos, target, self.pos[..., -size:], whole=True)
        source = jnp.where(full[:, None], total - size + offset, total)[:, None]
        return dataclasses.replace(self, k=k, v=v, pos=put_slots(pos, source, EMPTY, whole=True))

    def _starts(self) -> tuple[Array, Array]:
        """Of the power iterations for later blocks."""
        dims = self.k_buffer.shape[3], self.v_buffer.shape[3]
        return self.recipe.starts(self.k_buffer.shape[1], dims, self.recipe.ranks[1])

    def reserve(self, slots: int) -> "GearSlots":
        extra = -(-slots // self.recipe.buffer)
        split = self.pos.shape[-1] - self.recipe.buffer
        wide = jnp.pad(self.pos[..., :split], ((0, 0), (0, 0), (0, extra * self.recipe.buffer)), constant_values=EMPTY)
        k, v = (
            (first, later.resize(self.blocks + extra, _shapes(x, self.recipe, start, keys)))
            for (first, later), x, start, keys in zip(
                (self.k, self.v), (self.k_buffer, self.v_buffer), self._starts(), (True, False), strict=True
            )
        )
        return dataclasses.replace(self, k=k, v=v, pos=jnp.concatenate([wide, self.pos[..., split:]], -1))


def read_blocks(new: Tokens, spec: LayerSpec, k: Blocks, v: Blocks, pos: Array) -> Part:
    """Attention over blocks: the backbone by the kernel, which takes and hands out what outliers and factors need."""
    part = decode_attention(
        new.q,
        k.packed,
        v.packed,
        scale=spec.scale,
        q_pos=new.pos,
        pos=pos,
        window=spec.window,
        softcap=spec.softcap,
        bias=k.more_logits(fold(new.q * spec.scale, k.left.shape[1])),
        logits=True,
        implementation=spec.kernels,
    )
    return dataclasses.replace(part, out=part.out + v.more_output(part_weights(part)))


def _shapes(x: Array, recipe: GearRecipe, start: Array, keys: bool) -> Blocks:
    """Of a block of the buffer's size: abstract arrays."""
    shape = jax.ShapeDtypeStruct((*x.shape[:2], recipe.buffer, x.shape[3]), x.dtype)
    held = jax.ShapeDtypeStruct((x.shape[0], recipe.buffer), jnp.bool_)
    return jax.eval_shape(lambda x, held: compress_block(x, held, recipe, start, keys), shape, held)


def _empty(x: Array, recipe: GearRecipe, start: Array, keys: bool) -> Blocks:
    """No blocks (N = 0) of the buffer's size."""
    one = _shapes(x, recipe, start, keys)
    return jax.tree.map(lambda leaf: jnp.zeros((*leaf.shape[:2], 0, *leaf.shape[3:]), leaf.dtype), one)


def make_gear(k: Array, v: Array, pos: Array, recipe: GearRecipe) -> GearSlots:
    """Compresses a prompt.

    Args:
      k, v: [B, H, N, D], tokens in order. pos: [B, 1 or H, N] int32, `EMPTY` at the end of shorter rows.
      recipe: How.
    """
    heads, length, dims = k.shape[1], k.shape[2], (k.shape[3], v.shape[3])
    size, first = recipe.buffer, length - length % recipe.buffer
    count = (pos[:, 0] != EMPTY).sum(-1, dtype=jnp.int32)[:, None]
    packed = count - count % size  # Tokens of each row in its block [B, 1].
    held = jnp.arange(first, dtype=jnp.int32) < packed
    sides = []
    starts, later = (recipe.starts(heads, dims, rank) for rank in recipe.ranks)
    for x, of_prompt, of_later, keys in zip((k, v), starts, later, (True, False), strict=True):
        block = compress_block(x[:, :, :first], held, recipe, of_prompt, keys) if first else None
        sides.append((block or _empty(x, recipe, of_prompt, keys), _empty(x, recipe, of_later, keys)))
    offset = jnp.arange(size, dtype=jnp.int32)
    rest = jnp.minimum(packed + offset, length - 1)[:, None]
    recent = jnp.where((offset < count - packed)[:, None], take_slots(pos, rest), EMPTY)
    return GearSlots(
        k=sides[0],
        v=sides[1],
        k_buffer=take_slots(k, rest),
        v_buffer=take_slots(v, rest),
        pos=jnp.concatenate([jnp.where(held[:, None], pos[..., :first], EMPTY), recent], -1),
        recipe=recipe,
    )
