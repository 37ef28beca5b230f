"""What a policy does to a whole cache, across layers."""

from typing import Any

from kvjax.cache import Cache


class Transform:
    """Base of every transform: a frozen, hashable value. `apply` and `step` are pure and run under `jit`."""

    def apply(self, cache: Cache, store: Any) -> Cache:
        """At the end of the prompt, once every layer is laid out by `store`."""
        raise NotImplementedError

    def step(self, cache: Cache) -> Cache:
        """After a token was added to every layer."""
        return cache

    def apart(self, cache: Cache) -> tuple[Any, ...]:
        """Every layer by itself, with its own copy of what layers share: for inspection."""
        return cache.layers

    def whole(self, layer: int, layers: int) -> bool:
        """Whether `apply` wants the layer-th of all compressed layers in full precision, to lay it out itself."""
        del layer, layers
        return False

    def fits(self, policy: Any) -> None:
        """Raises ValueError where the rest of a policy does not go with it."""
        del policy

    def check(self, config: Any) -> None:
        """Raises ValueError where a model's shapes do not fit."""
        del config
