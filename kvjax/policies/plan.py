"""How many slots every layer gets: decided on the host before anything is compiled, or refused there."""

import dataclasses
import functools
import typing
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.cache import Cache, LayerSpec, make_ring, tree_nbytes
from kvjax.cache.types import static
from kvjax.models.config import Config
from kvjax.models.transformer import layer_spec
from kvjax.policies.budget import Budget
from kvjax.policies.observe import Needs, Observation, Prompt
from kvjax.policies.policy import Policy, PolicyError, make_layer


@dataclasses.dataclass(frozen=True)
class Plan:
    """Slots to allocate; a static argument.

    Attributes:
      policy: With budgets in bytes turned into tokens.
      length: Tokens of the longest prompt.
      capacities: For every compressed layer, for every stage, the slots of the longest row.
    """

    policy: Policy
    length: int
    capacities: tuple[tuple[int, ...], ...]

    def slots(self, lengths: jax.Array) -> jax.Array:
        """Tokens that every row keeps: [layers, stages, B] int32 for prompts of lengths [B]."""
        layers, stages = len(self.capacities), self.policy.stages
        if not stages:
            return jnp.zeros((layers, 0, lengths.shape[0]), jnp.int32)
        return jnp.stack([jnp.asarray(stage.slots(lengths, layers), jnp.int32) for stage in stages], 1)


def plan(policy: Policy, config: Config, lengths: Any, dtype: Any) -> Plan:
    """Slots of every layer for prompts of these lengths.

    Args:
      policy: Any policy.
      config: The model.
      lengths: Tokens of each prompt: an int, or integers [B].
      dtype: Of the model's keys and values; bytes depend on it.

    Raises:
      PolicyError: The model cannot serve the policy, or the budget is smaller than the method needs.
    """
    lengths = np.atleast_1d(np.asarray(lengths, np.int32))
    length, layers = int(lengths.max()), len(config.full_layers)
    if policy.stages and not layers:
        raise PolicyError(f"{policy} compresses full-attention layers, and {config.family} has none. Use 'full'.")
    try:
        policy.layout.check(config)
    except ValueError as error:
        raise PolicyError(f"{policy}: {error}") from None
    if policy.stages and policy.stages[-1].budget.bytes is not None:
        policy = _in_tokens(policy, config, length, dtype)
    per_stage = []
    for stage in policy.stages:
        slots = np.asarray(stage.slots(lengths, layers))
        short = (slots < stage.least) & (slots < lengths)
        if short.any():
            layer, row = (int(i) for i in np.argwhere(short)[0])
            raise PolicyError(
                f"{policy}: a budget of {stage.budget} leaves {slots[layer, row]} of {lengths[row]} tokens in layer "
                f"{config.full_layers[layer]}, and the method needs at least {stage.least}. Give it more, or fewer "
                "sinks and a smaller window."
            )
        per_stage.append(slots.max(1))
    capacities = tuple(tuple(int(slots[i]) for slots in per_stage) for i in range(layers))
    return Plan(policy, length, capacities)


def _in_tokens(policy: Policy, config: Config, length: int, dtype: Any) -> Policy:
    """The policy with its last budget in tokens: the most whose cache, for one sequence, fits the bytes."""
    *before, last = policy.stages
    allowed = last.budget.bytes or 0

    def with_tokens(tokens: int) -> Policy:
        stage = dataclasses.replace(last, budget=Budget(tokens=tokens))  # type: ignore[type-var]
        return Policy(stages=(*before, stage), store=policy.store, read=policy.read, label=policy.label)

    def size(tokens: int) -> int:
        return nbytes(plan(with_tokens(tokens), config, length, dtype), config, dtype)

    low, high = last.least, length
    if size(low) > allowed:
        raise PolicyError(
            f"{policy}: {allowed} bytes are too few: the layers that are not compressed and {low} slots in each of the "
            f"others take {size(low)}."
        )
    while low < high:  # The largest number of tokens that fits.
        middle = (low + high + 1) // 2
        low, high = (middle, high) if size(middle) <= allowed else (low, middle - 1)
    return with_tokens(low)


