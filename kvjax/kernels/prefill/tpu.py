"""Prefill attention on TPUs: two Pallas kernels, and no matrix of queries and keys in memory.

`_flash` takes the softmax online (FlashAttention, arXiv 2205.14135): output, log-sum-exp, and the mean logit, from
which entropy follows. `_columns` takes the scores again, block by block, and with the log-sum-exp known adds up what
each key receives.

Scores stand transposed, keys on sublanes and queries on lanes: maxima and sums over keys are then plain vector
operations, and what belongs to a query (its places, log-sum-exp, weight in a sum) is a dense row. All query heads of a
group, or as many as fit, share one block of keys. Tables of the first and the last block that a block has to see come
ahead of the grid: beyond them nothing is fetched and nothing computed. Blocks that are visible as a whole skip the
mask.

Keys whose channels fill no 128 lanes are read with channels on sublanes, which is how XLA lays them out anyway.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kvjax.kernels.parts import NEG, Part, merge
from kvjax.kernels.prefill.blocks import Tables, Tiles, make_tables, pad
from kvjax.kernels.prefill.request import Prefill, Request
from kvjax.kernels.prefill.ring import Found, Keys as Piece, Local, Rows
from kvjax.kernels.prefill.statistics import normalize, query_weights
from kvjax.kernels.prefill.xla import window_weights

LANES = 128
ROWS = 1024  # Queries (of all heads of a block together) whose scores are taken at once.
AT_ONCE = 256  # Of these, by products and exponentials in turn.
KEYS = 512  # Keys of a block, and queries of a head at most.
WIDE = 1280  # Bytes of a key or value from which on blocks are smaller; at twice as many they fit no more.
SUMS = 4 << 20  # Bytes of unfinished column sums that may lie in VMEM.


def refuse(request: Request) -> str | None:
    """Why the kernels cannot serve a request, or None."""
    dtypes = {x.dtype for x in (request.k, request.v)}
    if request.past is not None:
        dtypes |= {request.past.k.dtype, request.past.v.dtype}
    if not dtypes <= {jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)}:
        names = ", ".join(sorted(str(dtype) for dtype in dtypes))
        return f"It takes bfloat16 and float32 keys and values, not {names}: cast them first."
    dims = request.k.shape[-1], request.v.shape[-1]
    if any(dim % 16 for dim in dims):
        return f"It takes keys and values of a multiple of 16 channels, not {dims[0]} and {dims[1]}."
    size = max(_bytes(request.k), _bytes(request.v))
    if size > 2 * WIDE:
        return f"It takes keys and values of at most {2 * WIDE} bytes, not {size}."
    return None


class Keys(NamedTuple):
    """Keys and values [B, H, S, D] and their places [B, 1 or H, S].

    `reach`: a query sees no key further back than this many slots before its own; 0: anywhere.
    """

    k: Array
    v: Array
    place: Array
    reach: int


def prefill(request: Request, *, block: int | None = None, keys: int = KEYS, interpret: Any = False) -> Prefill:
    """The answer to a request.

    Args:
      block: Queries of a block, rounded up to 128; default: as many as fit.
      keys: Keys of a block, a multiple of 128.
      interpret: Run on the CPU, as `pallas_call` says.
    """
    batch, kv_heads, group, length, _ = request.q.shape
    asked = request.statistics
    # Shorter arrays would make blocks that are no tiles; longer ones may end within a block.
    wide = max(length, LANES)
    own = Keys(
        pad(request.k, 2, wide, 0),
        pad(request.v, 2, wide, 0),
        pad(request.place[:, None], 2, wide, -1),
        request.window,
    )
    stores = [own]
    if request.past is not None:
        wide_past = max(request.past.k.shape[2], LANES)
        k, v = (pad(x, 2, wide_past, 0) for x in (request.past.k, request.past.v))
        stores = [Keys(k, v, pad(request.past_place, 2, wide_past, -1), 0), own]
    q, low, high = pad(request.q, 3, wide, 0), pad(request.low, 1, wide, 0), pad(request.place, 1, wide, -1)

    dtype = request.v.dtype if len(stores) == 1 else jnp.float32
    run = functools.partial(_flash, q, low, high, request.softcap, asked.entropy, dtype, block, keys, interpret)
    parts, means = zip(*(run(store) for store in stores), strict=True)
    part = merge(parts)

    rows = lambda x: x.reshape(batch, kv_heads * group, *x.shape[3:])[:, :, :length]  # noqa: E731
    entropy = None
    if asked.entropy:
        # E[logit] over all keys is the parts' own, each by its share of the total weight.
        shares = [jnp.where(x.lse > NEG, jnp.exp(x.lse - part.lse), 0.0) for x in parts]
        mean = sum(share * mean for share, mean in zip(shares, means, strict=True))
        entropy = rows(jnp.where(part.lse > NEG, jnp.maximum(part.lse - mean, 0.0), 0.0))
    return Prefill(
        out=rows(part.out).astype(request.v.dtype),
        lse=rows(part.lse) if asked.lse else None,
        entropy=entropy,
        column_sums=_column_sums(request, q, low, high, part.lse, stores, block, keys, interpret),
        window=window_weights(request) if asked.window else None,
    )


def local(request: Request, *, block: int | None = None, keys: int = KEYS, interpret: Any = False) -> Local:
    """One device's part of ring attention: the same kernels, over keys that stand anywhere."""
    asked = request.statistics

    def store(piece: Piece) -> Keys:
        wide = max(piece.place.shape[1], LANES)
        return Keys(pad(piece.k, 2, wide, 0), pad(piece.v, 2, wide, 0), pad(piece.place[:, None], 2, wide, -1), 0)

    def queries(rows: Rows) -> tuple[Array, Array, Array]:
        wide = max(rows.low.shape[1], LANES)
        return pad(rows.q, 3, wide, 0), pad(rows.low, 1, wide, 0), pad(rows.high, 1, wide, -1)

    def attend(rows: Rows, piece: Piece) -> Found:
        softcap, length = request.softcap, rows.low.shape[1]
        part, mean = _flash(*queries(rows), softcap, asked.entropy, jnp.float32, block, keys, interpret, store(piece))
        cut = lambda x: x[:, :, :, :length]  # noqa: E731
        return Found(cut(part.out), cut(part.lse), None if mean is None else cut(mean))

    def columns(rows: Rows, lse: Array, piece: Piece) -> Array:
        q, low, high = queries(rows)
        lse, counts = pad(lse, 3, q.shape[3], 0), pad(rows.counts, 2, q.shape[3], 0)
        plain = tuple(sums.plain for sums in asked.column_sums)
        softcap, slots = request.softcap, piece.place.shape[1]
        return _columns(q, low, high, lse, counts, plain, softcap, block, keys, interpret, store(piece))[..., :slots]

    return Local(attend, columns)


