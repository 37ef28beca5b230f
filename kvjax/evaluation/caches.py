"""Prompts, seen once, and the caches that each policy makes of them."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from kvjax.cache import Cache
from kvjax.cache.types import tree_nbytes
from kvjax.evaluation.cases import dtype_of
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


def see(model: Model, prompts: Sequence[Ids], policies: Sequence[Policy]) -> Observed:
    """A batch of prompts, with all that the policies want to know about them."""
    needs = functools.reduce(Needs.__or__, (policy.needs for policy in policies))
    tokens, lengths = model.encode(prompts)
    return observe(model.params, model.config, tokens, lengths, needs)


def alike(policy: Policy, length: int) -> int:
    """What has to be the same for prompts that are compressed together: each is treated as if it were alone.

    As many bytes are another number of tokens for every length. Rows may keep different numbers of tokens, but a policy
    that divides tokens by what it sees, or that acts in chunks, is told one number for all.
    """
    by_length = bool(policy.stages) and policy.stages[-1].budget.in_bytes and (policy.divided or policy.in_chunks)
    return length if by_length else 0


def compressed(
    model: Model, observed: Observed | None, prompts: Sequence[Ids], policy: Policy, room: int = 0
) -> tuple[tuple[Plan, ...], Cache]:
    """A batch of prompts, each compressed as if it were alone, with room for what comes after.

    Args:
      observed: What `see` has seen of the prompts; not read if the policy acts in chunks, while they are fed.
      prompts: Token ids; lengths for which `alike` says the same.
      room: Tokens that come after.

    Returns:
      The plan of each prompt alone, and the cache; its policy knows only what comes after prompts.
    """
    tight = tuple(plan(policy, model.config, len(prompt), dtype_of(model)) for prompt in prompts)
    if policy.in_chunks:
        tokens, lengths = model.encode(prompts)
        cache = prefill(model.params, model.config, policy, tokens, lengths).reserve(room)
        return tight, dataclasses.replace(cache, policy=policy.after_prompt)
    assert observed is not None
    wide = _wide(policy, tight, observed)
    if wide.decided:
        slots = jnp.concatenate([each.slots(jnp.asarray([each.length])) for each in tight], -1)
        return tight, _ready(wide, slots, observed, room)
    wide, slots = decide(wide, observed)
    return (wide,) * len(prompts), _ready(wide, slots, observed, room)


def _wide(policy: Policy, tight: Sequence[Plan], observed: Observed) -> Plan:
    """A plan with capacities for every prompt that is padded to the same length, so that they share compilations.

    Rows know how many slots are theirs, so what is kept does not depend on it.
    """
    longest = max(tight, key=lambda each: each.length)
    width = next((layer[0].k.shape[2] for layer in observed.layers if isinstance(layer, tuple)), longest.length)
    config, dtype = observed.config, observed.last.dtype
    if policy != longest.policy and longest.decided and all(_tokens(each) < each.length for each in tight):
        # As many bytes are another number of tokens for every length: as one ratio, their policies are the same.
        ratio = min(_tokens(plan(policy, config, width, dtype)) / width, 1.0)
        shared = plan(with_budget(policy, Budget(ratio=ratio)), config, width, dtype)
        if all(_has_room(shared, each) for each in tight):
            return shared
    return plan(longest.policy, config, [*(each.length for each in tight), width], dtype)


def _has_room(plan: Plan, other: Plan) -> bool:
    capacities = lambda plan: [slots for place in plan.places for slots in place.capacities]  # noqa: E731
    return all(slots >= others for slots, others in zip(capacities(plan), capacities(other), strict=True))


def _tokens(plan: Plan) -> int:
    """What bytes have been turned into."""
    return plan.policy.stages[-1].budget.tokens or 0


@functools.partial(jax.jit, static_argnames=("plan", "room"))
def _ready(plan: Plan, slots: Array, observed: Observed, room: int) -> Cache:
    """The compressed cache with room for questions and answers; its policy knows only what comes after the prompt."""
    return dataclasses.replace(compress_decided(plan, slots, observed).reserve(room), policy=plan.policy.after_prompt)


def sizes(plans: Sequence[Plan], config: Config, dtype: Any) -> tuple[int, int]:
    """Bytes of the caches as `prefill` allocates them for each prompt alone, and of their full-attention layers."""
    both = [_sizes(each, config, dtype) for each in plans]
    return sum(whole for whole, _ in both), sum(full for _, full in both)


@functools.lru_cache(maxsize=4096)
def _sizes(plan: Plan, config: Config, dtype: Any) -> tuple[int, int]:
    cache = abstract_cache(plan, config, 1, dtype)
    return cache.nbytes, sum(tree_nbytes(cache.layers[layer]) for layer in config.full_layers)
