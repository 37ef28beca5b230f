"""How many slots every layer gets: decided on the host before anything is compiled, or refused there."""

import dataclasses
import functools
import itertools
import math
import typing
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from kvjax.cache import Cache, LayerSpec, Tokens, make_ring, tree_nbytes
from kvjax.cache.spread import settled
from kvjax.cache.types import static
from kvjax.kernels import mesh
from kvjax.kernels.known import known
from kvjax.models.config import Config
from kvjax.models.transformer import layer_spec
from kvjax.policies.budget import Budget
from kvjax.policies.divide import Division, begin_layer, finish_layer
from kvjax.policies.observe import Needs, statistics
from kvjax.policies.policy import Place, Policy, PolicyError, make_layer


@dataclasses.dataclass(frozen=True)
class Plan:
    """Slots to allocate; a static argument.

    Attributes:
      policy: With budgets in bytes turned into tokens.
      length: Tokens of the longest prompt.
      places: For every compressed layer, what each stage allocates for the longest row, and the layer's role.
      decided: False where budgets depend on the data: then `places` give every layer the same, and `decide` the rest.
    """

    policy: Policy
    length: int
    places: tuple[Place, ...]
    decided: bool = True

    def slots(self, lengths: jax.Array) -> jax.Array:
        """Tokens that every row keeps: [layers, stages, B] int32 for prompts of lengths [B]."""
        layers, stages = len(self.places), self.policy.stages
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
    if policy != Policy() and not layers:
        raise PolicyError(f"{policy} compresses full-attention layers, and {config.family} has none. Use 'full'.")
    try:
        policy.check(config)
    except ValueError as error:
        raise PolicyError(f"{policy}: {error}") from None
    if policy.stages and policy.stages[-1].budget.in_bytes:
        with mesh.alone():  # The same tokens stay wherever they lie.
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
        per_stage.append([mesh.even(int(most), 1) for most in slots.max(1)])
    places = tuple(
        Place(tuple(itertools.accumulate((slots[i] for slots in per_stage), min)), policy.role(i, layers))
        for i in range(layers)
    )
    return Plan(policy, length, places, decided=not policy.divided)


@functools.lru_cache(maxsize=4096)  # A dozen abstract caches each, and the same for every prompt of a length.
def _in_tokens(policy: Policy, config: Config, length: int, dtype: Any) -> Policy:
    """The policy with its last budget in tokens: the most whose cache, for one sequence, fits the bytes."""
    last = policy.stages[-1]
    allowed = last.budget.bytes or 0
    if last.budget.size is not None:
        allowed = math.floor(last.budget.size * nbytes(plan(Policy(), config, length, dtype), config, dtype))

    def size(tokens: int) -> int:
        return nbytes(plan(with_budget(policy, Budget(tokens=tokens)), config, length, dtype), config, dtype)

    least, most = last.least, max(length, last.least)
    if (smallest := size(least)) > allowed:
        raise PolicyError(
            f"{policy}: {allowed} bytes are too few: the layers that are not compressed and {least} slots in each of "
            f"the others take {smallest}."
        )
    guess = _guess(policy, config, length, dtype)
    if guess is None:  # Bytes are nearly linear in tokens.
        guess = least + (most - least) * (allowed - smallest) // max(size(most) - smallest, 1)
    low, high = _bracket(lambda tokens: size(tokens) <= allowed, least, most, guess)
    while high - low > 1:  # `low` fits and `high` does not.
        middle = (low + high) // 2
        low, high = (middle, high) if size(middle) <= allowed else (low, middle)
    return with_budget(policy, Budget(tokens=low))


def with_budget(policy: Policy, budget: Budget) -> Policy:
    """The policy with another last budget."""
    *before, last = policy.stages
    stage = dataclasses.replace(last, budget=budget)  # type: ignore[type-var]
    return dataclasses.replace(policy, stages=(*before, stage))


def _guess(policy: Policy, config: Config, length: int, dtype: Any) -> int | None:
    """About how many tokens fit: the same part of the length as at the power of two below it; None where that is it."""
    anchor = 1 << (length.bit_length() - 1)
    if anchor == length:
        return None
    try:
        tokens = _in_tokens(policy, config, anchor, dtype).stages[-1].budget.tokens or 0
    except PolicyError:
        return None
    return tokens * length // anchor