def _column_sums(
    request: Request,
    q: Array,
    low: Array,
    high: Array,
    lse: Array,
    stores: list[Keys],
    block: int | None,
    keys: int,
    interpret: Any,
) -> tuple[Array, ...]:
    """What each key receives, past keys first: [B, H * G, S] float32 for each sum that is asked for."""
    asked, (batch, kv_heads, group, length, _) = request.statistics.column_sums, request.q.shape
    if not asked:
        return ()
    counts = query_weights(asked, request.age, request.place >= 0)
    padded = pad(counts, 2, q.shape[3], 0)
    plain = tuple(sums.plain for sums in asked)
    sums = []
    past = [] if request.past is None else [request.past.k.shape[2]]
    for store, slots in zip(stores, [*past, length], strict=True):
        received = _columns(q, low, high, lse, padded, plain, request.softcap, block, keys, interpret, store)
        received = normalize(asked, received, counts, request.low, request.place, store.place)
        # What was padded to a whole tile is cut off again.
        sums.append(received[..., :slots])
    joined = jnp.concatenate(sums, -1)
    return tuple(joined.reshape(len(asked), batch, kv_heads * group, joined.shape[-1]))


# Steps.


class Grid(NamedTuple):
    """Steps of a kernel: batch, KV head, block of query heads, block that results belong to, its partners in turn.

    Attributes:
      heads: Blocks of query heads. places: 1 if all KV heads' keys have the same places, else KV heads.
      queries, keys: Blocks of each. by_keys: Whether results belong to blocks of keys. steps: Partners at most.
    """

    heads: int
    places: int
    queries: int
    keys: int
    by_keys: bool
    steps: int

    @property
    def blocks(self) -> int:
        return self.keys if self.by_keys else self.queries

    def row(self, b: Array, h: Array) -> Array:
        """Which row of the tables of keys is a head's."""
        return b * self.places + (h if self.places > 1 else 0)

    def partner(self, b: Array, h: Array, i: Array, step: Array, tables: Tables) -> Array:
        """Which block a step looks at; the last one again and again, once it is reached: nothing is fetched anew."""
        at = self.row(b, h) * self.blocks + i
        return jnp.minimum(tables.first[at] + step, jnp.maximum(tables.last[at], 0))

    def visible(self, b: Array, h: Array, i: Array, step: Array, tables: Tables) -> tuple[Array, Array]:
        """Whether a step's blocks see each other at all, and whether as a whole."""
        at = self.row(b, h) * self.blocks + i
        partner = tables.first[at] + step
        query, key = (partner, i) if self.by_keys else (i, partner)
        query = b * self.queries + jnp.minimum(query, self.queries - 1)
        key = self.row(b, h) * self.keys + jnp.minimum(key, self.keys - 1)
        whole = (tables.k_low[key] >= tables.q_low[query]) & (tables.k_high[key] <= tables.q_high[query])
        return partner <= tables.last[at], whole


