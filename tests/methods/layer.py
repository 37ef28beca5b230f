"""One layer under a policy, fed with queries, keys and values that a test knows: what the oracles are compared with."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import kvjax
from kvjax.cache import EMPTY, LayerSpec, Tokens
from kvjax.models.config import Rope
from kvjax.models.transformer import rotate
from kvjax.policies import attend_with
from kvjax.policies.observe import observe
from kvjax.policies.policy import Place, make_layer

HEADS, KV_HEADS = 4, 2


def spec(dim: int, *, scale: float | None = None, softcap: float = 0.0) -> LayerSpec:
    scale = dim**-0.5 if scale is None else scale
    return LayerSpec(scale=scale, softcap=softcap, rope=Rope(theta=1e4, rotary_dim=dim), rotate=rotate)


def tokens(rows, start: int, stop, *, width: int | None = None, q_raw=None, k_raw=None) -> Tokens:
    """Tokens start..stop[row] of each row's (q [H, T, D], k, v [Hk, T, D]), padded with large numbers to one width."""
    stop = [stop] * len(rows) if isinstance(stop, int) else stop
    width = max(stop) - start if width is None else width

    def stack(which, source=None):
        out = []
        for i, end in enumerate(stop):
            x = np.asarray((source or [row[which] for row in rows])[i][:, start:end], np.float32)
            out.append(np.pad(x, ((0, 0), (0, width - x.shape[1]), (0, 0)), constant_values=50.0))
        return jnp.asarray(np.stack(out))

    pos = np.stack(
        [np.where(np.arange(start, start + width) < end, np.arange(start, start + width), EMPTY) for end in stop]
    )
    q, k, v = stack(0), stack(1), stack(2)
    q_raw = q if q_raw is None else stack(0, q_raw)
    k_raw = k if k_raw is None else stack(1, k_raw)
    return Tokens(q=q, k=k, v=v, q_raw=q_raw, k_raw=k_raw, pos=jnp.asarray(pos, jnp.int32))


@functools.partial(jax.jit, static_argnames=("policy", "spec", "place"))
def _compress(policy, spec, new, layer, slots, place):
    _, prompt, obs = observe(spec, new, policy.needs, layer)
    return make_layer(policy, spec, prompt, obs, slots, place)


def compress(policy: kvjax.Policy, spec: LayerSpec, new: Tokens, *, layer: int = 0, layers: int = 1) -> Any:
    """The cache of one of `layers` compressed layers."""
    lengths = np.asarray((new.pos != EMPTY).sum(-1))
    slots = np.stack([np.asarray(stage.slots(lengths, layers))[layer] for stage in policy.stages] or [lengths])
    capacities = tuple(int(row.max()) for row in slots) if policy.stages else ()
    place = Place(capacities, policy.role(layer, layers))
    return _compress(policy, spec, new, jnp.int32(layer), jnp.asarray(slots, jnp.int32), place)


@functools.partial(jax.jit, static_argnames=("policy", "spec"))
def step(policy: kvjax.Policy, spec: LayerSpec, cache: Any, new: Tokens):
    """Attention output [B, H, T, D] of new tokens, and the cache after them."""
    return attend_with(policy)(spec, cache, new, None)[:2]


def kept(cache: Any, row: int, heads: int = KV_HEADS) -> np.ndarray:
    """Positions [heads, n] that a row holds, ascending."""
    pos = np.broadcast_to(np.asarray(cache.pos)[row], (heads, cache.pos.shape[-1]))
    return np.stack([np.sort(head[head != EMPTY]) for head in pos])
