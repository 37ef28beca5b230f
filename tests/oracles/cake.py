"""CAKE (arXiv 2503.12491, sections 4.1-4.3): layers share one budget by preference; mean and variance choose tokens.

The last `window` queries look at the tokens before them (prefix part of a softmax over prefix and window). Spatial
dispersion H = -sum a log(a + 1e-10) and temporal shift V = sum over keys of the variance over queries make a layer's
preference P = H^(1/tau1) V^(1/tau2); the cache without windows is shared in proportion to P. A token's score is the
mean plus gamma times the variance of the attention it gets, pooled over neighbours, averaged over the query group.
Variances are unbiased (n - 1), everything is summed and never divided by the length, as in the authors' code.
"""

import numpy as np

from tests.oracles.attention import attention_weights, group_mean
from tests.oracles.snapkv import pool


def window_attention(q: np.ndarray, k: np.ndarray, window: int, **options) -> np.ndarray:
    """What the last `window` queries see of the tokens before them: [H, window, T - window]."""
    return attention_weights(q[:, -window:], k, **options)[:, :, : k.shape[1] - window]


def cake_statistics(q: np.ndarray, k: np.ndarray, *, window: int = 32, **options) -> tuple[float, float]:
    """Dispersion and shift (H, V) of one layer, summed over heads; the authors also sum over the batch.

    Args:
      q: [H, Tq, D], k: [Hk, T, D], rotated; options of `attention_weights`.
    """
    weights = window_attention(q, k, window, **options)
    entropy = 0.0
    shift = 0.0
    for head in weights:
        entropy -= float((head * np.log(head + 1e-10)).sum())
        for column in head.T:
            shift += float(((column - column.mean()) ** 2).sum() / (window - 1))
    return entropy, shift


def cake_preference(entropy: float, shift: float, *, tau1: float = 1.0, tau2: float = 1.0) -> float:
    return entropy ** (1 / tau1) * shift ** (1 / tau2)


def cake_scores(
    q: np.ndarray, k: np.ndarray, *, window: int = 32, gamma: float = 200.0, width: int = 5, **options
) -> np.ndarray:
    """Scores of the tokens before the window, [Hk, T - window]."""
    weights = window_attention(q, k, window, **options)
    return group_mean(pool(weights.mean(axis=1) + gamma * weights.var(axis=1, ddof=1), width, "avg"), len(k))


def deal(budgets: list[int], amount: int, layers: list[int]) -> None:
    """Adds `amount` in equal parts to the given layers, in place; what does not divide goes to the first of them."""
    sign = 1 if amount > 0 else -1
    for order, layer in enumerate(layers):
        budgets[layer] += sign * (abs(amount) // len(layers) + (order < abs(amount) % len(layers)))


def settle(shares: list[float], total: int, most: int) -> list[int]:
    """Whole budgets from shares of `total` (`adjust_budgets`).

    Shares are cut to whole numbers and to `most`. What was cut off at `most` is dealt once, equally, to the layers that
    are below it; then what is missing of `total`, too (what is too much is taken from layers with more than one).
    Either may lift a layer above `most`: the caller cuts it again and the total is not met.
    """
    whole = [int(share) for share in shares]
    budgets = [min(budget, most) for budget in whole]
    below = [layer for layer, budget in enumerate(budgets) if budget < most]
    deal(budgets, sum(whole) - sum(budgets), below)
    missing = total - sum(budgets)
    deal(budgets, missing, [i for i, budget in enumerate(budgets) if (budget < most if missing > 0 else budget > 1)])
    return budgets


def cake_budgets(preferences: list[float], total: int, most: int) -> list[int]:
    """Tokens before the window of every layer: shares of `total` in proportion to the preferences, at most `most`."""
    return settle([preference / sum(preferences) * total for preference in preferences], total, most)


def best_first(scores: np.ndarray, budget: int) -> np.ndarray:
    """Slots of the `budget` highest scores, highest first; of equal ones the earlier: [Hk, min(budget, T)]."""
    return np.argsort(-scores, axis=-1, kind="stable")[:, :budget]


def cake_prefill(
    layers: list[tuple[np.ndarray, np.ndarray]],
    *,
    size: int,
    window: int = 32,
    tau1: float = 1.0,
    tau2: float = 1.0,
    gamma: float = 200.0,
    width: int = 5,
    preferences: list[float] | None = None,
    **options,
) -> tuple[list[list[int]], list[np.ndarray]]:
    """The cascade over the layers of one sequence: after each layer all layers seen so far share the whole cache.

    Args:
      layers: (q [H, T, D], k [Hk, T, D]) of every layer.
      size: Mean slots per layer, windows included; a prompt of at most size + window tokens stays as it is.
      preferences: Instead of those of this sequence (the authors' are of the whole batch).

    Returns:
      Budgets without windows after each layer, and the kept positions [Hk, budget + window] of every layer: highest
      score first, then the window in order.
    """
    history: list[list[int]] = []
    kept: list[np.ndarray] = []
    scores: list[np.ndarray] = []
    seen: list[float] = []
    for layer, (q, k) in enumerate(layers):
        length = k.shape[1]
        scores.append(cake_scores(q, k, window=window, gamma=gamma, width=width, **options))
        kept.append(np.tile(np.arange(length), (len(k), 1)))
        if length <= size + window:
            continue
        own = cake_preference(*cake_statistics(q, k, window=window, **options), tau1=tau1, tau2=tau2)
        seen.append(own if preferences is None else preferences[layer])
        budgets = cake_budgets(seen, (size - window) * len(layers), length - window)
        for i, budget in enumerate(budgets):
            order = best_first(scores[i], budget)  # Of what is left: an earlier layer cannot grow again.
            scores[i] = np.take_along_axis(scores[i], order, axis=1)
            before, tail = kept[i][:, :-window], kept[i][:, -window:]
            kept[i] = np.concatenate([np.take_along_axis(before, order, axis=1), tail], axis=1)
            budgets[i] = min(budget, length - window)
        history.append(budgets)
    return history, kept


def cake_decode(
    q: np.ndarray,
    k: np.ndarray,
    kept: np.ndarray,
    *,
    prompt: int,
    window: int = 32,
    width: int = 5,
    by_position: bool = False,
    **options,
) -> list[np.ndarray]:
    """One layer while decoding: at every step the token before the window that the new query heeds least leaves.

    Attention is pooled over neighbours in the order in which the cache lies. The authors' lies by falling score, so
    their neighbours have nothing to do with each other in the text; `by_position` pools over the text's order.

    Args:
      q: [H, T, D], k: [Hk, T, D] with the decoded tokens from `prompt` on.
      kept: [Hk, n], what the prompt has left, in the order of `cake_prefill`.

    Returns:
      After each step, positions [Hk, n].
    """
    budget = kept.shape[1] - window
    steps = []
    for t in range(prompt, q.shape[1]):
        kept = np.concatenate([kept, np.full((len(kept), 1), t)], axis=1)
        if by_position:
            kept = np.sort(kept, axis=1)
        keys = np.stack([k[h][kept[h]] for h in range(len(k))])
        weights = attention_weights(q[:, t : t + 1], keys, k_positions=kept, q_positions=np.array([t]), **options)
        heeded = group_mean(pool(weights[:, 0, :-window], width, "avg"), len(k))
        order = best_first(heeded, budget)
        before, tail = kept[:, :-window], kept[:, -window:]
        kept = np.concatenate([np.take_along_axis(before, order, axis=1), tail], axis=1)
        steps.append(kept)
    return steps
