"""Checksums that do not depend on how an array is spread: each process adds up what it holds, and the sums are added.

Fletcher's two sums over the elements' bits, modulo 2**32: of the bits, which notices any one element that changed, and
of the bits times their place in the whole array, which notices elements that changed places.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

Sums = tuple[int, int]
BLOCK = 1 << 16  # Elements that are worked on at once: they and their places stay in the processor's cache.


def checksums(arrays: Mapping[str, Any]) -> dict[str, Sums]:
    """The checksum of every array, the same in all processes, which all have to call this with the same names.

    Args:
      arrays: Of JAX or NumPy. One that each process has for itself counts as the first process has it.
    """
    mine = np.stack([_local_sums(x) for x in arrays.values()])
    if jax.process_count() > 1:
        mine = multihost_utils.process_allgather(mine).sum(0, dtype=np.uint32)
    return {name: (int(bits), int(places)) for name, (bits, places) in zip(arrays, mine, strict=True)}


def _local_sums(x: Any) -> np.ndarray:
    """What this process adds to both sums [2] uint32."""
    if not isinstance(x, jax.Array) or x.is_fully_addressable:
        counts = jax.process_index() == 0
        return _sums(np.asarray(x), (0,) * x.ndim, x.shape) if counts else np.zeros(2, np.uint32)
    # Of the copies of a part, one counts.
    parts = [part for part in x.addressable_shards if part.replica_id == 0]
    starts = [[index.indices(size)[0] for index, size in zip(part.index, x.shape, strict=True)] for part in parts]
    sums = (_sums(np.asarray(part.data), start, x.shape) for part, start in zip(parts, starts, strict=True))
    return sum(sums, np.zeros(2, np.uint32))


def _sums(part: np.ndarray, start: Sequence[int], shape: Sequence[int]) -> np.ndarray:
    """What a part that starts at `start` in an array of `shape` adds to both sums [2] uint32."""
    bits = _bits(part)
    shape = (*shape, *bits.shape[part.ndim :])
    start = (*start, *(0,) * (len(shape) - len(start)))
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    # Rows, whose elements lie one after another in the whole array too: trailing axes that the part has whole, and one.
    lead = max((axis for axis in range(len(shape)) if bits.shape[axis] != shape[axis]), default=0)
    rows = np.ascontiguousarray(bits).reshape(-1, math.prod(bits.shape[lead:]))
    places = [
        (np.arange(size, dtype=np.uint64) + np.uint64(begin)) * np.uint64(stride)
        for size, begin, stride in zip(bits.shape[:lead], start[:lead], strides[:lead], strict=True)
    ]
    first = functools.reduce(np.add.outer, places, np.uint64(start[lead] * strides[lead] if shape else 0))
    first = first.astype(np.uint32).reshape(-1)
    height, total = max(BLOCK // rows.shape[1], 1), [0, 0]
    for row in range(0, len(rows), height):
        for column in range(0, rows.shape[1], BLOCK):
            block = rows[row : row + height, column : column + BLOCK].astype(np.uint32)
            places = np.arange(column, column + block.shape[1], dtype=np.uint32)
            of_rows = block.sum(1, dtype=np.uint32)
            total[0] += int(of_rows.sum(dtype=np.uint32))
            total[1] += int((block * places).sum(dtype=np.uint32)) + int((first[row : row + height] * of_rows).sum())
    return np.array([number % 2**32 for number in total], np.uint32)


def _bits(x: np.ndarray) -> np.ndarray:
    """An array's bits as unsigned integers of at most 32 bits; wider elements are two, on an axis of their own."""
    if x.dtype.name in ("int4", "uint4"):  # One to a byte, of which half is unused.
        return x.astype(np.int8).view(np.uint8) & 15
    if x.dtype.itemsize > 4:
        return np.ascontiguousarray(x).reshape(*x.shape, 1).view(np.uint32)
    return x.view(f"u{x.dtype.itemsize}")