def nbytes(plan: Plan, config: Config, dtype: Any) -> int:
    """Bytes of the cache of one sequence.

    A policy that evicts at every step needs one more slot as soon as a token is added; that slot counts.
    """
    cache = abstract_cache(plan, config, 1, dtype)
    return tree_nbytes(jax.eval_shape(lambda cache: cache.reserve(1), cache) if plan.policy.acts_every_step else cache)


@typing.no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Observed:
    """A whole prompt, seen but not compressed: one of these feeds any number of policies.

    Attributes:
      layers: (Prompt, Observation) of every full-attention layer; the ring of every sliding one.
      lengths: Tokens of each prompt [B] int32.
      last: Final hidden state of each prompt's last token [B, hidden].
      config: The model.
      needs: The statistics that were observed.
    """

    layers: tuple[Any, ...]
    lengths: jax.Array
    last: jax.Array
    config: Config = static()
    needs: Needs = static()


def compress_layer(
    policy: Policy, spec: LayerSpec, length: int, places: tuple[int, ...], observed: Any, slots: jax.Array
) -> Any:
    """The cache of one full-attention layer.

    Args:
      policy, spec: What to do, and to which kind of layer.
      length: Tokens of the longest prompt; padding beyond is cut off.
      places: Slots that each stage allocates.
      observed: (Prompt, Observation) of the layer.
      slots: Tokens that each stage leaves in each row [stages, B] int32.
    """
    prompt, obs = observed
    if prompt.k.shape[2] > length:
        prompt = prompt.take(jnp.arange(length)[None, None], jnp.asarray(True))
    return make_layer(policy, spec, prompt, obs, slots, places)


@functools.partial(jax.jit, static_argnames="plan")
def compress(plan: Plan, observed: Observed) -> Cache:
    """Applies a policy to a prompt that was observed: a pure function, the same as compressing while prefilling."""
    config, slots = observed.config, plan.slots(observed.lengths)
    layers = list(observed.layers)
    for i, layer in enumerate(config.full_layers):
        spec, places = layer_spec(config, layer), plan.capacities[i]
        layers[layer] = compress_layer(plan.policy, spec, plan.length, places, layers[layer], slots[i])
    return Cache(layers=tuple(layers), seen=observed.lengths, config=config, policy=plan.policy)


def abstract_cache(plan: Plan, config: Config, batch: int, dtype: Any) -> Cache:
    """The cache that a plan leads to, as shapes without data: what would it cost?"""
    needs, length, dim = plan.policy.needs, plan.length, config.head_dim

    def observed() -> Observed:
        kv = jnp.zeros((batch, config.num_kv_heads, length, dim), dtype)
        pos = jnp.zeros((batch, 1, length), jnp.int32)
        moments = jnp.zeros((batch, config.num_heads, dim)), jnp.zeros((batch, config.num_heads, dim, dim))
        obs = Observation(
            q=jnp.zeros((batch, config.num_heads, needs.window, dim), dtype),
            q_pos=jnp.zeros((batch, needs.window), jnp.int32),
            moments=dict.fromkeys(needs.moments, moments),
            length=pos[:, 0, 0],
            layer=jnp.int32(0),
        )
        full = (Prompt(k=kv, v=kv, pos=pos, sums=jnp.zeros(kv.shape[:3])), obs)
        ring = make_ring(kv, kv, pos[:, 0], config.sliding_window) if config.sliding_window else None
        layers = tuple(full if kind == "full" else ring for kind in config.layer_types)
        last = jnp.zeros((batch, config.hidden_size), dtype)
        return Observed(layers=layers, lengths=pos[:, 0, 0], last=last, config=config, needs=needs)

    return jax.eval_shape(lambda: compress(plan, observed()))