def _steps(reach: int, mine: int, other: int, others: int) -> int:
    """Partners of `other` tokens that a block of `mine` tokens can have, if none is further away than `reach`."""
    return min(others, (reach + mine - 3) // other + 2) if reach else others


# Output and log-sum-exp.


def _flash(
    q: Array,
    low: Array,
    high: Array,
    softcap: float,
    entropy: bool,
    dtype: Any,
    block: int | None,
    keys: int,
    interpret: Any,
    store: Keys,
) -> tuple[Part, Array | None]:
    """Attention of q [B, H, G, T, D] over one store: a part whose arrays are [B, H, G, T, ...], and the mean logit."""
    batch, kv_heads, group, length, dim = q.shape
    value_dim, slots = store.v.shape[-1], store.k.shape[2]
    tiles = _tiles(group, length, slots, _wide(store), block, keys)
    low, high, place = _whole(low, high, store.place, tiles)
    tables = make_tables(low, high, place, tiles)
    blocks, partners = low.shape[1] // tiles.queries, place.shape[2] // tiles.keys
    grid = Grid(
        heads=group // tiles.heads,
        places=place.shape[1],
        queries=blocks,
        keys=partners,
        by_keys=False,
        steps=_steps(store.reach, tiles.queries, tiles.keys, partners),
    )
    rows = tiles.heads * tiles.queries

    query = lambda b, h, g, i, j, *tables: (b, h, g, i, 0)  # noqa: E731
    per_query = lambda b, h, g, i, j, *tables: (b, h, g, 0, i)  # noqa: E731
    row = lambda b, h, g, i, j, *tables: (b, 0, i)  # noqa: E731
    partner = lambda b, h, g, i, j, *tables: grid.partner(b, h, i, j, Tables(*tables))  # noqa: E731
    q = q.astype(store.k.dtype)
    k, k_spec = _keys_spec(store.k, tiles.keys, partner)
    v, v_spec = _keys_spec(store.v, tiles.keys, partner)
    # Statistics of a query lie on lanes; the axis of size one keeps blocks whole tiles whatever the number of heads.
    statistic = jax.ShapeDtypeStruct((batch, kv_heads, group, 1, length), jnp.float32)
    statistic_spec = pl.BlockSpec((1, 1, tiles.heads, 1, tiles.queries), per_query)
    number = 2 if entropy else 1
    state = pltpu.VMEM((1, rows), jnp.float32)
    result = pl.pallas_call(
        functools.partial(
            _flash_kernel,
            grid=grid,
            tiles=tiles,
            softcap=softcap,
            entropy=entropy,
            turned=(_turned(dim), _turned(value_dim)),
        ),
        out_shape=[jax.ShapeDtypeStruct((*q.shape[:4], value_dim), dtype), *[statistic] * number],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(tables),
            grid=(batch, kv_heads, grid.heads, blocks, grid.steps),
            in_specs=[
                pl.BlockSpec((1, 1, tiles.queries), row),
                pl.BlockSpec((1, 1, tiles.queries), row),
                _place_spec(place, tiles.keys, partner),
                pl.BlockSpec((1, 1, tiles.heads, tiles.queries, dim), query),
                k_spec,
                v_spec,
            ],
            out_specs=[
                pl.BlockSpec((1, 1, tiles.heads, tiles.queries, value_dim), query),
                *[statistic_spec] * number,
            ],
            scratch_shapes=[state, state, *[state] * entropy, pltpu.VMEM((value_dim, rows), jnp.float32)],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "parallel", "arbitrary")
        ),
        interpret=interpret,
        name="prefill_flash",
    )(*tables, low[:, None], high[:, None], place[:, :, None], q, k, v)
    out, lse, *mean = result
    return Part(out=out, lse=lse[:, :, :, 0]), mean[0][:, :, :, 0] if entropy else None


