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
from kvjax.policies import Needs, Observed, Plan, Policy, abstract_cache, compress_decided, decide, plan


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
    wide, slots = decide(_wide(tight, observed), observed)
    return tight if tight.decided else wide, _ready(wide, slots, observed, case.shape[1])


def _wide(tight: Plan, observed: Observed) -> Plan:
    """A plan with capacities for every prompt that is padded to the same length, so that they share compilations.

    Rows know how many slots are theirs, so what is kept does not depend on it.
    """
    width = next((layer[0].k.shape[2] for layer in observed.layers if isinstance(layer, tuple)), tight.length)
    if width == tight.length:
        return tight
    return plan(tight.policy, observed.config, [tight.length, width], observed.last.dtype)


@functools.partial(jax.jit, static_argnames=("plan", "room"))
def _ready(plan: Plan, slots: Array, observed: Observed, room: int) -> Cache:
    """The compressed cache with room for questions and answers; its policy knows only what comes after the prompt."""
    return dataclasses.replace(compress_decided(plan, slots, observed).reserve(room), policy=plan.policy.after_prompt)


@functools.lru_cache(maxsize=4096)
def sizes(tight: Plan, config: Config, dtype: Any) -> tuple[int, int]:
    """Bytes of the cache as `prefill` allocates it for this prompt alone, and of its full-attention layers."""
    cache = abstract_cache(tight, config, 1, dtype)
    return cache.nbytes, sum(tree_nbytes(cache.layers[layer]) for layer in config.full_layers)
