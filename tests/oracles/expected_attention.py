"""Expected Attention (arXiv 2510.00636): the attention that future queries will pay, in closed form.

Future queries are taken as Gaussian with the mean and covariance of the prompt's queries before RoPE, rotated by the
mean rotation R of the next `future` positions. E[exp(s q.k)] = exp(s mu.k + s^2 k.Cov k / 2), s the logit scale.
"""

from typing import NamedTuple

import numpy as np

from tests.oracles.attention import group_mean, rope, softmax
from tests.oracles.top_k import top_k


class Statistics(NamedTuple):
    """Of the future queries: mean [H, D] and covariance [H, D, D], rotated."""

    mean: np.ndarray
    covariance: np.ndarray


def mean_rotation(dim: int, start: int, count: int, theta: float) -> np.ndarray:
    """The rotation matrices of positions start..start+count-1, averaged: [D, D], to be applied as R @ x."""
    total = np.zeros((dim, dim))
    for position in range(start, start + count):
        columns = rope(np.eye(dim)[:, None], np.array([position]), theta)[:, 0]  # row i: the rotated unit vector i
        total += columns.T
    return total / count


def query_statistics(q: np.ndarray, *, sinks: int = 4, future: int = 512, theta: float = 1e4) -> Statistics:
    """Statistics of the queries q [H, T, D] (un-rotated) without the first `sinks`; the covariance divides by N."""
    heads, length, dim = q.shape
    rotation = mean_rotation(dim, length, future, theta)
    mean, covariance = np.zeros((heads, dim)), np.zeros((heads, dim, dim))
    for h in range(heads):
        samples = np.asarray(q[h, sinks:], np.float64)
        centre = samples.mean(axis=0)
        spread = (samples - centre).T @ (samples - centre) / len(samples)
        mean[h] = rotation @ centre
        covariance[h] = rotation @ spread @ rotation.T
    return Statistics(mean, covariance)


def expected_attention_scores(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    *,
    sinks: int = 4,
    future: int = 512,
    theta: float = 1e4,
    scale: float | None = None,
    use_covariance: bool = True,
    use_vnorm: bool = True,
    epsilon: float = 0.0,
    sink_score: float | None = None,
) -> np.ndarray:
    """Expected attention, softmax over the non-sink keys, mean over the query group, times the norm of the value.

    Args:
      q: [H, T, D] before RoPE.
      k: [Hk, T, D] as cached (rotated), v: [Hk, T, D].
      sinks: First tokens, left out of the statistics and always kept.
      future: Number of future positions, T..T+future-1.
      theta: Base of the rotary frequencies.
      scale: Of the logits; 1/sqrt(D) by default.
      use_covariance, use_vnorm: Terms that can be left out.
      epsilon: Added before the value norm.
      sink_score: Score of the sinks; by default the largest other score + 1 (kvpress: largest of the batch).

    Returns:
      [Hk, T].
    """
    heads, length, dim = q.shape
    logit_scale = dim**-0.5 if scale is None else scale
    statistics = query_statistics(q, sinks=sinks, future=future, theta=theta)
    attention = np.zeros((heads, length - sinks))
    for h in range(heads):
        keys = np.asarray(k[h // (heads // len(k)), sinks:], np.float64)
        for t, key in enumerate(keys):
            attention[h, t] = logit_scale * key @ statistics.mean[h]
            if use_covariance:
                attention[h, t] += 0.5 * logit_scale**2 * key @ statistics.covariance[h] @ key
    scores = group_mean(softmax(attention), len(k))
    if use_vnorm:
        scores = (scores + epsilon) * np.sqrt((np.asarray(v[:, sinks:], np.float64) ** 2).sum(axis=-1))
    fill = scores.max(initial=0.0) + 1 if sink_score is None else sink_score
    return np.concatenate([np.full((len(k), sinks), fill), scores], axis=1)


def expected_attention_kept(scores: np.ndarray, budget: int) -> np.ndarray:
    """[Hk, min(budget, T)], ascending."""
    return top_k(scores, budget)
