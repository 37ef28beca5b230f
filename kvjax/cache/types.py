"""The values that pass between a model and a cache, and the cache of a whole model.

Letters, fixed everywhere: B batch, L layers, T new tokens, S slots, H KV heads, G query heads per KV head, D head dim,
W observed queries. Query head `h * G + g` reads KV head `h`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from kvjax.cache.host import on_host, take_rows
from kvjax.kernels.choose import Implementation
from kvjax.kernels.known import known
from kvjax.kernels.vectors import static as static

EMPTY = -1  # The position of a slot, or of a padding token, that holds nothing.


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerSpec:
    """What attention needs to know of a layer; a static argument.

    Attributes:
      window: A query at position i sees keys j with `i - j < window`; 0 sees all.
      scale: Multiplier of the logits.
      softcap: `cap * tanh(logits / cap)`; 0 for none.
      rope: The layer's rotary embedding, a hashable value that `rotate` understands.
      rotate: `rotate(rope, x [B, heads, T, D], positions [B, T]) -> x`, rotated.
      latent: Values are the last `latent` channels of the keys and are not stored again (MLA); 0 where they are not.
      kernels: Which implementation attends: "auto", or a name that `kvjax.kernels.decode_attention` knows.
    """

    window: int = 0
    scale: float = 1.0
    softcap: float = 0.0
    rope: Any = None
    rotate: Callable[[Any, Array, Array], Array] | None = None
    latent: int = 0
    kernels: Implementation = "auto"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Tokens:
    """T new tokens of one layer, as the model projects them.

    Attributes:
      q: Queries [B, H * G, T, D], normed and rotated.
      k, v: Keys (normed and rotated) and values [B, H, T, D].
      q_raw, k_raw: Queries and keys before rotation.
      pos: Positions [B, T] int32, `EMPTY` for padding.
      trained: Parameters that a trained method has added to this layer, `params["layers"][i]["trained"]`; the model
        hands them on without looking. None if there are none.
    """

    q: Array
    k: Array
    v: Array
    q_raw: Array
    k_raw: Array
    pos: Array
    trained: Any = None


def tree_nbytes(tree: Any) -> int:
    """Bytes of all leaves of a pytree of arrays (or of their abstract values)."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


@jax.jit
def _take(leaves: list[Array | None], index: Array) -> list[Array | None]:
    """Rows of all leaves in one program."""
    return [None if leaf is None else leaf[index] for leaf in leaves]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Cache:
    """What a model remembers of a batch of sequences: an immutable pytree.

    Attributes:
      layers: One `cache.Layer` per layer; kinds and capacities may differ.
      seen: Tokens fed so far [B] int32, which is the position of the next one. Not the number kept.
      shared: What several layers use together, a pytree that is handed from layer to layer within a pass; None if
        nothing.
      config: The model's `Config`.
      policy: The policy that made the cache and goes on managing it while tokens are added.
    """

    layers: tuple[Any, ...]
    seen: Array
    shared: Any = None
    config: Any = static()
    policy: Any = static()

    @property
    def batch_size(self) -> int:
        return self.seen.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of every leaf, the bookkeeping included, in any memory; `memory_nbytes` tells these apart."""
        return tree_nbytes(self)

    @property
    def full_nbytes(self) -> int:
        """Bytes of an uncompressed bfloat16 cache of the same tokens: sliding layers hold their window."""
        c = self.config
        per_token = c.num_kv_heads * c.head_dim * 2 * 2
        seen = known(self.seen)
        held = [seen.clip(max=c.sliding_window) if kind == "sliding" else seen for kind in c.layer_types]
        return int(sum(h.sum() for h in held)) * per_token

    @property
    def compression(self) -> float:
        """`full_nbytes / nbytes`: how many times smaller than the full bfloat16 cache. Needs concrete arrays."""
        return self.full_nbytes / self.nbytes

    @property
    def room(self) -> int | None:
        """Tokens that still fit in every row, None if without bound. Needs concrete arrays."""
        rooms = [int(known(layer.room).min()) for layer in self.layers if layer.room is not None]
        return min(rooms) if rooms else None

    def reserve(self, slots: int) -> "Cache":
        """The same cache with room for at least `slots` more tokens in every layer."""
        return dataclasses.replace(self, layers=tuple(layer.reserve(slots) for layer in self.layers))

    def rows(self, index: Any) -> "Cache":
        """Batch rows by index array, list or slice: select, reorder or repeat. Every leaf follows."""
        if isinstance(index, slice):
            index = np.arange(self.batch_size)[index]
        index = jnp.atleast_1d(jnp.asarray(index))  # One row stays a batch of one.
        index = jnp.flatnonzero(index) if index.dtype == bool else index
        leaves, structure = jax.tree.flatten(self)
        near = [None if on_host(leaf) else leaf for leaf in leaves]
        taken = zip(leaves, _take(near, index), strict=True)
        return jax.tree.unflatten(structure, [take_rows(x, index) if row is None else row for x, row in taken])

    def __getitem__(self, index: Any) -> "Cache":
        return self.rows(index)

    def repeat(self, times: int) -> "Cache":
        """Every row `times` times, neighbours together (as beams want it)."""
        return self.rows(jnp.repeat(jnp.arange(self.batch_size), times))