def _bracket(fits: Callable[[int], bool], least: int, most: int, guess: int) -> tuple[int, int]:
    """Numbers of which the first fits and the second does not, or is `most + 1`, in growing steps from a guess.

    `least` is known to fit; each question costs some tracing.
    """
    low, high, step = least, most + 1, 1
    at = min(max(guess, least), most)
    while low < at < high:
        if fits(at):
            low, at = at, min(at + step, most + 1)
        else:
            high, at = at, max(at - step, least)
        step *= 2
    return low, high


def nbytes(plan: Plan, config: Config, dtype: Any) -> int:
    """Bytes of the cache of one sequence.

    A policy that evicts at every step needs one more slot as soon as a token is added; that slot counts. Where budgets
    depend on the data, the largest cache that they can lead to.
    """
    cache = abstract_cache(_worst(plan), config, 1, dtype)
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


def compress_layer(policy: Policy, spec: LayerSpec, length: int, place: Place, observed: Any, slots: jax.Array) -> Any:
    """The cache of one full-attention layer.

    Args:
      policy, spec: What to do, and to which kind of layer.
      length: Tokens of the longest prompt; padding beyond is cut off.
      place: What is allocated.
      observed: (Prompt, Observation) of the layer.
      slots: Tokens that each stage leaves in each row [stages, B] int32.
    """
    prompt, obs = observed
    return settled(make_layer(policy, spec, prompt.first(length), obs, slots, place).even())


def assemble(policy: Policy, config: Config, layers: Any, lengths: jax.Array) -> Cache:
    """The whole cache, of its layers."""
    shared = policy.read.share(lengths.shape[0], config)
    cache = Cache(layers=tuple(layers), seen=lengths, shared=shared, config=config, policy=policy)
    if policy.transform is None:
        return cache
    cache = policy.transform.apply(cache, policy.layout)
    return dataclasses.replace(cache, layers=tuple(settled(layer.even()) for layer in cache.layers))


def compress(plan: Plan, observed: Observed) -> Cache:
    """Applies a policy to a prompt that was observed: a pure function, the same as compressing while prefilling.

    Raises:
      PolicyError: The policy acts while the prompt is fed, in chunks. Or, under an outer `jit`, budgets depend on the
        data: use `decide` before, and `compress_decided`.
    """
    if plan.policy.in_chunks:
        raise PolicyError(
            f"{plan.policy}: acts on every chunk while the prompt is fed, so that later chunks see what earlier ones "
            "have left. Use `prefill`."
        )
    if plan.decided:
        return compress_decided(plan, plan.slots(observed.lengths), observed)
    begun, division = _begin(plan, observed)
    return finish(plan, division, begun, observed.config, observed.layers, observed.lengths)


def decide(plan: Plan, observed: Observed) -> tuple[Plan, jax.Array | np.ndarray]:
    """The plan with all capacities, and the tokens that every row keeps [layers, stages, B] int32.

    Where budgets depend on the data this runs on the host, from one number per layer and row; else it says what is
    known already.
    """
    if plan.decided:
        return plan, plan.slots(observed.lengths)
    return settle(plan, _begin(plan, observed)[1])


def _begin(plan: Plan, observed: Observed) -> tuple[list[Any], Division]:
    division, slots, begun = start_division(plan, observed.lengths), plan.slots(observed.lengths), []
    for i, layer in enumerate(observed.config.full_layers):
        spec = layer_spec(observed.config, layer)
        layer, weight = begin_layer(plan.policy, spec, plan.length, plan.places[i], observed.layers[layer], slots[i])
        begun, division = [*begun, layer], division.see(weight)
    return begun, division


def start_division(plan: Plan, lengths: jax.Array) -> Division:
    """Before any layer is seen."""
    if isinstance(lengths, Tracer):
        raise PolicyError(
            f"{plan.policy}: budgets depend on the data, so shapes are known only between compiled stages. Call it "
            "outside `jit`; or `decide` a plan outside and use `compress_decided` inside."
        )
    return Division(plan.policy, known(lengths), len(plan.places))