def _flash_kernel(*refs: Any, grid: Grid, tiles: Tiles, softcap: float, entropy: bool, turned: tuple[bool, bool]):
    tables, refs = Tables(*refs[:6]), refs[6:]
    (low, high, place, q, k, v, out, lse), refs = refs[:8], refs[8:]
    mean, refs = (refs[0], refs[1:]) if entropy else (None, refs)
    top, total, *mixed, acc = refs
    b, h, i, step = (pl.program_id(axis) for axis in (0, 1, 3, 4))

    @pl.when(step == 0)
    def _():
        top[...] = jnp.full_like(top, NEG)
        acc[...] = jnp.zeros_like(acc)
        for ref in (total, *mixed):
            ref[...] = jnp.zeros_like(ref)

    def add(masked: bool):
        values, column = v[0, 0], _column(place[0, 0]) if masked else None
        if column is not None:
            values = _present(values, place[0, 0], column, turned[1])
        width = LANES if tiles.queries % AT_ONCE else AT_ONCE
        units = [(head, start) for start in range(0, tiles.queries, width) for head in range(tiles.heads)]

        def scores(head: int, start: int) -> Array:
            return _scores(q[0, 0, head, start : start + width], k[0, 0], softcap, turned[0])

        # The products of one unit are there to be taken while the exponentials of the one before are.
        ahead = scores(*units[0])
        for unit, (head, start) in enumerate(units):
            s, mine = ahead, slice(head * tiles.queries + start, head * tiles.queries + start + width)
            if unit + 1 < len(units):
                ahead = scores(*units[unit + 1])
            seen = None if column is None else _seen(low, high, column, start, width)
            s = s if seen is None else jnp.where(seen, s, NEG)
            above = jnp.maximum(top[:, mine], s.max(0, keepdims=True))
            p = jnp.exp(s - above)
            p = p if seen is None else jnp.where(seen, p, 0.0)
            fade = jnp.exp(top[:, mine] - above)
            top[:, mine] = above
            total[:, mine] = fade * total[:, mine] + p.sum(0, keepdims=True)
            if entropy:
                mixed[0][:, mine] = fade * mixed[0][:, mine] + (p * s).sum(0, keepdims=True)
            # [Dv, width] += v^T [Dv, keys] @ p [keys, width]
            new = _dot(values, p.astype(values.dtype), 1 if turned[1] else 0, 0)
            acc[:, mine] = fade * acc[:, mine] + new

    inside, whole = grid.visible(b, h, i, step, tables)
    pl.when(inside & whole)(lambda: add(masked=False))
    pl.when(inside & ~whole)(lambda: add(masked=True))

    @pl.when(step == grid.steps - 1)
    def _():
        known = total[...] > 0
        safe = jnp.where(known, total[...], 1.0)
        result = (acc[...] / safe).T.astype(out.dtype)
        logs = jnp.where(known, top[...] + jnp.log(safe), NEG)
        means = mixed[0][...] / safe if entropy else None
        for head in range(tiles.heads):
            mine = slice(head * tiles.queries, (head + 1) * tiles.queries)
            out[0, 0, head] = result[mine]
            lse[0, 0, head] = logs[:, mine]
            if mean is not None and means is not None:
                mean[0, 0, head] = means[:, mine]


# What keys receive.


