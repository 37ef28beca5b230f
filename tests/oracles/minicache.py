"""MiniCache (arXiv 2405.14366, section 4): adjacent layers share one direction per token and keep their magnitudes.

A vector is its norm times a direction. The directions that a token's vectors have in layers l and l + 1 are replaced by
one, on the great circle between them (equation 3); each layer keeps its norms (equation 2). Tokens whose directions lie
furthest apart are retained: both layers keep them as they are. Keys and values are treated alike and apart.

Rotary embedding turns a token's keys of both layers by the same angles, so rotated keys merge as unrotated ones do.

The authors have published no code. `gamma` of the paper is a share of the range of angles: the retained are those less
than that share below the largest. (The paper's inequality `d < d_min + gamma (d_max - d_min)` says so if d is a
likeness. xKV takes it for the angle, merges the unlike and retains the alike; its mask is `distinct(angles, 1 - gamma)`
here. It also leaves the merge of parallel vectors unnormalised.)
"""

from typing import NamedTuple

import numpy as np

from tests.oracles.attention import attention


class Merged(NamedTuple):
    """A pair of layers' vectors [Hk, T, D]: unit directions, norms [2, Hk, T], which tokens are retained [Hk, T]."""

    direction: np.ndarray
    norms: np.ndarray
    retained: np.ndarray


def polar(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """x [..., D] -> norm [...], direction [..., D]; the direction of a zero vector is zero."""
    x = np.asarray(x, np.float64)
    norm = np.sqrt((x * x).sum(axis=-1))
    return norm, x / np.where(norm > 0, norm, 1.0)[..., None]


def angles(lower: np.ndarray, upper: np.ndarray) -> np.ndarray:
    """Angle between two directions [..., D] in radians [...]; exact for small ones too, unlike the arc cosine."""
    apart, together = np.linalg.norm(lower - upper, axis=-1), np.linalg.norm(lower + upper, axis=-1)
    return 2 * np.arctan2(apart, together)


def slerp(lower: np.ndarray, upper: np.ndarray, t: float) -> np.ndarray:
    """Directions [..., D] at the share t of the way from `lower` to `upper`; parallel ones stay as they are."""
    angle = angles(lower, upper)[..., None]
    out = np.empty_like(lower)
    for i in np.ndindex(angle.shape[:-1]):
        sine = np.sin(angle[i])
        if sine < 1e-9:
            out[i] = lower[i]
        else:
            out[i] = (np.sin((1 - t) * angle[i]) * lower[i] + np.sin(t * angle[i]) * upper[i]) / sine
    return out


def distinct(angle: np.ndarray, gamma: float) -> np.ndarray:
    """Which tokens are retained: angles within `gamma` of the range of the largest, over all heads. [Hk, T] bool."""
    return angle > angle.max() - gamma * (angle.max() - angle.min())


def merge(lower: np.ndarray, upper: np.ndarray, *, t: float = 0.6, gamma: float = 0.05) -> Merged:
    """Merges lower and upper [Hk, T, D], the keys (or the values) of layers l and l + 1."""
    (norm, direction), (upper_norm, upper_direction) = polar(lower), polar(upper)
    retained = distinct(angles(direction, upper_direction), gamma)
    return Merged(slerp(direction, upper_direction, t), np.stack([norm, upper_norm]), retained)


def restore(merged: Merged, lower: np.ndarray, upper: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What each of the layers reads: rescaled directions, and the retained tokens of `lower` and `upper` themselves."""
    pair = []
    for norm, own in zip(merged.norms, (lower, upper), strict=True):
        pair.append(np.where(merged.retained[..., None], own, norm[..., None] * merged.direction))
    return pair[0], pair[1]


def minicache_decode(
    lower: tuple[np.ndarray, np.ndarray, np.ndarray],
    upper: tuple[np.ndarray, np.ndarray, np.ndarray],
    *,
    prompt: int,
    t: float = 0.6,
    gamma: float = 0.05,
    **options,
) -> tuple[np.ndarray, np.ndarray]:
    """Attention outputs [H, T - prompt, D] of both layers for tokens prompt..T-1, decoded one by one.

    A new token attends with its own key and value; then it is merged too. Only tokens of the prompt are retained.

    Args:
      lower, upper: q [H, T, D], k and v [Hk, T, D] of layers l and l + 1.
      options: scale, softcap.
    """
    length = lower[0].shape[1]
    read = []  # [keys, values][layer]: of all tokens, as they are read once they are stored.
    for which in (1, 2):
        a, b = np.asarray(lower[which], np.float64), np.asarray(upper[which], np.float64)
        old = restore(merge(a[:, :prompt], b[:, :prompt], t=t, gamma=gamma), a[:, :prompt], b[:, :prompt])
        (norm, direction), (upper_norm, upper_direction) = polar(a[:, prompt:]), polar(b[:, prompt:])
        shared = slerp(direction, upper_direction, t)
        new = norm[..., None] * shared, upper_norm[..., None] * shared
        read.append([np.concatenate([x, y], axis=1) for x, y in zip(old, new, strict=True)])
    outputs = []
    for layer, (q, k, v) in enumerate((lower, upper)):
        steps = []
        for token in range(prompt, length):
            keys = np.concatenate([read[0][layer][:, :token], k[:, token : token + 1]], axis=1)
            values = np.concatenate([read[1][layer][:, :token], v[:, token : token + 1]], axis=1)
            steps.append(attention(q[:, token : token + 1], keys, values, **options)[:, 0])
        outputs.append(np.stack(steps, axis=1))
    return outputs[0], outputs[1]
