"""What heads look at while a needle is copied: attention sinks, retrieval heads, and what is near.

The answer is fed as it should be written, and every query that predicts one of its tokens is looked at. A head's
retrieval score is the share of these tokens for which its most attended position holds the very token in the needle
that is copied next (Wu et al., "Retrieval Head Mechanistically Explains Long-Context Factuality", arXiv 2404.15574,
section 2); its sink is the attention that goes to the first tokens (Xiao et al., arXiv 2309.17453).
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from kvjax.cache import EMPTY, LayerSpec
from kvjax.generation import observe
from kvjax.model import Model
from kvjax.models.transformer import layer_spec
from kvjax.policies import Needs

SINKS = 4  # First tokens that count as the sink, as in StreamingLLM.
LOCAL = 64  # Last tokens that count as near.


@dataclasses.dataclass(frozen=True)
class HeadMaps:
    """Of every query head of the full-attention layers, in the order of `layers`.

    Attributes:
      layers: Their indices.
      sink: Attention mass on the first `SINKS` tokens, a mean over the answer's tokens [layers, heads].
      local: Mass on the last `LOCAL` tokens [layers, heads].
      retrieval: Retrieval score, 0 to 1 [layers, heads].
      tokens: How many predictions were looked at.
    """

    layers: tuple[int, ...]
    sink: np.ndarray
    local: np.ndarray
    retrieval: np.ndarray
    tokens: int


def head_maps(model: Model, prompts: Sequence[tuple[Sequence[int], Sequence[int]]]) -> HeadMaps:
    """Means over prompts, each token ids and the answer that stands in them word for word.

    Raises:
      ValueError: There are no prompts, or an answer's tokens are not in its prompt.
    """
    if not prompts:
        raise ValueError("Heads are looked at while they answer: give at least one prompt with its answer.")
    found = [_one(model, list(prompt), list(answer)) for prompt, answer in prompts]
    number = np.array([len(answer) for _, answer in prompts], np.float64)
    sink, local, retrieval = (np.tensordot(number / number.sum(), np.stack(x), 1) for x in zip(*found, strict=True))
    return HeadMaps(model.config.full_layers, sink, local, retrieval, int(number.sum()))


def where(prompt: Sequence[int], answer: Sequence[int]) -> int:
    """The last place at which the answer's tokens stand in the prompt; -1 where they do not."""
    length = len(answer)
    starts = range(len(prompt) - length, -1, -1)
    return next((i for i in starts if list(prompt[i : i + length]) == list(answer)), -1)


def _one(model: Model, prompt: list[int], answer: list[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    start = where(prompt, answer)
    if start < 0:
        raise ValueError("The answer's tokens do not stand in the prompt: there is nothing that a head could copy.")
    tokens, lengths = model.encode(prompt + answer[:-1])
    seen = observe(model.params, model.config, tokens, lengths, Needs(window=len(answer)))
    wanted = jnp.arange(start, start + len(answer), dtype=jnp.int32)
    maps = []
    for layer in model.config.full_layers:
        keys, queries = seen.layers[layer]
        spec = layer_spec(model.config, layer)
        maps.append(_looks(queries.q[0], queries.q_pos[0], keys.k[0], keys.pos[0, 0], wanted, spec=spec))
    sink, local, retrieval = (np.stack([np.asarray(x) for x in kind]) for kind in zip(*maps, strict=True))
    return sink, local, retrieval


@functools.partial(jax.jit, static_argnames="spec")
def _looks(
    q: Array, q_pos: Array, k: Array, k_pos: Array, wanted: Array, *, spec: LayerSpec
) -> tuple[Array, Array, Array]:
    """Of one layer: q [heads, A, D] at q_pos [A], k [H, S, D] at k_pos [S], wanted positions [A] -> three [heads]."""
    grouped = q.astype(jnp.float32).reshape(k.shape[0], -1, *q.shape[1:]) * spec.scale
    logits = jnp.einsum("hgad,hsd->hgas", grouped, k.astype(jnp.float32)).reshape(q.shape[0], q.shape[1], -1)
    if spec.softcap:
        logits = spec.softcap * jnp.tanh(logits / spec.softcap)
    seen = (k_pos != EMPTY) & (k_pos <= q_pos[:, None])
    weights = jax.nn.softmax(jnp.where(seen, logits, -jnp.inf), -1)
    sink = (weights * (k_pos < SINKS)).sum(-1).mean(-1)
    local = (weights * (q_pos[:, None] - k_pos < LOCAL)).sum(-1).mean(-1)
    retrieval = (k_pos[jnp.argmax(weights, -1)] == wanted).mean(-1)
    return sink, local, retrieval
