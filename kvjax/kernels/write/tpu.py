"""Writing and taking tokens on TPUs: Pallas kernels that visit the blocks concerned where they lie.

XLA's scatter and gather want tokens on rows and channels on lanes, and a gather all heads of a token side by side.
Caches that lie otherwise they turn around and back, all of them, for every token.

Every step visits the block of one token. The kernel that writes puts all tokens there that belong there. So it does not
matter that blocks come twice, nor that a block may be fetched while its last state is still on its way back: all visits
write the same.

Types that kernels do not know there (float16) go slice by slice, which XLA also does in place.
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


def take(leaves: Any, slot: Array, *, interpret: Any = False) -> Any:
    """As `reference.take`.

    Raises:
      ValueError: The request is refused.
    """
    if reason := refuse_take(leaves, slot):
        raise ValueError(reason)
    flat, tree = jax.tree.flatten(leaves)
    slot, known = slot.astype(jnp.int32), [leaf.dtype in DTYPES for leaf in flat]
    mine = [leaf for leaf, k in zip(flat, known, strict=True) if k]
    taken = iter(_take(mine, slot, interpret) if mine else ())
    return tree.unflatten([next(taken) if k else _fetch(leaf, slot) for leaf, k in zip(flat, known, strict=True)])


def refuse(leaves: Any, slot: Array) -> str | None:
    """Why the kernel cannot write, or None."""
    for leaf in jax.tree.leaves(leaves):
        if slot.shape[1] > 1 and leaf.shape[1] != slot.shape[1]:
            return f"Slots of {slot.shape[1]} heads cannot go to a leaf of {leaf.shape[1]}."
    return refuse_take(leaves, slot)


def refuse_take(leaves: Any, slot: Array) -> str | None:
    """Why the kernel cannot take, or None."""
    if slot.shape[2] > TOKENS:
        return f"{slot.shape[2]} tokens are too many to go one by one: at most {TOKENS}."
    for leaf in jax.tree.leaves(leaves):
        if leaf.ndim not in (3, 4):
            return f"Leaves are [B, H, S] or [B, H, S, D], not {leaf.shape}."
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


@jax.jit
def _fetch(leaf: Array, slot: Array) -> Array:
    """Takes from one leaf by slices, one after another. Those of several heads would be turned around before."""
    (batch, _, tokens), heads = slot.shape, max(leaf.shape[1], slot.shape[1])
    rest = leaf.shape[3:]
    start = lambda b, h, n: (b, h, n, *(0 for _ in rest))  # noqa: E731
    slot, many = jnp.broadcast_to(jnp.maximum(slot, 0), (batch, heads, tokens)), leaf.shape[1] > 1

    def step(i: Array, taken: Array) -> Array:
        b, h, t = i // (heads * tokens), i // tokens % heads, i % tokens
        token = lax.dynamic_slice(leaf, start(b, h * many, slot[b, h, t]), (1, 1, 1, *rest))
        return lax.dynamic_update_slice(taken, token, start(b, h, t))

    return lax.fori_loop(0, slot.size, step, jnp.zeros((*slot.shape, *rest), leaf.dtype))


class View(NamedTuple):
    """How the kernel sees leaves of one shape: [B, H, S, D] with tokens as rows, or on lanes [B, H, D, S].

    A leaf [B, H, S] has one number per token: its heads count as channels, [B, 1, H, S].
    """

    lanes: bool
    numbers: bool

    @classmethod
    def of(cls, x: Array) -> "View":
        return cls(lanes=x.ndim == 3 or tokens_on_lanes(x.shape), numbers=x.ndim == 3)

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

    def block(self, x: Array, together: int, slot_heads: int, tokens: int) -> pl.BlockSpec:
        """Of a leaf as it is seen: the block of the token of a step, of some heads together."""
        many, slots = x.shape[1] > 1, x.shape[self.axis]
        shape = (x.shape[2], self.unit) if self.lanes else (self.unit, x.shape[3])

        def at(b, h, t, where):
            block = _block(where[_number(b, h, t, slot_heads, tokens)], slots, self.unit)
            return (b, h * many, 0, block) if self.lanes else (b, h * many, block, 0)

        return pl.BlockSpec((None, together if many else 1, *shape), at)


@functools.partial(jax.jit, static_argnums=3)
def _put(leaves: list[Array], slot: Array, values: list[Array], interpret: Any) -> list[Array]:
    views = [View.of(x) for x in leaves]
    olds = [view.turn(x) for view, x in zip(views, leaves, strict=True)]
    news = [view.turn(x) for view, x in zip(views, values, strict=True)]
    batch, heads, (_, slot_heads, tokens) = slot.shape[0], max(x.shape[1] for x in olds), slot.shape
    together = 1 if slot_heads > 1 else _heads_together(views, olds, heads)

    blocks = [view.block(x, together, slot_heads, tokens) for view, x in zip(views, olds, strict=True)]
    written = pl.pallas_call(
        functools.partial(_kernel, views=views, slots=leaves[0].shape[2], slot_heads=slot_heads, tokens=tokens),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, heads // together if slot_heads == 1 else slot_heads, tokens),
            in_specs=[
                pl.BlockSpec((None, slot_heads, tokens), lambda b, h, t, _: (b, 0, 0)),
                [_all_tokens(x.shape, together) for x in news],
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


@functools.partial(jax.jit, static_argnums=2)
def _take(leaves: list[Array], slot: Array, interpret: Any) -> list[Array]:
    views = [View.of(x) for x in leaves]
    olds = [view.turn(x) for view, x in zip(views, leaves, strict=True)]
    batch, (_, slot_heads, tokens) = slot.shape[0], slot.shape
    heads = max(slot_heads, *(x.shape[1] for x in olds))
    together = 1 if slot_heads > 1 else _heads_together(views, olds, heads)

    def taken(view: View, x: Array) -> jax.ShapeDtypeStruct:
        shape = list(x.shape)
        head_axis = 2 if view.numbers else 1
        shape[head_axis], shape[view.axis] = max(slot_heads, shape[head_axis]), tokens
        return jax.ShapeDtypeStruct(shape, x.dtype)

    shapes = [taken(view, x) for view, x in zip(views, olds, strict=True)]
    found = pl.pallas_call(
        functools.partial(_pick, views=views, slots=leaves[0].shape[2], slot_heads=slot_heads, tokens=tokens),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, heads // together, tokens),
            in_specs=[view.block(x, together, slot_heads, tokens) for view, x in zip(views, olds, strict=True)],
            out_specs=[_all_tokens(x.shape, together) for x in shapes],
        ),
        out_shape=shapes,
        # What one step leaves in a block of tokens the next one, or one of other heads, completes.
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary", "arbitrary")),
        interpret=interpret,
        name="kvjax_take",
    )(slot.reshape(-1), *olds)
    return [view.back(x) for view, x in zip(views, found, strict=True)]


def _all_tokens(shape: tuple[int, ...], together: int) -> pl.BlockSpec:
    """Of values as they are seen: all tokens of some heads."""
    many = shape[1] > 1
    return pl.BlockSpec((None, together if many else 1, *shape[2:]), lambda b, h, t, _: (b, h * many, 0, 0))


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


def _pick(where, *refs, views: list[View], slots: int, slot_heads: int, tokens: int):
    b, h, t = (pl.program_id(axis) for axis in range(3))
    slot = jnp.clip(where[_number(b, h, t, slot_heads, tokens)], 0, slots - 1)
    for view, old, out in zip(views, refs[: len(views)], refs[len(views) :], strict=True):
        axis = view.axis - 1
        x, taken = _bits(old[...]), _bits(out[...])
        chosen = lax.broadcasted_iota(jnp.int32, x.shape, axis) == slot % view.unit
        token = jnp.where(chosen, x, 0).sum(axis, keepdims=True)
        here = lax.broadcasted_iota(jnp.int32, taken.shape, axis) == t
        if view.numbers and slot_heads > 1:
            here &= lax.broadcasted_iota(jnp.int32, taken.shape, 1) == h
        out[...] = _from_bits(jnp.where(here, token, taken), out.dtype)


def _bits(x: Array) -> Array:
    """The bits of numbers, those of float32 for bfloat16, in int32."""
    x = _wide(x)
    return lax.bitcast_convert_type(x, jnp.int32) if x.dtype == jnp.float32 else x


def _from_bits(x: Array, dtype) -> Array:
    return _narrow(lax.bitcast_convert_type(x, jnp.float32) if dtype in (jnp.float32, jnp.bfloat16) else x, dtype)


def _wide(x: Array) -> Array:
    """The same numbers, or bits, in 32 bits."""
    if x.dtype == jnp.float8_e4m3fn:
        x = lax.bitcast_convert_type(x, jnp.int8)
    return {jnp.dtype(jnp.bfloat16): x.astype(jnp.float32), jnp.dtype(jnp.int8): x.astype(jnp.int32)}.get(x.dtype, x)


def _narrow(x: Array, dtype) -> Array:
    if dtype == jnp.float8_e4m3fn:
        return lax.bitcast_convert_type(x.astype(jnp.int8), dtype)
    return x.astype(dtype)
