"""Heads of different kinds: each group of KV heads has a layer cache of its own."""

import dataclasses
import typing
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from kvjax.cache.layer import Layer
from kvjax.cache.types import EMPTY, LayerSpec, Tokens, static
from kvjax.kernels.parts import Part


@typing.no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class ByHead(Layer):
    """One layer whose KV heads are stored in different ways.

    Attributes:
      groups: The layer cache of each group of heads.
      heads: The KV heads of each group; every head is in one of them.
    """

    groups: tuple[Any, ...]
    heads: tuple[tuple[int, ...], ...] = static()

    def _together(self, parts: list[Array]) -> Array:
        """Arrays [B, heads of the group, ...] of all groups as one [B, H, ...]."""
        order = [head for heads in self.heads for head in heads]
        back = sorted(range(len(order)), key=order.__getitem__)
        joined = jnp.concatenate(parts, 1)
        return joined if back == list(range(len(order))) else joined[:, jnp.asarray(back)]

    def _padded(self, parts: list[Array], fill: float) -> Array:
        """The same of [B, heads of the group, S, ...], with places of different numbers."""
        most = max(x.shape[2] for x in parts)
        pad = lambda x: ((0, 0), (0, 0), (0, most - x.shape[2])) + ((0, 0),) * (x.ndim - 3)  # noqa: E731
        return self._together([jnp.pad(x, pad(x), constant_values=fill) for x in parts])

    def _broadcast(self, parts: list[Array]) -> list[Array]:
        """[B, 1 or heads of the group, ...] -> [B, heads of the group, ...]."""
        return [
            jnp.broadcast_to(x, (x.shape[0], len(heads), *x.shape[2:]))
            for x, heads in zip(parts, self.heads, strict=True)
        ]

    @property
    def pos(self) -> Array:
        return self._padded(self._broadcast([group.pos for group in self.groups]), EMPTY)

    @property
    def room(self) -> Array | None:
        rooms = [group.room for group in self.groups if group.room is not None]
        return jnp.stack(rooms).min(0) if rooms else None

    def held(self, spec: LayerSpec) -> tuple[Array, Array, Array]:
        pos, k, v = zip(*(group.held(spec) for group in self.groups), strict=True)
        return self._padded(list(pos), EMPTY), self._padded(list(k), 0), self._padded(list(v), 0)

    def read(self, new: Tokens, spec: LayerSpec, shared: Any = None, *, logits: bool = False) -> Part:
        del logits
        pairs = zip(self.groups, self.heads, strict=True)
        return self._joined([group.read(of_heads(new, heads), spec, shared) for group, heads in pairs])

    def read_both(self, new: Tokens, spec: LayerSpec, shared: Any = None, *, logits: bool = False) -> Part:
        del logits
        pairs = zip(self.groups, self.heads, strict=True)
        return self._joined([group.read_both(of_heads(new, heads), spec, shared) for group, heads in pairs])

    def _joined(self, parts: list[Part]) -> Part:
        return Part(out=self._together([p.out for p in parts]), lse=self._together([p.lse for p in parts]))

    def sees(self, q_pos: Array, k_pos: Array, mask: Array) -> Array:
        return self._together(self._broadcast([group.sees(q_pos, k_pos, mask) for group in self.groups]))

    def append(self, new: Tokens, marks: Array | None = None) -> "ByHead":
        room = self.room
        if room is not None:  # What does not fit one group is stored in none.
            fits = jnp.arange(new.pos.shape[1]) < room[:, None]
            new = dataclasses.replace(new, pos=jnp.where(fits, new.pos, EMPTY))
        pairs = zip(self.groups, self.heads, strict=True)
        return dataclasses.replace(self, groups=tuple(g.append(of_heads(new, heads)) for g, heads in pairs))

    def reserve(self, slots: int) -> "ByHead":
        return dataclasses.replace(self, groups=tuple(group.reserve(slots) for group in self.groups))


def of_heads(new: Tokens, heads: tuple[int, ...]) -> Tokens:
    """The tokens as some KV heads, and the query heads that read them, see them."""
    group = new.q.shape[1] // new.k.shape[1]
    index = jnp.asarray(heads)
    queries = (index[:, None] * group + jnp.arange(group)).reshape(-1)
    return dataclasses.replace(
        new,
        q=new.q[:, queries],
        k=new.k[:, index],
        v=new.v[:, index],
        q_raw=new.q_raw[:, queries],
        k_raw=new.k_raw[:, index],
    )
