"""How the Hopper kernels see what is stored, and how they decode a block of it.

Packed words are seen as 4-bit integers of the same bytes. Where those hold two codes each, kernels work on even and odd
channels in turn, and queries and outputs are reordered outside, where they are small.
"""

import dataclasses
import typing
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mosaic
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, memref, vector as mlir_vector

from kvjax.kernels.vectors import Vectors

COPY = 256  # Elements along one axis that one asynchronous copy can move.
ALIGNED = 128  # Bytes: a copy writes to multiples of them in shared memory.
WIDTH = 64  # More channels at a time take more registers.
WEAVE = 32  # Neighbouring channels that `weave` sorts.
KEYS = 64 * 256  # Numbers of a block of keys that fit registers.
CODES = (jnp.int8, jnp.float8_e4m3fn)
SCALES = (jnp.float32, jnp.bfloat16, jnp.float16)
VIEWS = {0: None, 2: jnp.int4, 4: jnp.int4, 8: jnp.int8}


@dataclasses.dataclass(frozen=True)
class Side:
    """How keys or values are stored, as the kernel sees them.

    Attributes:
      dim: Channels.
      dtype: Of the codes: bfloat16, int8, float8, or int4 for packed words.
      bits: As in `Vectors`.
      scaled: "" for no scale; "slot": one per token, without a zero, applied to logits or weights; "group": one per
        token and `group` channels; "channel": one per channel and `group` tokens.
      group: See above.
      scale_dtype: Of scale and zero.
    """

    dim: int
    dtype: Any
    bits: int = 0
    scaled: str = ""
    group: int = 1
    scale_dtype: Any = None

    @property
    def planes(self) -> int:
        """Into how many parts the channels are sorted: of two-bit codes, the even ones come first."""
        return 2 if self.bits == 2 else 1

    @property
    def dense(self) -> bool:
        """Whether tensor cores can read what is stored."""
        return self.dtype == jnp.bfloat16

    @property
    def width(self) -> int:
        """Channels of a plane that are decoded together: they share a scale where tokens have several."""
        return min(WIDTH, (self.group if self.scaled == "group" else self.dim) // self.planes)

    @property
    def layout(self) -> Any:
        """Of codes in registers. None: whatever the compiler chooses."""
        fits = self.width % WEAVE == 0 and self.scaled != "channel"
        return plgpu.Layout.WGMMA_UPCAST_4X if fits else None  # Eight neighbours to a thread, that move together.

    def in_registers(self, block: int) -> bool:
        """Whether tensor cores read a block of keys from the registers in which it is decoded, not from a tile."""
        fit = KEYS // 2 if self.dtype == jnp.float8_e4m3fn else KEYS  # Which pass through float32.
        return not self.dense and self.layout is not None and block * self.dim <= fit

    def scales(self, block: int) -> tuple[int, int]:
        """Scales of a block: rows of them, each one a vector in memory."""
        if self.scaled == "channel":
            return max(1, block // self.group), self.dim
        return 1, block * (self.dim // self.group if self.scaled == "group" else 1)

    def pitch(self, piece: int) -> int:
        """Elements from the scales of a piece in shared memory to those of the next."""
        return aligned(self.scales(piece)[1], self.scale_dtype)

    def arrivals(self, block: int, piece: int) -> int:
        """Asynchronous copies that bring a block, piece by piece."""
        return block // piece * (1 + len(self.extras()) * -(-self.scales(piece)[1] // COPY))

    def nbytes(self, block: int) -> int:
        """Bytes of a block as it is stored, scales included."""
        bits = self.bits or 8 * jnp.dtype(self.dtype).itemsize
        rows, size = self.scales(block)
        scales = len(self.extras()) * rows * size * jnp.dtype(self.scale_dtype or jnp.float32).itemsize
        return block * self.dim * bits // 8 + scales

    @property
    def fragile(self) -> bool:
        """Whether what a block is decoded to may be NaN where nobody looks."""
        return self.dtype != jnp.int8 or self.bits == 8  # Scales may be; of int8 codes they come later.

    def extras(self) -> tuple[str, ...]:
        """Names of what accompanies the codes."""
        return {"": (), "slot": ("scale",)}.get(self.scaled, ("scale", "zero"))


def aligned(size: int, dtype: Any) -> int:
    """So many elements, and what is missing before a copy may write there."""
    whole = ALIGNED // jnp.dtype(dtype).itemsize
    return -(-size // whole) * whole


def refuse_vectors(x: Vectors) -> str | None:
    dtype, (tokens, channels) = x.codes.dtype, x.group
    if x.dim % 64 or x.dim > 256:
        return f"has {x.dim} channels; 64, 128, 192 and 256 are possible."
    if x.scale is None:
        return None if dtype == jnp.bfloat16 else f"is stored as {dtype} without a scale; bfloat16 is possible."
    if x.scale.dtype not in SCALES or (x.zero is not None and x.zero.dtype != x.scale.dtype):
        return f"has scales in {x.scale.dtype}; float32, bfloat16 and float16 are possible, for scale and zero alike."
    if not x.bits and (dtype not in CODES or x.zero is not None or (tokens, channels) != (1, x.dim)):
        return f"is stored as {dtype}; int8 and float8_e4m3fn are possible, with one scale per token and no zero."
    if x.bits and (x.zero is None or (tokens > 1 and channels > 1)):
        return "has packed codes, which need a scale and a zero, per token or per channel."
    if tokens == 1 and channels != x.dim and channels not in (32, 64, 128):
        return f"shares a scale among {channels} channels; 32, 64, 128 or all are possible."
    if tokens > 1 and tokens not in (32, 64) and tokens % 128:
        return f"shares a scale among {tokens} tokens; 32, 64 and multiples of 128 are possible."
    if tokens == 1 and (x.slots * x.scale.shape[3] * x.scale.dtype.itemsize) % 16:
        return f"has scales of {x.slots} slots that cannot be copied; a multiple of 16 slots is always possible."
    return None


def side(vectors: Vectors) -> Side:
    """What the kernel has to know of how vectors are stored."""
    dtype = VIEWS[vectors.bits] or vectors.codes.dtype
    if vectors.scale is None:
        return Side(vectors.dim, dtype)
    tokens, channels = vectors.group
    scaled = "slot" if vectors.zero is None else "group" if tokens == 1 else "channel"
    group = tokens if scaled == "channel" else channels
    return Side(vectors.dim, dtype, vectors.bits, scaled, group, vectors.scale.dtype)


def views(vectors: Vectors) -> dict[str, Array]:
    """Codes and scales with rows and heads in one axis, as the kernel reads them: the same bytes."""
    flat = lambda x: x.reshape(-1, *x.shape[2:])  # noqa: E731
    codes = flat(vectors.codes)
    if view := VIEWS[vectors.bits]:
        codes = lax.bitcast_convert_type(codes, view).reshape(*codes.shape[:2], -1)
    found = {"": codes}
    for name, x in (("_scale", vectors.scale), ("_zero", vectors.zero)):
        if x is not None:
            found[name] = flat(x) if vectors.group[0] > 1 else x.reshape(x.shape[0] * x.shape[1], -1)
    return found


def sort_planes(x: Array, planes: int) -> Array:
    """[..., D] -> [..., D]: the first channel of each `planes` neighbours, then the second ones, and so on."""
    return jnp.swapaxes(x.reshape(*x.shape[:-1], -1, planes), -1, -2).reshape(x.shape)


def weave(x: Array) -> Array:
    """[..., D] -> [..., D]: channels in the order in which tensor cores take keys that were decoded in registers.

    Of 32 neighbours a thread decodes eight in a row, but each of four threads hands over two at a time. Sums over
    channels do not care, if queries have the same order.
    """
    return jnp.swapaxes(x.reshape(*x.shape[:-1], -1, 4, 4, 2), -3, -2).reshape(x.shape)


def merge_planes(x: Array, planes: int) -> Array:
    """The inverse of `sort_planes`."""
    return jnp.swapaxes(x.reshape(*x.shape[:-1], planes, -1), -1, -2).reshape(x.shape)


def unpack(raw: Array, bits: int) -> list[tuple[Array, float, float]]:
    """Codes -> for each plane numbers y in bfloat16, and what makes codes of them: `(y + offset) * factor`.

    Flipping the highest bit of an unsigned code leaves a signed one, smaller by half the range; hardware converts
    signed numbers in fewer instructions.
    """
    if bits == 8:
        return [((raw ^ jnp.int8(-128)).astype(jnp.bfloat16), 128.0, 1.0)]
    if bits == 4:
        return [((raw ^ jnp.int4(-8)).astype(jnp.bfloat16), 8.0, 1.0)]
    if bits == 2:
        low, high = raw & jnp.int4(3), (raw & jnp.int4(-4)) ^ jnp.int4(-8)
        return [(low.astype(jnp.bfloat16), 0.0, 1.0), (high.astype(jnp.bfloat16), 8.0, 0.25)]
    if raw.dtype == jnp.int8:
        return [(raw.astype(jnp.bfloat16), 0.0, 1.0)]
    return [(raw.astype(jnp.float16).astype(jnp.float32).astype(jnp.bfloat16), 0.0, 1.0)]


@dataclasses.dataclass(frozen=True)
class Places:
    """Where `size` elements of a vector in shared memory are: every `stride`-th from `start` on, in pieces.

    Attributes:
      piece: So many follow one another.
      pitch: Elements of memory from a piece's first to that of the next.
    """

    size: int
    piece: int
    pitch: int
    stride: int = 1
    start: int = 0

    @property
    def all(self) -> bool:
        """Whether they are the vector as it lies there."""
        return self.stride == 1 and (self.piece >= self.size or self.pitch == self.piece)


def pick(ref: Any, places: Places, axis: int, interpret: Any) -> Array:
    """Elements of a vector in shared memory, ready to be made wide along the other axis.

    Pallas cannot read strided vectors, which the dialect below it can and its interpreter needs not.
    """
    size, piece, pitch, stride, start = dataclasses.astuple(places)
    if places.all:
        return ref[pl.ds(0, size)]
    if interpret:
        pieces = -(-size // piece)
        kept = ref[pl.ds(0, pieces * pitch)].reshape(pieces, pitch)[:, : min(size, piece) * stride]
        return kept.reshape(size, stride)[:, start]
    layout = plgpu.Layout.WGMMA.reduce(1 - axis)
    result = plgpu.ShapeDtypeStruct((size,), ref.dtype, layout=layout)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=result)
    def load(_: Any, vector: Any) -> Any:
        dialect: Any = layout.to_mgpu()
        kind = ir.MemRefType(vector.type).element_type
        index = lambda value: arith.constant(ir.IndexType.get(), value)  # noqa: E731

        def place(at: Any) -> Any:
            inside, before = at, index(start)
            if piece < size:
                inside = arith.remui(at, index(piece))
                before = arith.addi(before, arith.muli(arith.divui(at, index(piece)), index(pitch)))
            return arith.addi(arith.muli(inside, index(stride)), before)

        registers = []
        for (at,) in dialect.thread_idxs((size,)):
            places = [place(arith.addi(at, index(i))) for i in range(dialect.vector_length)]
            elements = [memref.load(vector, [one]) for one in places]
            registers.append(mlir_vector.from_elements(ir.VectorType.get((len(elements),), kind), elements))
        return mosaic.FragmentedArray(
            _registers=np.array(registers).reshape(dialect.registers_shape((size,))),
            _layout=dialect,
            _is_signed=True if jnp.issubdtype(ref.dtype, jnp.integer) else None,
        )

    return typing.cast(Callable[[Any], Array], load)(ref)


def wide(x: Array, shape: tuple[int, ...], axis: int) -> Array:
    """Repeats a vector that lies along `axis` of a matrix."""
    return lax.broadcast_in_dim(x, shape, [axis])


def decode_block(
    side: Side, refs: dict[str, Any], alive: Array | None, piece: int, interpret: Any
) -> Iterator[tuple[int, Array]]:
    """Decodes a block of stored vectors, some channels at a time, plane by plane.

    Args:
      refs: "codes" [block, channels], and what accompanies them.
      alive: Which tokens count [block] bool: others become zero, even if what they hold is NaN. None: all.
      piece: Slots of the block that were copied together.

    Yields:
      A first channel, in the order of `sort_planes`, and vectors from there on [block, width] bfloat16.
    """
    block, width = refs["codes"].shape[0], side.width
    bf16, f32 = jnp.bfloat16, jnp.float32

    def per_group(name: str, start: int) -> Array:
        groups = side.dim // side.group
        places = Places(block, piece, side.pitch(piece), groups, start * side.planes // side.group)
        return pick(refs[name].at[0], places, 0, interpret).astype(f32)

    def per_channel(name: str, row: int, start: int, plane: int) -> Array:
        ref = refs[name].at[row, pl.ds(start * side.planes, width * side.planes)]
        return pick(ref, Places(width, width, width * side.planes, side.planes, plane), 1, interpret).astype(f32)

    def affine(start: int, plane: int, offset: float, factor: float) -> tuple[Array, Array]:
        """What numbers are multiplied by, and what is added then."""

        def both(scale: Array, zero: Array, axis: int) -> tuple[Array, Array]:
            scale, zero = scale * factor, zero + scale * (offset * factor)
            if axis == 0 and alive is not None:
                scale, zero = jnp.where(alive, scale, 0.0), jnp.where(alive, zero, 0.0)
            return wide(scale.astype(bf16), (block, width), axis), wide(zero.astype(bf16), (block, width), axis)

        if side.scaled == "group":
            return both(per_group("scale", start), per_group("zero", start), 0)
        rows = [
            both(per_channel("scale", row, start, plane), per_channel("zero", row, start, plane), 1)
            for row in range(side.scales(block)[0])
        ]
        scale, zero = rows[0]
        at = lax.broadcasted_iota(jnp.int32, (block, width), 0)
        for row, (other_scale, other_zero) in enumerate(rows[1:], 1):
            later = at >= row * side.group
            scale, zero = jnp.where(later, other_scale, scale), jnp.where(later, other_zero, zero)
        return scale, zero

    load: Callable[..., Array] = plgpu.load  # Its signature is not that of older versions.
    for start in range(0, side.dim // side.planes, width):
        raw = load(refs["codes"].at[:, pl.ds(start, width)], layout=side.layout, optimized=False)
        for plane, (y, offset, factor) in enumerate(unpack(raw, side.bits)):
            if side.scaled in ("group", "channel"):
                scale, zero = affine(start, plane, offset, factor)
                y = y * scale + zero
            if alive is not None and side.scaled != "group":
                y = jnp.where(wide(alive, y.shape, 0), y, jnp.bfloat16(0))
            yield plane * (side.dim // side.planes) + start, y


def as_operand(parts: Sequence[Array]) -> Array:
    """Neighbouring channels of a block of keys [block, width], as `Side.layout` has them in registers -> all of them
    [block, D] as tensor cores take them, in the order of `weave`: no register moves.
    """
    (block, width), number = parts[0].shape, len(parts)
    result = plgpu.ShapeDtypeStruct((block, number * width), jnp.bfloat16, layout=plgpu.Layout.WGMMA)

    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA_UPCAST_4X,) * number, return_type=result)
    def rename(_: Any, *parts: Any) -> Any:
        layout = plgpu.Layout.WGMMA.to_mgpu()
        registers = np.empty(layout.registers_shape((block, number * width)), object)
        pair = ir.VectorType.get((2,), ir.BF16Type.get())
        for n, part in enumerate(parts):
            for (row, column, *inner), register in np.ndenumerate(part.registers):
                first = 4 * (n * width // WEAVE + column)
                for i in range(4):
                    pieces = mlir_vector.extract_strided_slice(pair, register, [2 * i], [2], [1])
                    registers[(row, first + i, *inner)] = pieces
        return mosaic.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)

    return typing.cast(Callable[..., Array], rename)(*parts)
