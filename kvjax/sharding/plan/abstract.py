"""A model and its cache on a mesh, as shapes and places without a single array: what is where, and how many bytes."""

import dataclasses
import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from kvjax.generation.extend import ROOM
from kvjax.kernels.mesh import DATA
from kvjax.models.config import Config
from kvjax.models.params import abstract_params
from kvjax.models.transformer import layer_spec
from kvjax.policies.plan import Plan, abstract_cache, plan
from kvjax.policies.policy import Policy
from kvjax.sharding.mesh import AXES, parse_mesh
from kvjax.sharding.rules import cache_shardings, param_shardings


@dataclasses.dataclass(frozen=True)
class Program:
    """What a decode step is given.

    Attributes:
      config: The model.
      mesh: Where everything lies.
      params, cache: Pytrees of `jax.ShapeDtypeStruct` with shardings.
      tokens: The new ones [B, 1] int32, likewise.
      planned: Slots of every layer.
      held: Tokens that every layer holds of the prompt.
      kinds: Of every layer: what distinguishes its program from other layers', its number of slots apart.
    """

    config: Config
    mesh: Mesh | AbstractMesh
    params: Any
    cache: Any
    tokens: Any
    planned: Plan
    held: tuple[int, ...]
    kinds: tuple[Any, ...]

    @property
    def batch(self) -> int:
        return self.tokens.shape[0]

    def first(self, layers: int) -> "Program":
        """The same with the first so many layers alone."""
        config = dataclasses.replace(self.config, layer_types=self.config.layer_types[:layers])
        return dataclasses.replace(
            self,
            config=config,
            params={**self.params, "layers": self.params["layers"][:layers]},
            cache=dataclasses.replace(self.cache, layers=self.cache.layers[:layers], config=config),
            held=self.held[:layers],
            kinds=self.kinds[:layers],
        )


def abstract_mesh(shape: str) -> AbstractMesh:
    """A mesh of devices that need not be described: "seq=32,model=8"."""
    return AbstractMesh(tuple(parse_mesh(shape).values()), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def in_use(mesh: Mesh | AbstractMesh) -> Any:
    """A context in which what is traced is for this mesh."""
    return jax.sharding.use_abstract_mesh(mesh if isinstance(mesh, AbstractMesh) else mesh.abstract_mesh)


def make_program(
    config: Config, policy: Policy, context: int, batch: int, mesh: Mesh | AbstractMesh, dtype: str = "bfloat16"
) -> Program:
    """A decode step after a prompt of `context` tokens in each of `batch` rows.

    Raises:
      PolicyError: The model or the prompt cannot be served. MeshError: The model cannot lie on this mesh.
    """
    with in_use(mesh):
        params = _params(config, dtype)
        places = param_shardings(params, config, mesh)  # type: ignore[arg-type]
        planned = plan(policy, config, context, jnp.dtype(dtype))
        cache = abstract_cache(planned, config, batch, jnp.dtype(dtype))
        # Layers grow alike: those of one shape are traced once.
        grown: dict[Any, Any] = {}
        for layer in cache.layers:
            key = (jax.tree.structure(layer), tuple((x.shape, x.dtype) for x in jax.tree.leaves(layer)))
            if key not in grown:
                grown[key] = jax.eval_shape(lambda layer: layer.reserve(ROOM), layer)
        of = lambda x: grown[jax.tree.structure(x), tuple((y.shape, y.dtype) for y in jax.tree.leaves(x))]  # noqa: E731
        cache = dataclasses.replace(cache, layers=tuple(map(of, cache.layers)), policy=policy.after_prompt)
        along = DATA if batch % mesh.shape[DATA] == 0 else None
        tokens = jax.ShapeDtypeStruct((batch, 1), jnp.int32)
        return Program(
            config=config,
            mesh=mesh,
            params=placed(params, places),
            cache=placed(cache, cache_shardings(cache, mesh)),  # type: ignore[arg-type]
            tokens=placed(tokens, NamedSharding(mesh, PartitionSpec(along))),  # type: ignore[arg-type]
            planned=planned,
            held=_held(planned, config),
            kinds=tuple((layer_spec(config, i), *_role(planned, config, i)) for i in range(config.num_layers)),
        )


@functools.lru_cache(maxsize=4)
def _params(config: Config, dtype: str) -> Any:
    """Shapes of a model's parameters; those of a deep one take seconds."""
    return abstract_params(config, jnp.dtype(dtype))


def placed(shapes: Any, shardings: Any) -> Any:
    """Shapes that know where they lie."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)


def _held(planned: Plan, config: Config) -> tuple[int, ...]:
    number = {layer: i for i, layer in enumerate(config.full_layers)}

    def of(layer: int) -> int:
        if layer not in number:
            return min(config.sliding_window, planned.length)
        capacities = planned.places[number[layer]].capacities
        return min((planned.length, *capacities))

    return tuple(map(of, range(config.num_layers)))


def _role(planned: Plan, config: Config, layer: int) -> tuple[Any, ...]:
    if config.layer_types[layer] == "sliding":
        return ()
    return (planned.places[config.full_layers.index(layer)].role,)


def device_bytes(tree: Any) -> int:
    """Bytes that one device stores of arrays that know where they lie."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def sample(kinds: tuple[Any, ...], least: int = 3) -> tuple[int, ...]:
    """How many first layers to compile, so that all are known: (a, b) where the layers in between, repeated, are all
    others; or (all of them,) where fewer would say too little.
    """
    layers = len(kinds)
    period = next(n for n in itertools.count(1) if all(kinds[i] == kinds[i - n] for i in range(n, layers)))
    first = least + (layers - least) % period
    second = first + period * -(-least // period)
    return (first, second) if second < layers else (layers,)


def extrapolate(first: float, second: float, counts: tuple[int, ...], layers: int) -> float:
    """What holds for all layers, from what holds for two numbers of them (`sample`)."""
    if len(counts) == 1:
        return first
    low, high = counts
    return first + (second - first) * (layers - low) / (high - low)
