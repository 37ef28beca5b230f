"""How much of the budget does a layer ask for? Preferences of layers, and their shares of a budget.

`preference(prompt, obs, spec)` -> [B] float32 for one layer, the logarithm of what it asks for; `needs` says which
statistics it reads. `Proportional` turns the preferences of all layers into slots.
"""

import dataclasses
from typing import Any, Protocol

import jax.numpy as jnp
import numpy as np
from jax import Array

from kvjax.cache import LayerSpec
from kvjax.policies.budget import whole
from kvjax.policies.observe import Needs, Observation, Prompt
from kvjax.policies.score import before_window, window_attention


class Preference(Protocol):
    @property
    def needs(self) -> Needs: ...

    def __call__(self, prompt: Prompt, obs: Observation, spec: LayerSpec) -> Array: ...


@dataclasses.dataclass(frozen=True)
class DispersionAndShift:
    """Layers that spread their attention over many tokens, and move it about, ask for more (CAKE, section 4.1).

    Of the attention that an observation window pays to the tokens before it: entropy^(1/tau1) * variance^(1/tau2), the
    variance over the window's queries (unbiased) summed over tokens, both summed over heads.

    Attributes:
      window: Queries at the end of the prompt, at least 2.
      tau1, tau2: Temperatures of entropy and variance.
    """

    window: int = 32
    tau1: float = 1.0
    tau2: float = 1.0

    def __post_init__(self):
        if self.window < 2 or self.tau1 <= 0 or self.tau2 <= 0:
            raise ValueError(
                f"A variance needs a window of two queries at least, and temperatures are positive; got {self}."
            )

    @property
    def needs(self) -> Needs:
        return Needs(window=self.window)

    def __call__(self, prompt: Prompt, obs: Observation, spec: LayerSpec) -> Array:
        before = before_window(prompt, obs, self.window)[:, :, None]  # [B, 1 or H, 1, S]
        seen = jnp.where(before[:, :, :, None], window_attention(prompt, obs, spec, self.window), 0.0)
        entropy = -(seen * jnp.log(seen + 1e-10)).sum((1, 2, 3, 4))
        shift = seen.var(3, ddof=1).sum((1, 2, 3))
        return jnp.log(entropy) / self.tau1 + jnp.log(shift) / self.tau2


@dataclasses.dataclass(frozen=True)
class Evenness:
    """Layers whose keys receive even amounts of attention ask for more (D2O, section 3.2).

    The variance over keys of the attention that each receives from the whole prompt, scaled to 0..1 over the layer's
    query heads and averaged, counts against a layer. With one query head all layers ask for the same.
    """

    needs = Needs(column_spread=True)

    def __call__(self, prompt: Prompt, obs: Observation, spec: LayerSpec) -> Array:
        del prompt, spec
        assert obs.column_spread is not None
        low, high = (extreme(obs.column_spread, -1, keepdims=True) for extreme in (jnp.min, jnp.max))
        return -((obs.column_spread - low) / (high - low + 1e-6)).mean(-1)


@dataclasses.dataclass(frozen=True)
class Proportional:
    """Every layer gets its share in proportion to the exponential of its preference, in whole slots.

    What a layer cannot hold, and what rounding has left, is dealt to the others in equal parts, early layers first.

    Attributes:
      preference: What is asked for.
      cascades: Whether layers are cut to their share of the whole budget as soon as the next one is seen.
      apart: Whether the floor of every layer is set apart and what is above it shared; otherwise all is shared, and no
        layer falls below the floor.
    """

    preference: Preference
    cascades: bool = False
    apart: bool = False

    @property
    def needs(self) -> Needs:
        return self.preference.needs

    def weigh(self, prompt: Any, obs: Any, spec: Any) -> Array:
        return self.preference(prompt, obs, spec)

    def divide(self, weights: np.ndarray, mean: Any, length: Any, layers: int, least: int) -> np.ndarray:
        low = np.minimum(least, np.asarray(length))
        base = low if self.apart else np.zeros_like(low)
        total = whole(np.asarray(mean) * layers) - base * layers
        rows = [
            shared(weights[:, row], int(total[row]), int(low[row] - base[row]), int(length[row] - base[row]))
            for row in range(len(length))
        ]
        return base + np.stack(rows, 1)


def shared(preferences: np.ndarray, total: int, low: int, high: int) -> np.ndarray:
    """`total` in proportion to exp(preferences) [n], in whole numbers from low to high: [n] int32.

    The sum is `total`, or as near to it as the bounds allow. Layers of which nothing is known (a preference that is not
    finite, as of prompts shorter than the window) ask for nothing, unless all do.
    """
    asked = np.asarray(preferences, np.float64)
    finite = np.isfinite(asked)
    asked = np.where(finite, np.exp(asked - asked.max(initial=-np.inf, where=finite)), 0.0) if finite.any() else asked
    shares = asked / asked.sum() if finite.any() else np.full(len(asked), 1 / len(asked))
    given = np.floor(shares * total).astype(np.int32)
    slots = given.clip(low, high)
    slots = dealt(slots, int(given.sum() - slots.sum()), low, high)
    total = min(max(total, low * len(slots)), high * len(slots))
    while missing := int(total - slots.sum()):
        slots = dealt(slots, missing, low, high)
    return slots


def dealt(slots: np.ndarray, amount: int, low: int, high: int) -> np.ndarray:
    """Adds `amount` in equal parts to the layers that can take it, or takes it from those that can give, within bounds.

    What does not divide goes to the first of them.
    """
    able = slots < high if amount > 0 else slots > low
    if not able.any():
        return slots
    each, over = divmod(abs(amount), int(able.sum()))
    parts = able * each + (able & (np.cumsum(able) <= over))
    return (slots + np.sign(amount) * parts).clip(low, high).astype(np.int32)
