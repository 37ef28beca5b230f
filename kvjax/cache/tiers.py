"""Layouts made of layouts: several tiers that are attended together, and a layer that is seen through a lens."""

import dataclasses
import typing
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import Array

from kvjax.cache.layer import Layer
from kvjax.cache.types import LayerSpec, Tokens, static
from kvjax.kernels.parts import Part, fold, merge


@typing.no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiers(Layer):
    """Several inner layers that hold different tokens; new ones go to the last.

    Attributes:
      tiers: Inner layers, at least one.
    """

    tiers: tuple[Any, ...]

    @property
    def pos(self) -> Array:
        return side_by_side([tier.pos for tier in self.tiers])

    @property
    def room(self) -> Array | None:
        return self.tiers[-1].room

    def held(self, spec: LayerSpec) -> tuple[Array, Array, Array]:
        pos, k, v = zip(*(tier.held(spec) for tier in self.tiers), strict=True)
        return jnp.concatenate(pos, 2), jnp.concatenate(k, 2), jnp.concatenate(v, 2)

    def read(self, new: Tokens, spec: LayerSpec, shared: Any = None, *, logits: bool = False) -> Part:
        return merge([tier.read(new, spec, shared, logits=logits) for tier in self.tiers])

    def read_both(self, new: Tokens, spec: LayerSpec, shared: Any = None, *, logits: bool = False) -> Part:
        *first, last = self.tiers
        parts = [tier.read(new, spec, shared, logits=logits) for tier in first]
        return merge([*parts, last.read_both(new, spec, shared, logits=logits)])

    def sees(self, q_pos: Array, k_pos: Array, mask: Array) -> Array:
        return self.tiers[-1].sees(q_pos, k_pos, mask)

    def append(self, new: Tokens, marks: Array | None = None) -> "Tiers":
        return self._with_last(self.tiers[-1].append(new, marks))

    def reserve(self, slots: int) -> "Tiers":
        return self._with_last(self.tiers[-1].reserve(slots))

    def _with_last(self, last: Any) -> "Tiers":
        return dataclasses.replace(self, tiers=(*self.tiers[:-1], last))


def side_by_side(positions: list[Array]) -> Array:
    """Positions [B, 1 or H, S] of several layers as [B, 1 or H, sum of S]."""
    heads = max(pos.shape[1] for pos in positions)
    return jnp.concatenate([jnp.broadcast_to(pos, (pos.shape[0], heads, pos.shape[2])) for pos in positions], -1)


class Lens(Protocol):
    """A pytree that changes keys, and queries so that products stay (nearly) the same."""

    def keys(self, k: Array) -> Array:
        """Keys [B, H, T, D] as they are stored [B, H, T, D']."""
        ...

    def queries(self, q: Array) -> Array:
        """Queries [B, H * G, T, D] that meet such keys [B, H * G, T, D']."""
        ...

    def restore(self, k: Array) -> Array:
        """Stored keys [B, H, S, D'] as the model's queries see them [B, H, S, D]."""
        ...


@typing.no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Through(Layer):
    """An inner layer that stores other keys than the model's, and is asked with other queries.

    Attributes:
      inner: Holds `lens.keys(k)`.
      lens: The change.
      value_lens: Values are stored changed too, as `value_lens.keys(v)`; None if not.
    """

    inner: Any
    lens: Any
    value_lens: Any = None

    @property
    def pos(self) -> Array:
        return self.inner.pos

    @property
    def marks(self) -> Array | None:
        return self.inner.marks

    @property
    def room(self) -> Array | None:
        return self.inner.room

    def held(self, spec: LayerSpec) -> tuple[Array, Array, Array]:
        pos, k, v = self.inner.held(spec)
        return pos, self.lens.restore(k), v if self.value_lens is None else self.value_lens.restore(v)

    def _through(self, new: Tokens) -> Tokens:
        v = new.v if self.value_lens is None else self.value_lens.keys(new.v)
        return dataclasses.replace(new, q=self.lens.queries(new.q), k=self.lens.keys(new.k), v=v)

    def read(self, new: Tokens, spec: LayerSpec, shared: Any = None, *, logits: bool = False) -> Part:
        part = self.inner.read(self._through(new), spec, shared, logits=logits)
        return part if self.value_lens is None else dataclasses.replace(part, out=self.value_lens.restore(part.out))

    def sees(self, q_pos: Array, k_pos: Array, mask: Array) -> Array:
        return self.inner.sees(q_pos, k_pos, mask)

    def append(self, new: Tokens, marks: Array | None = None) -> "Through":
        return dataclasses.replace(self, inner=self.inner.append(self._through(new), marks))

    def remember(self, marks: Array) -> "Through":
        return dataclasses.replace(self, inner=self.inner.remember(marks))

    def reserve(self, slots: int) -> "Through":
        return dataclasses.replace(self, inner=self.inner.reserve(slots))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Balance:
    """Each key channel is multiplied by a factor of its own, and the query channel divided by it.

    Attributes:
      factor: [B, H, D] float32, positive.
    """

    factor: Array

    def keys(self, k: Array) -> Array:
        return (k * self.factor[:, :, None]).astype(k.dtype)

    def queries(self, q: Array) -> Array:
        groups = fold(q, self.factor.shape[1])
        return (groups / self.factor[:, :, None]).reshape(q.shape).astype(q.dtype)

    def restore(self, k: Array) -> Array:
        return k / self.factor[:, :, None]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Channels:
    """Only some channels of the keys are stored, others in each head.

    Attributes:
      index: The stored channels [B, H, D'] int32.
      dim: D, channels of a whole key.
    """

    index: Array
    dim: int = static()

    def keys(self, k: Array) -> Array:
        return jnp.take_along_axis(k, self.index[:, :, None], -1)

    def queries(self, q: Array) -> Array:
        groups = fold(q, self.index.shape[1])
        return jnp.take_along_axis(groups, self.index[:, :, None], -1).reshape(*q.shape[:3], -1)

    def restore(self, k: Array) -> Array:
        batch, heads, slots, _ = k.shape
        k = jnp.swapaxes(k, -1, -2)
        rows = jnp.arange(batch)[:, None, None], jnp.arange(heads)[None, :, None]
        zeros = jnp.zeros((batch, heads, self.dim, slots), k.dtype)
        return jnp.swapaxes(zeros.at[*rows, self.index].set(k), -1, -2)