def _columns(
    q: Array,
    low: Array,
    high: Array,
    lse: Array,
    counts: Array,
    plain: tuple[bool, ...],
    softcap: float,
    block: int | None,
    keys: int,
    interpret: Any,
    store: Keys,
) -> Array:
    """Sums over queries of attention weights times counts [C, B, T]: [C, B, H, G, S] float32."""
    batch, kv_heads, group, length, dim = q.shape
    slots, number = store.k.shape[2], counts.shape[0]
    tiles = _tiles(group, length, slots, _wide(store), block, keys, number)
    low, high, place = _whole(low, high, store.place, tiles)
    counts = jnp.moveaxis(pad(counts, 2, low.shape[1], 0), 0, 1)
    tables = make_tables(low, high, place, tiles, (counts != 0).any(1))
    blocks, partners = place.shape[2] // tiles.keys, low.shape[1] // tiles.queries
    grid = Grid(
        heads=group // tiles.heads,
        places=place.shape[1],
        queries=partners,
        keys=blocks,
        by_keys=True,
        steps=_steps(store.reach, tiles.keys, tiles.queries, partners),
    )
    mine = lambda b, h, g, i, j, *tables: i  # noqa: E731
    partner = lambda b, h, g, i, j, *tables: grid.partner(b, h, i, j, Tables(*tables))  # noqa: E731
    row = lambda *at: (at[0], 0, partner(*at))  # noqa: E731
    query = lambda *at: (*at[:3], partner(*at), 0)  # noqa: E731
    per_query = lambda *at: (*at[:3], 0, partner(*at))  # noqa: E731
    q = q.astype(store.k.dtype)
    k, k_spec = _keys_spec(store.k, tiles.keys, mine)
    sums = pl.pallas_call(
        functools.partial(_columns_kernel, grid=grid, tiles=tiles, softcap=softcap, plain=plain, turned=_turned(dim)),
        out_shape=jax.ShapeDtypeStruct((batch, kv_heads, group, number, slots), jnp.float32),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(tables),
            grid=(batch, kv_heads, grid.heads, blocks, grid.steps),
            in_specs=[
                pl.BlockSpec((1, 1, tiles.queries), row),
                pl.BlockSpec((1, 1, tiles.queries), row),
                _place_spec(place, tiles.keys, mine),
                pl.BlockSpec((1, 1, tiles.heads, tiles.queries, dim), query),
                pl.BlockSpec((1, 1, tiles.heads, 1, tiles.queries), per_query),
                pl.BlockSpec((1, number, tiles.queries), row),
                k_spec,
            ],
            out_specs=pl.BlockSpec(
                (1, 1, tiles.heads, number, tiles.keys), lambda b, h, g, i, j, *tables: (b, h, g, 0, i)
            ),
            scratch_shapes=[pltpu.VMEM((number, tiles.heads, tiles.keys, LANES), jnp.float32)],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "parallel", "arbitrary")
        ),
        interpret=interpret,
        name="prefill_columns",
    )(*tables, low[:, None], high[:, None], place[:, :, None], q, lse[:, :, :, None], counts, k)
    return jnp.moveaxis(sums, 3, 0)


def _columns_kernel(*refs: Any, grid: Grid, tiles: Tiles, softcap: float, plain: tuple[bool, ...], turned: bool):
    tables, (low, high, place, q, lse, counts, k, out, acc) = Tables(*refs[:6]), refs[6:]
    b, h, i, step = (pl.program_id(axis) for axis in (0, 1, 3, 4))

    @pl.when(step == 0)
    def _():
        acc[...] = jnp.zeros_like(acc)

    def add(masked: bool):
        seen = _seen(low, high, _column(place[0, 0]), 0, tiles.queries) if masked else None
        for head in range(tiles.heads):
            s = _scores(q[0, 0, head], k[0, 0], softcap, turned)
            s = s if seen is None else jnp.where(seen, s, NEG)
            p = jnp.exp(s - lse[0, 0, head])
            p = p if seen is None else jnp.where(seen, p, 0.0)
            for c, alike in enumerate(plain):
                received = acc[c, head]
                for start in range(0, tiles.queries, LANES):
                    lanes = slice(start, start + LANES)
                    received += p[:, lanes] if alike else p[:, lanes] * counts[0, c : c + 1, lanes]
                acc[c, head] = received

    inside, whole = grid.visible(b, h, i, step, tables)
    pl.when(inside & whole)(lambda: add(masked=False))
    pl.when(inside & ~whole)(lambda: add(masked=True))

    @pl.when(step == grid.steps - 1)
    def _():
        for head in range(tiles.heads):
            for c in range(len(plain)):
                out[0, 0, head, c : c + 1] = acc[c, head].T.sum(0, keepdims=True)