def settle(plan: Plan, division: Division) -> tuple[Plan, np.ndarray]:
    """The plan with the capacities of a division that has seen all layers, and the tokens that every row keeps."""
    places = tuple(
        dataclasses.replace(
            place, capacities=(*place.capacities[:-1], mesh.even(division.capacity(i), 1)), bound=division.bound(i)
        )
        for i, place in enumerate(plan.places)
    )
    slots = np.array(plan.slots(jnp.asarray(division.lengths)))
    slots[:, -1] = division.slots
    return dataclasses.replace(plan, places=places, decided=True), slots


def finish(plan: Plan, division: Division, begun: Any, config: Config, layers: Any, lengths: jax.Array) -> Cache:
    """The cache of layers that were begun.

    Args:
      begun: (Prompt, Observation) of every full-attention layer, scored.
      layers: Every layer's state; those of full-attention layers are replaced.
    """
    settled, slots = settle(plan, division)
    layers = list(layers)
    for i, layer in enumerate(config.full_layers):
        spec = layer_spec(config, layer)
        layers[layer] = finish_layer(plan.policy, spec, settled.places[i], begun[i], slots[i, -1])
    return assemble(plan.policy, config, layers, lengths)


@functools.partial(jax.jit, static_argnames="plan")
def compress_decided(plan: Plan, slots: jax.Array | np.ndarray, observed: Observed) -> Cache:
    """`compress` with what `decide` says: runs under `jit` whatever the policy."""
    config = observed.config
    layers = list(observed.layers)
    for i, layer in enumerate(config.full_layers):
        spec, place = layer_spec(config, layer), plan.places[i]
        layers[layer] = compress_layer(plan.policy, spec, plan.length, place, layers[layer], slots[i])
    return assemble(plan.policy, config, layers, observed.lengths)


def _worst(plan: Plan) -> Plan:
    """For plans that are not decided yet: as if rounding cost every layer what it can cost at most."""
    if plan.decided:
        return plan

    def grown(slots: int) -> int:
        return min(slots + slots // 8 + 1, plan.length)

    places = tuple(
        dataclasses.replace(place, capacities=(*place.capacities[:-1], grown(place.capacities[-1])))
        for place in plan.places
    )
    return dataclasses.replace(plan, places=places)


def abstract_cache(plan: Plan, config: Config, batch: int, dtype: Any) -> Cache:
    """The cache that a plan leads to, as shapes without data: what would it cost?"""
    needs, length, dim, policy = plan.policy.needs, plan.length, config.key_dim, plan.policy

    def seen(layer: int) -> Any:
        spec, pos = layer_spec(config, layer), jnp.zeros((batch, length), jnp.int32)
        q = jnp.zeros((batch, config.num_heads, length, dim), dtype)
        k = jnp.zeros((batch, config.cache_heads, length, dim), dtype)
        v = k[..., -config.value_dim :]
        if config.layer_types[layer] == "sliding":
            return make_ring(k, v, pos, config.sliding_window, latent=spec.latent)
        new = Tokens(q=q, k=k, v=v, q_raw=q, k_raw=k, pos=pos)
        # Attention itself changes no shape, and takes long to trace.
        sums = jnp.zeros(q.shape[:3]) if needs.column_sums or needs.column_spread else None
        prompt, obs = statistics(new, dataclasses.replace(needs, tokenwise=()), jnp.int32(0), sums)
        # These need trained parameters, which a plan has none of; their shape is known without.
        numbers = {number.name: jnp.zeros(k.shape[:3]) for number in needs.tokenwise}
        observed = (dataclasses.replace(prompt, tokenwise=numbers), obs)
        slots = jnp.zeros((len(policy.stages), batch), jnp.int32)
        return compress_layer(policy, spec, length, places[layer], observed, slots)

    places: dict[int, Place] = dict(zip(config.full_layers, plan.places, strict=True))
    kinds = [(layer_spec(config, layer), places.get(layer)) for layer in range(config.num_layers)]
    shapes = {kind: jax.eval_shape(functools.partial(seen, kinds.index(kind))) for kind in set(kinds)}
    lengths = jax.ShapeDtypeStruct((batch,), jnp.int32)
    return jax.eval_shape(functools.partial(assemble, policy, config), [shapes[kind] for kind in kinds], lengths)
