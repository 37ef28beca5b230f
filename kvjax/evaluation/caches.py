"""One prompt, seen once, and the cache that each policy makes of it."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
from jax import Array

from kvjax.cache import Cache
from kvjax.cache.types import tree_nbytes
from kvjax.evaluation.cases import Case, dtype_of
from kvjax.evaluation.tasks import Ids
from kvjax.generation import observe, prefill
from kvjax.model import Model
from kvjax.models.config import Config
from kvjax.policies import (
    Budget,
    Needs,
    Observed,
    Plan,
    Policy,
    abstract_cache,
    compress_decided,
    decide,
    plan,
    with_budget,
)
from kvjax.policies.policy import Place


def see(model: Model, prompt: Ids, policies: Sequence[Policy]) -> Observed:
    needs = functools.reduce(Needs.__or__, (policy.needs for policy in policies))
    tokens, lengths = model.encode(prompt)
    return observe(model.params, model.config, tokens, lengths, needs)


def compressed(model: Model, observed: Observed, case: Case, policy: Policy) -> tuple[Plan, Cache]:
    """The plan for this prompt alone, and a cache that was compressed by it, with room for what comes after."""
    tight = plan(policy, model.config, len(case.prompt), dtype_of(model))
    if policy.in_chunks:
        tokens, lengths = model.encode(case.prompt)
        cache = prefill(model.params, model.config, policy, tokens, lengths).reserve(case.shape[1])
        return tight, dataclasses.replace(cache, policy=policy.after_prompt)
    wide = _wide(policy, tight, observed)
    if tight.decided:
        return tight, _ready(wide, tight.slots(observed.lengths), observed, case.shape[1])
    wide, slots = decide(wide, observed)
    return wide, _ready(wide, slots, observed, case.shape[1])


def _wide(policy: Policy, tight: Plan, observed: Observed) -> Plan:
    """A plan with capacities for every prompt that is padded to the same length, so that they share compilations.

    Rows know how many slots are theirs, so what is kept does not depend on it.
    """
    width = next((layer[0].k.shape[2] for layer in observed.layers if isinstance(layer, tuple)), tight.length)
    if width == tight.length:
        return tight
    config, dtype = observed.config, observed.last.dtype
    if policy != tight.policy and tight.decided and _tokens(tight) < tight.length:
        # As many bytes are another number of tokens for every length: as one ratio, their policies are the same.
        ratio = _tokens(plan(policy, config, width, dtype)) / width
        shared = plan(with_budget(policy, Budget(ratio=ratio)), config, width, dtype)
        if all(map(_has_room, shared.places, tight.places)):
            return shared
    return plan(tight.policy, config, [tight.length, width], dtype)


def _has_room(place: Place, other: Place) -> bool:
    return all(slots >= others for slots, others in zip(place.capacities, other.capacities, strict=True))


def _tokens(plan: Plan) -> int:
    """What bytes have been turned into."""
    return plan.policy.stages[-1].budget.tokens or 0


@functools.partial(jax.jit, static_argnames=("plan", "room"))
def _ready(plan: Plan, slots: Array, observed: Observed, room: int) -> Cache:
    """The compressed cache with room for questions and answers; its policy knows only what comes after the prompt."""
    return dataclasses.replace(compress_decided(plan, slots, observed).reserve(room), policy=plan.policy.after_prompt)


@functools.lru_cache(maxsize=4096)
def sizes(tight: Plan, config: Config, dtype: Any) -> tuple[int, int]:
    """Bytes of the cache as `prefill` allocates it for this prompt alone, and of its full-attention layers."""
    cache = abstract_cache(tight, config, 1, dtype)
    return cache.nbytes, sum(tree_nbytes(cache.layers[layer]) for layer in config.full_layers)