# Pieces of both kernels.


def _scores(q: Array, k: Array, softcap: float, turned: bool) -> Array:
    """Logits [keys, queries] float32."""
    s = _dot(k, q, 0 if turned else 1, 1)
    return softcap * jnp.tanh(s / softcap) if softcap else s


def _dot(a: Array, b: Array, a_axis: int, b_axis: int) -> Array:
    """Product over one axis of each, in float32 precision where they are float32."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return lax.dot_general(
        a, b, (((a_axis,), (b_axis,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
    )


def _column(row: Array) -> Array:
    """[1, n] -> [n, 1], by way of whole tiles."""
    return jnp.broadcast_to(row, (8, row.shape[1])).T[:, :1]


def _seen(low: Any, high: Any, column: Array, start: int, width: int) -> Array:
    """Which key `width` queries from `start` on see: [keys, width] bool."""
    mine = slice(start, start + width)
    return (column >= low[0, :, mine]) & (column <= high[0, :, mine])


def _present(values: Array, row: Array, column: Array, turned: bool) -> Array:
    """Values, zero where there is no key: zero weight times NaN would be NaN."""
    return jnp.where((row if turned else column) >= 0, values.astype(jnp.float32), 0.0).astype(values.dtype)


def _turned(dim: int) -> bool:
    """Whether keys or values are read with their channels on sublanes."""
    return dim % LANES != 0


def _bytes(x: Array) -> int:
    return x.shape[-1] * x.dtype.itemsize


def _wide(store: Keys) -> bool:
    """Whether blocks have to be smaller to fit VMEM."""
    return max(_bytes(store.k), _bytes(store.v)) > WIDE


def _keys_spec(x: Array, keys: int, block: Any) -> tuple[Array, pl.BlockSpec]:
    """Keys or values [B, H, S, D] as they are read, and in which blocks; `block` says which one."""
    dim = x.shape[-1]
    if _turned(dim):
        return jnp.swapaxes(x, 2, 3), pl.BlockSpec((1, 1, dim, keys), lambda *at: (*at[:2], 0, block(*at)))
    return x, pl.BlockSpec((1, 1, keys, dim), lambda *at: (*at[:2], block(*at), 0))


def _place_spec(place: Array, keys: int, block: Any) -> pl.BlockSpec:
    """Blocks of places [B, 1 or H, 1, S]."""
    shared = place.shape[1] == 1
    return pl.BlockSpec((1, 1, 1, keys), lambda *at: (at[0], 0 if shared else at[1], 0, block(*at)))


def _tiles(group: int, length: int, slots: int, wide: bool, block: int | None, keys: int, sums: int = 0) -> Tiles:
    """Block sizes: so many heads together that a block has `ROWS` rows, half of them if wide, and that sums fit."""
    up = lambda n: n + -n % LANES  # noqa: E731
    rows = ROWS // 2 if wide else ROWS
    keys = min(keys, up(slots))
    heads = max(n for n in range(1, group + 1) if group % n == 0 and n <= rows // LANES)
    while sums * heads * keys * LANES * 4 > SUMS and heads > 1:
        heads = max(n for n in range(1, heads) if group % n == 0)
    queries = min(up(length), max(LANES, min(KEYS, rows // heads // LANES * LANES)))
    return Tiles(heads, min(queries, up(block)) if block else queries, keys)


def _whole(low: Array, high: Array, place: Array, tiles: Tiles) -> tuple[Array, Array, Array]:
    """The places with padding up to whole blocks, so that what lies beyond the arrays' ends is masked."""
    length, slots = low.shape[1] + -low.shape[1] % tiles.queries, place.shape[2] + -place.shape[2] % tiles.keys
    return pad(low, 1, length, 0), pad(high, 1, length, -1), pad(place, 2, slots, -1)
