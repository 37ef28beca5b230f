"""ThinK (arXiv 2407.21018, section 3.2, equation 4): key channels that the last queries barely use are dropped.

The product of queries and keys is a sum over channels, so the best channels to drop are those with the smallest
||q_c k_c^T||_F = ||q_c|| ||k_c||, q_c [window] being channel c of the last queries and k_c [T] of the kept keys. Scores
here are the squares of that over window * T, as in the authors' code: the same order. All tokens but the most recent
`recent` lose the floor(ratio * D) channels with the smallest scores; tokens that come later keep all of theirs.

With grouped queries the authors repeat keys and choose for every query head (`per_query_head=True`); kvpress and kvjax
average the queries' part over the group. Values (the paper's extension, not in the authors' code): the outputs of the
last queries are a sum over channels too, so channel c scores ||softmax(q K^T) v_c||_F.
"""

import numpy as np

from tests.oracles.attention import attention, attention_weights, gather, group_mean


def channel_scores(q: np.ndarray, k: np.ndarray, *, window: int = 32, per_query_head: bool = False) -> np.ndarray:
    """Scores of key channels.

    Args:
      q: [H, T, D], of which the last `window` are used; k: [Hk, n, D], the keys that are kept.
      per_query_head: Score the channels of every query head.

    Returns:
      [Hk, D], or [H, D] with `per_query_head`.
    """
    queries = (np.asarray(q, np.float64)[:, -window:] ** 2).mean(axis=1)
    keys = (np.asarray(k, np.float64) ** 2).mean(axis=1)
    if per_query_head:
        return queries * np.repeat(keys, len(q) // len(k), axis=0)
    return group_mean(queries, len(k)) * keys


def value_scores(q: np.ndarray, k: np.ndarray, v: np.ndarray, *, window: int = 32, **options) -> np.ndarray:
    """Scores [Hk, D] of value channels: mean square, over the last queries of the group, of their outputs.

    Args:
      q: [H, T, D]; k, v: [Hk, n, D], the tokens that are kept. Options of `attention_weights`; `k_positions` [Hk, n]
        and `q_positions` where the kept tokens are not 0..T-1.
    """
    weights = attention_weights(q[:, -window:], k, **options)
    group = len(q) // len(k)
    squares = np.stack([((weights[h] @ v[h // group]) ** 2).mean(axis=0) for h in range(len(q))])
    return group_mean(squares, len(k))


def kept_channels(scores: np.ndarray, ratio: float) -> np.ndarray:
    """True for the channels that stay, [Hk, D]: all but the int(ratio * D) lowest. Of equal ones the earlier stays."""
    mask = np.zeros(scores.shape, bool)
    dim = scores.shape[-1]
    for head, row in enumerate(scores):
        mask[head, np.argsort(-row, kind="stable")[: dim - int(dim * ratio)]] = True
    return mask


def think_keys(k: np.ndarray, mask: np.ndarray, recent: int) -> np.ndarray:
    """Keys [Hk, n, D] in order of position, as attention sees them: dropped channels are zero but for the newest."""
    keys = np.array(k, np.float64)
    old = max(keys.shape[1] - recent, 0)
    keys[:, :old] *= mask[:, None]
    return keys


def think_decode(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    kept: np.ndarray,
    *,
    prompt: int,
    ratio: float = 0.4,
    value_ratio: float = 0.0,
    recent: int = 32,
    window: int = 32,
    **options,
) -> np.ndarray:
    """Attention outputs [H, T - prompt, D] of tokens prompt..T-1: channels are dropped once, at the end of the prompt.

    Args:
      q: [H, T, D], k, v: [Hk, T, D], rotated.
      kept: [Hk, n] ascending positions of the prompt's tokens that another policy has kept (all of them: no eviction).
      options: scale, softcap.
    """
    keys, values = gather(k[:, :prompt], kept), gather(v[:, :prompt], kept)
    key_mask = kept_channels(channel_scores(q[:, :prompt], keys, window=window), ratio)
    last = np.arange(max(prompt - window, 0), prompt)
    scores = value_scores(q[:, :prompt], keys, values, window=window, q_positions=last, k_positions=kept, **options)
    value_mask = kept_channels(scores, value_ratio)
    keys, values = think_keys(keys, key_mask, recent), think_keys(values, value_mask, recent)
    outputs = []
    for t in range(prompt, q.shape[1]):
        keys, values = (
            np.concatenate([x, y[:, t : t + 1]], axis=1) for x, y in ((keys, np.asarray(k)), (values, np.asarray(v)))
        )
        outputs.append(attention(q[:, t : t + 1], keys, values, **options)[:, 0])
    return np.stack(outputs, axis=1)
