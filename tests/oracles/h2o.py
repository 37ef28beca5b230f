"""H2O (arXiv 2306.14048, section 4, algorithm 1): accumulated attention; heavy hitters + recent tokens.

Score of a key = its attention column summed over every query that saw it, per head; with grouped queries (the paper
has none) summed over the query heads of the KV head. Sums are never divided by the number of queries: early tokens
collect more, as in the paper. The prompt is attended to densely, then evicted once; in decoding the new query attends
to the cache and itself (budget + 1 tokens), its weights are added to the scores, then one token goes. Dropped tokens
never return.
"""

from typing import NamedTuple

import numpy as np

from tests.oracles.attention import attention, attention_weights, gather, group_sum
from tests.oracles.top_k import top_k


class Steps(NamedTuple):
    """What is left after the prompt (entry 0) and after every decoded token.

    Attributes:
      kept: Per entry, token positions [Hk, n], ascending.
      scores: Per entry, accumulated scores of the kept tokens, [Hk, n].
      outputs: [H, steps, D], attention outputs of the decoded tokens.
    """

    kept: list[np.ndarray]
    scores: list[np.ndarray]
    outputs: np.ndarray


def h2o_scores(q: np.ndarray, k: np.ndarray, **options) -> np.ndarray:
    """Column sums over all queries and the query group.

    Args:
      q: [H, T, D], k: [Hk, T, D], rotated; options of `attention_weights` (scale, softcap, window).

    Returns:
      [Hk, T]. Each KV head's row sums to T * H / Hk.
    """
    return group_sum(attention_weights(q, k, **options).sum(axis=1), len(k))


def h2o_kept(scores: np.ndarray, *, heavy: int, recent: int) -> np.ndarray:
    """Last `recent` tokens and the `heavy` best earlier ones: [Hk, heavy + recent] ascending, or all if they fit."""
    kv_heads, length = scores.shape
    if length <= heavy + recent:
        return np.tile(np.arange(length), (kv_heads, 1))
    hitters = top_k(scores[:, : length - recent], heavy)
    return np.concatenate([hitters, np.tile(np.arange(length - recent, length), (kv_heads, 1))], axis=1)


def h2o_decode(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, *, prompt: int, heavy: int, recent: int, **options
) -> Steps:
    """Prompt, then one token at a time with the budget fixed; tokens keep their original rotation.

    Hk = H is the paper's per-head form.

    Args:
      q: [H, T, D], k, v: [Hk, T, D]; the first `prompt` tokens are the prompt. Options: scale, softcap.
    """
    kv_heads = len(k)
    scores = h2o_scores(q[:, :prompt], k[:, :prompt], **options)
    slots = h2o_kept(scores, heavy=heavy, recent=recent)
    kept, scores = slots, np.take_along_axis(scores, slots, axis=1)
    steps = Steps([kept], [scores], np.zeros((len(q), q.shape[1] - prompt, q.shape[2])))
    for t in range(prompt, q.shape[1]):
        kept = np.concatenate([kept, np.full((kv_heads, 1), t)], axis=1)
        query, keys, values = q[:, t : t + 1], gather(k, kept), gather(v, kept)
        steps.outputs[:, t - prompt] = attention(query, keys, values, **options)[:, 0]
        seen = group_sum(attention_weights(query, keys, **options)[:, 0], kv_heads)
        scores = np.concatenate([scores, np.zeros((kv_heads, 1))], axis=1) + seen
        slots = h2o_kept(scores, heavy=heavy, recent=recent)
        kept, scores = np.take_along_axis(kept, slots, axis=1), np.take_along_axis(scores, slots, axis=1)
        steps.kept.append(kept)
        steps.scores.append(scores)
    return steps


def h2o_sim(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, *, prompt: int, heavy: int, recent: int
) -> tuple[list[np.ndarray], list[np.ndarray], list[np.ndarray]]:
    """The authors' mask simulation (`LlamaAttention_heavy_hitter`), for the record: kvjax does not do this.

    It differs from `h2o_decode` in three ways. The mask for the next step has one column more than the scores, yet the
    recent budget is counted from its end: column n - recent is neither recent nor a candidate, so every token that
    leaves the recent window is masked for one step (the next query sees heavy + recent - 1 old tokens and itself), and
    may be picked as a heavy hitter one step later. Scores of dropped tokens are set to zero, not removed, so a dropped
    token can come back when fewer than `heavy` candidates have a positive score. Nothing is freed.

    Args:
      q, k, v: [H, T, D], one KV head per query head.

    Returns:
      After the prompt and after each decoded token: scores [H, n] (zeroed), mask of the next step [H, n + 1], output of
      the last query [H, D].
    """
    heads, length, _ = q.shape
    all_scores, masks, outputs = [], [], []
    scores = np.zeros((heads, 0))
    mask = np.ones((heads, prompt), bool)
    for n in range(prompt, length + 1):
        queries = q[:, :n] if n == prompt else q[:, n - 1 : n]
        weights, output = np.zeros((heads, n)), np.zeros((heads, q.shape[2]))
        for h in range(heads):
            seen = np.flatnonzero(mask[h])
            one = slice(h, h + 1)
            weights[h, seen] = attention_weights(queries[one], k[one, seen])[0].sum(axis=0)
            output[h] = attention(queries[one, -1:], k[one, seen], v[one, seen])[0, 0]
        scores = np.concatenate([scores, np.zeros((heads, n - scores.shape[1]))], axis=1) + weights
        mask = np.ones((heads, n + 1), bool)
        if n > heavy + recent:
            mask[:, : n + 1 - recent] = False
            for h, hitters in enumerate(top_k(scores[:, : n - recent], heavy)):
                mask[h, hitters] = True
        alive = mask[:, :n].copy()
        alive[:, n - recent :] = True
        scores = np.where(alive, scores, 0.0)
        all_scores.append(scores)
        masks.append(mask)
        outputs.append(output)
    return all_scores, masks, outputs
