"""Budgets that depend on the data: decided on the host between compiled stages, from one number per layer and row.

A layer is begun (`begin_layer`: earlier stages done, scores taken, its weight known), waits with its tokens and scores
while other layers are seen, is cut to what is its share by then where budgets cascade (`cut_layer`), and is finished
(`finish_layer`) once all shares are known. `Division` keeps the account.
"""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
from jax import Array

from kvjax.cache import LayerSpec
from kvjax.cache.spread import settled
from kvjax.kernels.known import known
from kvjax.policies.budget import whole
from kvjax.policies.observe import Observation, Prompt
from kvjax.policies.policy import Place, Policy, PolicyError, reduce_before
from kvjax.policies.store import Built


def rounded(slots: int) -> int:
    """Slots rounded up to a multiple of an eighth of their power of two, so that few sizes are ever compiled."""
    step = 1 << max((slots - 1).bit_length() - 3, 0)
    return -(-slots // step) * step


@dataclasses.dataclass(frozen=True)
class Division:
    """How a budget is spread over the layers seen so far; lives on the host.

    Attributes:
      policy: Whose last stage divides its budget by what is seen.
      lengths: Tokens of each prompt [B].
      layers: How many layers are compressed in all.
      weights: What every layer seen so far asks for, [B] each.
      slots: What they get [seen, B] int32.
    """

    policy: Policy
    lengths: np.ndarray
    layers: int
    weights: tuple[np.ndarray, ...] = ()
    slots: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros((0, 1), np.int32))

    def see(self, weight: Any) -> "Division":
        """With one more layer, whose weight is [B]. Where budgets cascade, what a layer has lost stays lost."""
        stage = self.policy.stages[-1]
        weights, mean = (*self.weights, known(weight)), stage.budget.mean(self.lengths)
        slots = stage.divide.divide(np.stack(weights), mean, self.lengths, self.layers, stage.least)
        slots = np.minimum(slots, self.lengths).astype(np.int32)
        if stage.divide.cascades and self.weights:
            slots[:-1] = np.minimum(slots[:-1], self.slots)
        least = np.minimum(stage.least, self.lengths)
        if (slots < least).any() or (slots.sum(0) > whole(np.asarray(mean) * self.layers)).any():
            raise PolicyError(
                f"{self.policy}: a budget of {stage.budget} does not divide into {len(slots)} of {self.layers} layers "
                f"with at least {stage.least} slots each. Give it more, or a smaller window."
            )
        return dataclasses.replace(self, weights=weights, slots=slots)

    def capacity(self, layer: int) -> int:
        """Slots to allocate for the layer-th layer that was seen."""
        return min(rounded(int(self.slots[layer].max())), int(self.lengths.max()))

    def bound(self, layer: int) -> int:
        """Slots that the layer-th layer may grow to: prompts that fit the budget go on until they have reached it."""
        stage = self.policy.stages[-1]
        if stage.update is None:
            return 0
        tokens = stage.budget.tokens or 0
        return int(np.where(self.lengths <= tokens, tokens, self.slots[layer]).max())


@functools.partial(jax.jit, static_argnames=("policy", "spec", "length", "place"))
def begin_layer(
    policy: Policy,
    spec: LayerSpec,
    length: int,
    place: Place,
    observed: tuple[Prompt, Observation],
    slots: Array,
) -> tuple[tuple[Prompt, Observation], Array]:
    """A layer with scores instead of a budget, and its weight [B]; arguments as in `plan.compress_layer`."""
    prompt, obs = observed
    stage = policy.stages[-1]
    prompt = reduce_before(policy, spec, prompt.first(length), obs, slots, place)
    about = Built(obs=obs, spec=spec, capacity=prompt.k.shape[2], role=place.role)
    return (stage.scored(prompt, about), obs), stage.divide.weigh(prompt, obs, spec)


@functools.partial(jax.jit, static_argnames=("policy", "spec", "place", "capacity"))
def cut_layer(
    policy: Policy, spec: LayerSpec, place: Place, capacity: int, begun: tuple[Prompt, Observation], slots: Array
) -> tuple[Prompt, Observation]:
    """A layer that was begun with only its best tokens: slots [B] in each row, in `capacity` places."""
    prompt, obs = begun
    about = Built(obs=obs, spec=spec, capacity=capacity, role=place.role)
    return policy.stages[-1].reduce(prompt, about, slots, capacity), obs


@functools.partial(jax.jit, static_argnames=("policy", "spec", "place"))
def finish_layer(policy: Policy, spec: LayerSpec, place: Place, begun: tuple[Prompt, Observation], slots: Array) -> Any:
    """The cache of a layer that was begun: slots [B] in each row, in the capacity of `place`."""
    prompt, obs = begun
    about = Built(obs=obs, spec=spec, capacity=place.capacities[-1], role=place.role, bound=place.bound)
    layer = policy.stages[-1].build(prompt, about, slots, place.capacities[-1], policy.layout)
    return settled(policy.read.wrap(layer, about).even())
