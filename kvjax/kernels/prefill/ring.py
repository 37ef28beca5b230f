"""Prefill attention of prompts whose tokens lie on several devices: keys go around, queries stay (Ring Attention, arXiv
2310.01889).

Tokens lie in order: the first piece on the first device. Causal attention would leave that one idle for most of the
round, so devices exchange half of what they have first: device i of n works on pieces i and 2n - 1 - i of 2n, early and
late together, and every device has the same to do at every step ("zig-zag"). With a window only neighbours matter:
then everything stays where it is and the keys go no further than the window reaches.

At each step a device attends to the keys it holds while they are on their way to the next. Column sums take a second
round, in which each key's sum travels with it. What a device holds at most are its own tokens, two pieces of keys and
values (those it works on and those that arrive), and float32 outputs.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from kvjax.kernels.mesh import SEQ, Spread, axes_in_use, on_mesh, spread
from kvjax.kernels.parts import NEG
from kvjax.kernels.prefill.request import Prefill, Request
from kvjax.kernels.prefill.statistics import normalize, query_weights
from kvjax.kernels.prefill.xla import window_weights


class Rows(NamedTuple):
    """Queries of one device.

    Attributes:
      q: [B, H, G, t, D], scaled. low, high: Places that they see [B, t]. counts: What they count in sums [C, B, t].
    """

    q: Array
    low: Array
    high: Array
    counts: Array


class Keys(NamedTuple):
    """Keys and values [B, H, S, D], of padding anything, and their places [B, S], -1 for padding."""

    k: Array
    v: Array
    place: Array


class Found(NamedTuple):
    """Attention over some keys: out [B, H, G, t, D], lse and mean logit [B, H, G, t], float32; no mean where entropy
    is not asked for."""

    out: Array
    lse: Array
    mean: Array | None


class Local(NamedTuple):
    """How one device does its part.

    Attributes:
      attend: (rows, keys) -> `Found`.
      columns: (rows, log-sum-exp of each row over all keys, keys) -> what each key receives [C, B, H, G, S] float32.
    """

    attend: Callable[[Rows, Keys], Found]
    columns: Callable[[Rows, Array, Keys], Array]


def where(request: Request) -> Spread | None:
    """How a request's tokens lie on the mesh in use; None where they do not lie on several devices."""
    sizes = axes_in_use()
    length = request.place.shape[1]
    if SEQ not in sizes or length % (2 * sizes[SEQ]) or request.past is not None:
        return None
    mine = spread(request.k.shape[0], request.k.shape[1], [length])
    return Spread(mine.batch, mine.heads, (SEQ,), mine.sizes)


def prefill(request: Request, mine: Spread, local: Callable[[Request], Local]) -> Prefill:
    """The answer to a request.

    Args:
      request: Of the whole arrays, without a past.
      mine: How they lie.
      local: How a device does its part of a request.
    """
    batch, kv_heads, group, length, _ = request.q.shape
    asked = request.statistics
    counts = query_weights(asked.column_sums, request.age, request.place >= 0)
    run = functools.partial(_one_device, request, mine, local)
    tokens = mine.spec((batch, length), "batch", "slots")
    stored = mine.spec(request.k.shape, "batch", "heads", "slots")
    rows = mine.spec(request.q.shape[:4], "batch", "heads", "", "slots")
    of_counts = mine.spec(counts.shape, "", "batch", "slots")
    of_sums = mine.spec((len(counts), *request.q.shape[:4]), "", "batch", "heads", "", "slots")
    in_specs = (rows, stored, stored, tokens, tokens, of_counts)
    out, lse, entropy, sums = on_mesh(run, in_specs, (rows, rows, rows, of_sums))(
        request.q, request.k, request.v, request.low, request.place, counts
    )
    sums = normalize(asked.column_sums, sums, counts, request.low, request.place, request.place[:, None])
    heads = lambda x: x.reshape(batch, kv_heads * group, *x.shape[3:])  # noqa: E731
    return Prefill(
        out=heads(out),
        lse=heads(lse) if asked.lse else None,
        entropy=heads(entropy) if asked.entropy else None,
        column_sums=tuple(heads(x) for x in sums),
        window=window_weights(request) if asked.window else None,
    )


