"""The one function between a model and its cache: attend to what is stored and to the new tokens, then store these."""

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array

from kvjax.cache.types import LayerCache, LayerSpec, Tokens
from kvjax.kernels.attention import dot_keys, dot_values, fold, masked_softmax, unfold, visible

# (marks of the slots [B, 1 or H, S], attention weights [B, H, G, T, S + T], new tokens) -> marks [B, 1 or H, S + T].
Mark = Callable[[Array, Array, Tokens], Array]


def attend(spec: LayerSpec, layer: LayerCache, new: Tokens, mark: Mark | None = None) -> tuple[Array, LayerCache]:
    """Exact attention of T new tokens over a layer's cache and, causally, over themselves; then they are appended.

    Args:
      spec: The layer.
      layer: Its cache. Keys it has lost are not seen; a chunk of T tokens sees what T single steps would.
      new: The tokens. Rows of padding (`EMPTY` positions) attend to nothing and are not stored.
      mark: What to remember of every token for later evictions; only called if the layer keeps marks.

    Returns:
      Output [B, H * G, T, D] float32 and the layer with the new tokens.
    """
    heads, length = new.k.shape[1], new.k.shape[2]
    logits = jnp.concatenate([layer.logits(new, spec), dot_keys(fold(new.q * spec.scale, heads), new.k)], -1)
    batch, _, _, slots = logits.shape
    masks = [
        layer.sees(new.pos[:, None], k_pos, visible(new.pos[:, None], k_pos, spec.window))
        for k_pos in (layer.pos, new.pos[:, None])
    ]
    shape = (batch, heads, length)
    mask = jnp.concatenate([jnp.broadcast_to(m, (*shape, m.shape[-1])) for m in masks], -1)
    weights = masked_softmax(logits.reshape(batch, heads, -1, length, slots), mask[:, :, None], spec.softcap)
    flat, old = weights.reshape(logits.shape), slots - length
    out = layer.mix(flat[..., :old]) + dot_values(flat[..., old:], new.v)
    if layer.marks is None or mark is None:
        return unfold(out, length), layer.append(new)
    marks = mark(layer.marks, weights, new)
    layer = layer.remember(marks[..., :old])
    return unfold(out, length), layer.append(new, marks[..., old:])
