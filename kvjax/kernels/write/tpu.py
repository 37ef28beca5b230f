"""Writing tokens on TPUs: one Pallas kernel that changes the blocks concerned where they lie.

XLA's scatter wants tokens on rows and channels on lanes. Caches that lie otherwise (fewer than 128 channels, packed
words, scales) it turns around and back, all of them, for every token.

Every step takes the block of one token and writes all tokens that belong there. So it does not matter that blocks come
twice, nor that a block may be fetched while its last state is still on its way back: all visits write the same.

Types that kernels do not know there (float16) are updated slice by slice, which XLA also does in place.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kvjax.kernels.decode.tpu import LANES, tokens_on_lanes

ROWS = 32  # Tokens of a block where these are rows: a tile of the narrowest type.
TOKENS = 16
VMEM = 8 << 20
DTYPES = (jnp.float32, jnp.bfloat16, jnp.int32, jnp.int8, jnp.float8_e4m3fn)


def put(leaves: Any, slot: Array, values: Any, *, interpret: Any = False) -> Any:
    """As `reference.put`, in place where the leaves are donated or not used again.

    Raises:
      ValueError: The request is refused.
    """
    if reason := refuse(leaves, slot):
        raise ValueError(reason)
    flat, tree = jax.tree.flatten(leaves)
    fresh = [value.astype(leaf.dtype) for leaf, value in zip(flat, tree.flatten_up_to(values), strict=True)]
    slot, known = slot.astype(jnp.int32), [leaf.dtype in DTYPES for leaf in flat]
    mine = lambda xs: [x for x, k in zip(xs, known, strict=True) if k]  # noqa: E731
    written = iter(_put(mine(flat), slot, mine(fresh), interpret) if any(known) else ())
    pairs = zip(flat, fresh, known, strict=True)
    return tree.unflatten([next(written) if k else _update(leaf, slot, value) for leaf, value, k in pairs])


def refuse(leaves: Any, slot: Array) -> str | None:
    """Why the kernel cannot write, or None."""
    if slot.shape[2] > TOKENS:
        return f"{slot.shape[2]} tokens are too many to write one by one: at most {TOKENS}."
    for leaf in jax.tree.leaves(leaves):
        if leaf.ndim not in (3, 4):
            return f"Leaves are [B, H, S] or [B, H, S, D], not {leaf.shape}."
        if slot.shape[1] > 1 and leaf.shape[1] != slot.shape[1]:
            return f"Slots of {slot.shape[1]} heads cannot go to a leaf of {leaf.shape[1]}."
    return None


@jax.jit
def _update(leaf: Array, slot: Array, value: Array) -> Array:
    """The same for one leaf by slices, one after another."""
    (slot_heads, tokens), slots = slot.shape[1:], leaf.shape[2]
    size = (1, leaf.shape[1] if slot_heads == 1 else 1, 1, *leaf.shape[3:])

    def step(i: Array, leaf: Array) -> Array:
        b, h, t = i // (slot_heads * tokens), i // tokens % slot_heads, i % tokens
        at = slot[b, h, t]
        start = lambda n: (b, h, n, *(0 for _ in leaf.shape[3:]))  # noqa: E731
        new, old = lax.dynamic_slice(value, start(t), size), lax.dynamic_slice(leaf, start(at), size)
        return lax.dynamic_update_slice(leaf, jnp.where((at >= 0) & (at < slots), new, old), start(at))

    return lax.fori_loop(0, slot.size, step, leaf)


class View(NamedTuple):
    """How the kernel sees leaves of one shape: [B, H, S, D] with tokens as rows, or on lanes [B, H, D, S].

    A leaf [B, H, S] has one number per token: its heads count as channels, [B, 1, H, S].
    """

    lanes: bool
    numbers: bool

    @property
    def unit(self) -> int:
        """Tokens of a block."""
        return LANES if self.lanes else ROWS

    @property
    def axis(self) -> int:
        """Where the tokens are."""
        return 3 if self.lanes else 2

    def turn(self, x: Array) -> Array:
        if self.numbers:
            return x[:, None]
        return jnp.swapaxes(x, 2, 3) if self.lanes else x

    def back(self, x: Array) -> Array:
        return x[:, 0] if self.numbers else self.turn(x)


@functools.partial(jax.jit, static_argnums=3)
def _put(leaves: list[Array], slot: Array, values: list[Array], interpret: Any) -> list[Array]:
    views = [View(x.ndim == 3 or tokens_on_lanes(x.shape), x.ndim == 3) for x in leaves]
    olds = [view.turn(x) for view, x in zip(views, leaves, strict=True)]
    news = [view.turn(x) for view, x in zip(views, values, strict=True)]
    batch, heads, (_, slot_heads, tokens) = slot.shape[0], max(x.shape[1] for x in olds), slot.shape
    together = 1 if slot_heads > 1 else _heads_together(views, olds, heads)

    def new(x: Array) -> pl.BlockSpec:
        many = x.shape[1] > 1
        shape = (None, together if many else 1, *x.shape[2:])
        return pl.BlockSpec(shape, lambda b, h, t, _: (b, h * many, 0, 0))

    def old(view: View, x: Array) -> pl.BlockSpec:
        many, slots = x.shape[1] > 1, x.shape[view.axis]
        shape = (x.shape[2], view.unit) if view.lanes else (view.unit, x.shape[3])

        def at(b, h, t, where):
            block = _block(where[_number(b, h, t, slot_heads, tokens)], slots, view.unit)
            return (b, h * many, 0, block) if view.lanes else (b, h * many, block, 0)

        return pl.BlockSpec((None, together if many else 1, *shape), at)

    blocks = [old(view, x) for view, x in zip(views, olds, strict=True)]
    written = pl.pallas_call(
        functools.partial(_kernel, views=views, slots=leaves[0].shape[2], slot_heads=slot_heads, tokens=tokens),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, heads // together if slot_heads == 1 else slot_heads, tokens),
            in_specs=[
                pl.BlockSpec((None, slot_heads, tokens), lambda b, h, t, _: (b, 0, 0)),
                [new(x) for x in news],
                blocks,
            ],
            out_specs=blocks,
        ),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in olds],
        input_output_aliases={2 + len(news) + i: i for i in range(len(olds))},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        interpret=interpret,
        name="kvjax_write",
    )(slot.reshape(-1), slot, news, olds)
    return [view.back(x) for view, x in zip(views, written, strict=True)]


def _heads_together(views: list[View], olds: list[Array], heads: int) -> int:
    """Heads of one step where all have the same slots: a divisor of all that leaves room in fast memory."""
    size = sum(view.unit * x.dtype.itemsize * x.shape[5 - view.axis] for view, x in zip(views, olds, strict=True))
    return max(n for n in range(1, heads + 1) if heads % n == 0 and (n == 1 or 4 * n * size <= VMEM))


def _number(b, h, t, slot_heads: int, tokens: int):
    """Where the slot of a token stands in the flat table."""
    return (b * slot_heads + (h if slot_heads > 1 else 0)) * tokens + t


def _block(slot, slots: int, unit: int):
    """The block of a slot; of one that lies outside, some block, which will not change."""
    return jnp.clip(slot, 0, slots - 1) // unit


def _kernel(where, column, news, olds, *outs, views: list[View], slots: int, slot_heads: int, tokens: int):
    b, h, t = (pl.program_id(axis) for axis in range(3))
    first, all_slots = where[_number(b, h, t, slot_heads, tokens)], column[...]
    for view, new, old, out in zip(views, news, olds, outs, strict=True):
        x, value = _wide(old[...]), _wide(new[...])
        axis = view.axis - 1
        slot = _block(first, slots, view.unit) * view.unit + lax.broadcasted_iota(jnp.int32, x.shape, axis)
        for i in range(tokens):
            at = all_slots[None, :, i : i + 1] if view.numbers else where[_number(b, h, i, slot_heads, tokens)]
            x = jnp.where(slot == at, lax.slice_in_dim(value, i, i + 1, axis=axis), x)
        out[...] = _narrow(x, out.dtype)


def _wide(x: Array) -> Array:
    """The same numbers, or bits, in 32 bits."""
    if x.dtype == jnp.float8_e4m3fn:
        x = lax.bitcast_convert_type(x, jnp.int8)
    return {jnp.dtype(jnp.bfloat16): x.astype(jnp.float32), jnp.dtype(jnp.int8): x.astype(jnp.int32)}.get(x.dtype, x)


def _narrow(x: Array, dtype) -> Array:
    if dtype == jnp.float8_e4m3fn:
        return lax.bitcast_convert_type(x.astype(jnp.int8), dtype)
    return x.astype(dtype)
