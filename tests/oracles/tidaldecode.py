"""TidalDecode (arXiv 2410.05076, section 3, algorithm 1): a few layers look at all, the others where these looked.

The first `start` layers attend in full. Layer `start` attends in full and notes the `top` tokens with the largest
logits; the layers after it read these tokens alone, until the correction layer attends in full and notes them anew.

As in the authors' code: every query head has tokens of its own (also within a group), and later layers use those of the
head with the same number; the query's own token is one of those to choose from; nothing is forced.
"""

from collections.abc import Sequence

import numpy as np

from tests.oracles.quest import masked_attention
from tests.oracles.top_k import top_k


def top_mask(q: np.ndarray, k: np.ndarray, top: int) -> np.ndarray:
    """The `top` tokens with the largest q . k: one query q [H, D], keys k [Hk, T, D] -> [H, T] bool."""
    group = len(q) // len(k)
    logits = np.stack([np.asarray(k[h // group], np.float64) @ q[h] for h in range(len(q))])
    mask = np.zeros(logits.shape, bool)
    np.put_along_axis(mask, top_k(logits, top), True, axis=-1)
    return mask


def selects(layer: int, start: int, correction: int | None) -> bool:
    """Whether a layer notes tokens for those after it."""
    return layer in (start, correction)


def tidal_step(
    layers: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]],
    *,
    top: int,
    start: int = 2,
    correction: int | None = 9,
    **options,
) -> list[np.ndarray]:
    """One query through all layers.

    Args:
      layers: Of each layer q [H, D] and k, v [Hk, T, D], the query's own token among them.
      options: scale, softcap.

    Returns:
      Output [H, D] of every layer.
    """
    outputs, mask = [], None
    for layer, (q, k, v) in enumerate(layers):
        if selects(layer, start, correction):
            mask = top_mask(q, k, top)
        sparse = layer > start and layer != correction
        everything = np.ones((len(q), k.shape[1]), bool)
        outputs.append(masked_attention(q, k, v, mask if sparse and mask is not None else everything, **options))
    return outputs


def tidal_decode(
    layers: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]], *, prompt: int, **options
) -> list[np.ndarray]:
    """Outputs [H, T - prompt, D] of every layer for tokens prompt..T-1.

    Args:
      layers: Of each layer q [H, T, D] and k, v [Hk, T, D].
      options: As in `tidal_step`.
    """
    length = layers[0][0].shape[1]
    steps = [
        tidal_step([(q[:, t], k[:, : t + 1], v[:, : t + 1]) for q, k, v in layers], **options)
        for t in range(prompt, length)
    ]
    return [np.stack([step[layer] for step in steps], axis=1) for layer in range(len(layers))]
