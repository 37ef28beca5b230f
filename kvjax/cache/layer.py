"""What one layer stores, and the one function between a model and its cache: `Layer.attend`."""

import dataclasses
import typing
from collections.abc import Callable
from typing import Any, Self

import jax
from jax import Array, lax

from kvjax.cache.types import LayerSpec, Tokens
from kvjax.kernels.parts import Part, attend_part, dot_keys, dot_values, fold, merge, part_weights, unfold, visible

# (marks of the slots [B, 1 or H, S], attention weights [B, H, G, T, S + T], new tokens, positions of the slots
# [B, 1 or H, S]) -> marks [B, 1 or H, S + T].
Mark = Callable[[Array, Array, Tokens, Array], Array]


class Layer:
    """Base of every layout: a frozen pytree dataclass, every leaf with the batch on its first axis.

    A layout says how it is read (`read`; `read_both` where old and new tokens take one pass; or `logits` and `mix`,
    from which both follow), how a token is added (`append`), how it grows (`reserve`, `room`) and what it holds (`pos`,
    `held`). The rest has a default.

    Attributes:
      pos: Positions [B, 1 or H, S] int32 of what is held, `EMPTY` where there is nothing.
      marks: What a policy that evicts while decoding remembers of each slot [B, 1 or H, S] float32; None if nothing.
    """

    pos: Any
    marks: Any = None

    @property
    def room(self) -> Array | None:
        """How many more tokens fit, [B] int32; None where old tokens make way by themselves."""
        raise NotImplementedError

    def held(self, spec: LayerSpec) -> tuple[Array, Array, Array]:
        """What attention finds when it looks at everything, slot by slot as in `pos`; for inspection and tests.

        Returns:
          Positions [B, H, S] int32, keys and values [B, H, S, D] float32 (of empty slots anything).
        """
        raise NotImplementedError

    def logits(self, new: Tokens, spec: LayerSpec) -> Array:
        """Products `scale * q . k` of the queries with every stored key: [B, H, G * T, S] float32."""
        raise NotImplementedError

    def mix(self, p: Array) -> Array:
        """Values weighted by p [B, H, G * T, S] float32, which is zero on empty slots: [B, H, G * T, D] float32."""
        raise NotImplementedError

    def append(self, new: Tokens, marks: Array | None = None) -> Self:
        """Stores new tokens; `marks` [B, 1 or H, T] float32 goes with them where the layer keeps marks."""
        raise NotImplementedError

    def reserve(self, slots: int) -> Self:
        """Room for at least `slots` more tokens, and slots that divide over the mesh in use, if there is one."""
        raise NotImplementedError

    def even(self) -> Self:
        """As many more empty slots as make them divide over the mesh in use; the same layer without one."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(typing.cast(Any, self))}
        is_layer = lambda x: isinstance(x, Layer)  # noqa: E731
        inner = {name: x for name, x in fields.items() if any(map(is_layer, jax.tree.leaves(x, is_leaf=is_layer)))}
        grow = lambda x: x.even() if is_layer(x) else x  # noqa: E731
        grown = {name: jax.tree.map(grow, x, is_leaf=is_layer) for name, x in inner.items()}
        return dataclasses.replace(typing.cast(Any, self), **grown)

    def sees(self, q_pos: Array, k_pos: Array, mask: Array) -> Array:
        """Narrows a causal mask [B, 1 or H, T, S] where the layer forgets tokens by itself (rings)."""
        del q_pos, k_pos
        return mask

    def read(self, new: Tokens, spec: LayerSpec, shared: Any = None, *, logits: bool = False) -> Part:
        """Attention of T new tokens over what is stored. A chunk of T tokens sees what T single steps would.

        `logits`: somebody asks for single weights; a layout that cannot give them need not.
        """
        del shared, logits
        q_pos, k_pos = new.pos[:, None], self.pos
        mask = self.sees(q_pos, k_pos, visible(q_pos, k_pos, spec.window))
        return attend_part(self.logits(new, spec), mask, self.mix, spec.softcap)

    def read_new(self, new: Tokens, spec: LayerSpec) -> Part:
        """Causal attention of the new tokens over themselves."""
        pos = new.pos[:, None]
        mask = self.sees(pos, pos, visible(pos, pos, spec.window))
        logits = dot_keys(fold(new.q * spec.scale, new.k.shape[1]), new.k)
        return attend_part(logits, mask, lambda p: dot_values(p, new.v), spec.softcap)

    def read_both(self, new: Tokens, spec: LayerSpec, shared: Any = None, *, logits: bool = False) -> Part:
        """Attention over what is stored and, causally, over the new tokens: [stored | new]."""
        return merge((self.read(new, spec, shared, logits=logits), self.read_new(new, spec)))

    def attend(
        self, new: Tokens, spec: LayerSpec, shared: Any = None, mark: Mark | None = None
    ) -> tuple[Array, Self, Any]:
        """Exact attention of T new tokens over the cache and, causally, over themselves; then they are appended.

        Args:
          new: The tokens. Rows of padding (`EMPTY` positions) attend to nothing and are not stored.
          spec: The layer's attention.
          shared: What layers use together; handed on.
          mark: What to remember of every token for later evictions; only called if the layer keeps marks.

        Returns:
          Output [B, H * G, T, D] float32, the layer with the new tokens, and `shared`.
        """
        mark, length = None if self.marks is None else mark, new.pos.shape[1]
        part = self.read_both(new, spec, shared, logits=mark is not None)
        # What is written later waits until everything is read; else XLA may copy it to have both at once.
        part, layer = lax.optimization_barrier((part, self))
        out = unfold(part.out, length)
        if mark is None:
            return out, layer.append(new), shared
        weights = part_weights(part)
        weights = weights.reshape(*weights.shape[:2], -1, length, weights.shape[-1])
        assert self.marks is not None
        marks, slots = mark(self.marks, weights, new, self.pos), self.pos.shape[-1]
        layer = self.remember(marks[..., :slots]).append(new, marks[..., slots:])
        return out, layer, shared

    def remember(self, marks: Array) -> Self:
        """The same layer with other marks."""
        raise TypeError(f"{type(self).__name__} keeps no marks: {marks.shape} given.")