def _one_device(
    request: Request,
    mine: Spread,
    local: Callable[[Request], Local],
    q: Array,
    k: Array,
    v: Array,
    low: Array,
    place: Array,
    counts: Array,
) -> tuple[Array, Array, Array, Array]:
    """Inside `shard_map`: output, log-sum-exp, entropy and column sums of a device's own tokens."""
    devices, asked = mine.devices((SEQ,)), request.statistics
    turn = (lambda x, axis: x) if request.window else functools.partial(_exchange, devices=devices)
    back = (lambda x, axis: x) if request.window else functools.partial(_exchange, devices=devices, back=True)
    steps = min(devices, -(-(request.window - 1) // place.shape[1]) + 1) if request.window else devices
    rows = Rows(turn(q, 3), turn(low, 1), turn(place, 1), turn(counts, 2))
    keys = Keys(turn(k, 2), turn(v, 2), rows.high)
    own = local(
        dataclasses.replace(request, q=rows.q, k=keys.k, v=keys.v, place=rows.high, low=rows.low, age=rows.high)
    )

    def attend(carry: tuple[Keys, Found], step: Array) -> tuple[tuple[Keys, Found], None]:
        keys, found = carry
        following = _pass_on(keys, 1, devices)  # On its way while this one is used.
        return (following, join(found, own.attend(rows, keys))), None

    nothing = Found(
        out=jnp.zeros((*q.shape[:4], v.shape[-1]), jnp.float32),
        lse=jnp.full(q.shape[:4], NEG, jnp.float32),
        mean=jnp.zeros(q.shape[:4], jnp.float32) if asked.entropy else None,
    )
    (_, found), _ = lax.scan(attend, (keys, nothing), jnp.arange(steps))
    entropy = jnp.zeros_like(found.lse)
    if found.mean is not None:
        entropy = jnp.where(found.lse > NEG, jnp.maximum(found.lse - found.mean, 0.0), 0.0)
    sums = jnp.zeros((counts.shape[0], *q.shape[:4]), jnp.float32)
    if counts.shape[0]:

        def add(carry: tuple[Keys, Array], step: Array) -> tuple[tuple[Keys, Array], None]:
            keys, sums = carry
            return (_pass_on(keys, 1, devices), _pass_on(sums + own.columns(rows, found.lse, keys), 1, devices)), None

        (_, sums), _ = lax.scan(add, (keys, sums), jnp.arange(steps))
        sums = _pass_on(sums, -steps, devices)  # Home again.
    return back(found.out.astype(v.dtype), 3), back(found.lse, 3), back(entropy, 3), back(sums, 4)


def join(a: Found, b: Found) -> Found:
    """Attention over the keys of both."""
    top = jnp.maximum(a.lse, b.lse)
    shares = [jnp.where(x.lse > NEG, jnp.exp(x.lse - top), 0.0) for x in (a, b)]
    total = shares[0] + shares[1]
    safe = jnp.maximum(total, 1e-30)
    first, second = (share / safe for share in shares)
    return Found(
        out=a.out * first[..., None] + b.out.astype(jnp.float32) * second[..., None],
        lse=jnp.where(total > 0, top + jnp.log(safe), NEG),
        mean=None if a.mean is None or b.mean is None else a.mean * first + b.mean * second,
    )


def _pass_on(x: Any, places: int, devices: int) -> Any:
    """What the device so many places before holds."""
    following = [(i, (i + places) % devices) for i in range(devices)]
    return x if places % devices == 0 else jax.tree.map(lambda leaf: lax.ppermute(leaf, SEQ, following), x)


def _exchange(x: Array, axis: int, *, devices: int, back: bool = False) -> Array:
    """From pieces 2i and 2i + 1 of 2n on device i to pieces i and 2n - 1 - i; or back.

    Of the two pieces that a device gets, one was the first half of what another had and one the second.
    """

    def owner(piece: int) -> int:
        return min(piece, 2 * devices - 1 - piece)

    even = lax.axis_index(SEQ) % 2 == 0  # Then its early piece was a first half.
    routes = [[(i, owner(2 * i + half)) for i in range(devices)] for half in (0, 1)]
    if back:
        early, late = jnp.split(x, 2, axis)
        halves = jnp.where(even, early, late), jnp.where(even, late, early)
        routes = [[(there, here) for here, there in route] for route in routes]
    else:
        halves = jnp.split(x, 2, axis)
    halves = [lax.ppermute(half, SEQ, route) for half, route in zip(halves, routes, strict=True)]
    if not back:
        first, second = halves
        halves = [jnp.where(even, first, second), jnp.where(even, second, first)]
    return jnp.concatenate(halves, axis)
