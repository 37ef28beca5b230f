"""Which stored tokens does a query look at?"""

import dataclasses
from typing import Any

from kvjax.policies.observe import Needs
from kvjax.policies.store import Built


class Read:
    """Base of every way to read: a frozen, hashable value. Here a query looks at everything that is stored.

    Attributes:
      needs: What it asks to see of a prompt.
    """

    needs = Needs()

    def wrap(self, layer: Any, about: Built) -> Any:
        """A layer as the store has built it -> the same layer, read in this way from now on."""
        del about
        return layer

    def role(self, layer: int, layers: int) -> Any:
        """What the layer-th of all compressed layers is to do: a hashable value; None where all do the same."""
        del layer, layers

    def share(self, batch: int, config: Any) -> Any:
        """What layers hand on to each other within a pass: a pytree of arrays [B, ...], None for nothing."""
        del batch, config

    def fits(self, policy: Any) -> None:
        """Raises ValueError where the rest of a policy does not go with it."""
        del policy

    def check(self, config: Any) -> None:
        """Raises ValueError where a model's shapes do not fit."""
        del config


@dataclasses.dataclass(frozen=True)
class ReadAll(Read):
    """Every query looks at everything that is stored."""
