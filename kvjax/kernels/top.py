"""The best of all slots, wherever they lie: on a mesh by exchanging thresholds, not scores."""

import jax.numpy as jnp
from jax import Array, lax

from kvjax.kernels.mesh import Spread, axes_in_use, on_mesh, spread

BITS = 4  # Of a threshold that are found in one exchange.


def top_slots(scores: Array, number: Array, capacity: int) -> tuple[Array, Array]:
    """The highest scores of each row and head; of equal ones the earliest.

    Args:
      scores: [B, H, S] float32, -inf for slots that cannot be chosen; no NaN.
      number: How many in each row [B] int32, at most `capacity`.
      capacity: Length of the result, at most S.

    Returns:
      Increasing slots [B, H, capacity] int32, and which of them count [B, H, capacity] bool.
    """
    mine = spread(scores.shape[0], scores.shape[1], [scores.shape[2]]) if axes_in_use() else Spread()
    if mine.slots:
        return _on_mesh(scores, number, capacity, mine)
    best, index = lax.top_k(scores, capacity)
    valid = (jnp.arange(capacity) < number[:, None, None]) & (best > -jnp.inf)
    return ordered(index, valid, scores.shape[-1])


def ordered(index: Array, valid: Array, slots: int) -> tuple[Array, Array]:
    """Sorts chosen indices, those that do not count last; and says which count."""
    index = jnp.sort(jnp.where(valid, index, slots), axis=-1)
    return jnp.minimum(index, slots - 1), index < slots


def _on_mesh(scores: Array, number: Array, capacity: int, mine: Spread) -> tuple[Array, Array]:
    total = scores.shape[2]

    def local(scores: Array, number: Array) -> tuple[Array, Array]:
        first, keys = mine.first(scores.shape[2]), _sortable(scores)
        there = scores > -jnp.inf
        number = jnp.minimum(number[:, None], lax.psum(there.sum(-1, dtype=jnp.int32), mine.slots))  # [B, H]
        threshold = _threshold(keys, number, mine)[..., None]
        above, equal = keys > threshold, keys == threshold
        counts = jnp.stack([above.sum(-1, dtype=jnp.int32), equal.sum(-1, dtype=jnp.int32)])
        of_all = lax.all_gather(counts, mine.slots)  # [devices, 2, B, H]
        before = jnp.arange(of_all.shape[0]) < lax.axis_index(mine.slots)
        before = jnp.where(before[:, None, None, None], of_all, 0).sum(0)[..., None]
        room = number[..., None] - of_all[:, 0].sum(0)[..., None]  # For those that equal the threshold.
        chosen = (above | (equal & (before[1] + jnp.cumsum(equal, -1) <= room))) & there
        rank = before[0] + jnp.minimum(before[1], room) + jnp.cumsum(chosen, -1) - 1
        place = jnp.where(chosen, rank, capacity)
        slot = jnp.broadcast_to(first + jnp.arange(scores.shape[2], dtype=jnp.int32), place.shape)
        index = jnp.zeros((*place.shape[:2], capacity), jnp.int32)
        index = jnp.put_along_axis(index, place, slot, -1, inplace=False, mode="drop")
        valid = jnp.arange(capacity) < number[..., None]
        return jnp.where(valid, lax.psum(index, mine.slots), total - 1), valid

    rows = mine.spec(scores.shape[:2], "batch", "heads")
    in_specs = (mine.spec(scores.shape, "batch", "heads", "slots"), mine.spec(number.shape, "batch"))
    return on_mesh(local, in_specs, (rows, rows))(scores, number)


def _sortable(x: Array) -> Array:
    """float32 -> uint32 in the same order."""
    bits = lax.bitcast_convert_type(x + 0.0, jnp.uint32)  # -0 becomes 0.
    return jnp.where(bits >> 31, ~bits, bits | jnp.uint32(1 << 31))


def _threshold(keys: Array, number: Array, mine: Spread) -> Array:
    """Inside `shard_map`: the number-th [B, H] largest of all devices' keys [B, H, S] uint32, digit by digit."""
    digits = jnp.arange(1, 1 << BITS, dtype=jnp.uint32)

    def digit(i: Array, found: Array) -> Array:
        shift = (32 - BITS * (i + 1)).astype(jnp.uint32)
        candidates = found[..., None] | (digits << shift)  # [B, H, 15]
        enough = (keys[:, :, None] >= candidates[..., None]).sum(-1, dtype=jnp.int32)
        enough = lax.psum(enough, mine.slots) >= number[..., None]
        return found | (enough.sum(-1, dtype=jnp.uint32) << shift)

    return lax.fori_loop(0, 32 // BITS, digit, jnp.zeros(keys.shape[:2], jnp.uint32))
