"""TOVA (arXiv 2401.06104): keep what the last query attends to, averaged over all heads of the layer.

All KV heads keep the same tokens. The authors' code may drop the newest token too; kvpress and kvjax keep it
(`keep_last`).
"""

import numpy as np

from tests.oracles.attention import attention, attention_weights
from tests.oracles.top_k import top_k


def tova_scores(
    q: np.ndarray, k: np.ndarray, *, keep_last: bool = True, last_score: float | None = None, **options
) -> np.ndarray:
    """Attention of the last query, mean over all H heads, repeated for every KV head.

    Args:
      q: [H, Tq, D] (only the last query is used), k: [Hk, T, D], rotated. Options: scale, softcap.
      keep_last: Give the last token a score above all others.
      last_score: That score; by default the largest other score + 1.

    Returns:
      [Hk, T].
    """
    mean = attention_weights(q[:, -1:], k, **options)[:, 0].mean(axis=0)
    if keep_last:
        mean[-1] = mean[:-1].max(initial=0.0) + 1 if last_score is None else last_score
    return np.tile(mean, (len(k), 1))


def tova_kept(scores: np.ndarray, budget: int) -> np.ndarray:
    """[Hk, min(budget, T)], ascending, every row the same."""
    return top_k(scores, budget)


def tova_decode(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, *, prompt: int, budget: int, keep_last: bool = True, **options
) -> tuple[list[np.ndarray], np.ndarray]:
    """Prompt, then one token at a time: attend to the cache and oneself, then drop the token with the least attention.

    Args:
      q: [H, T, D], k, v: [Hk, T, D]; the first `prompt` tokens are the prompt. Options: scale, softcap.

    Returns:
      Kept positions [n] after the prompt and after every token; outputs [H, T - prompt, D] of the decoded tokens.
    """
    kept = tova_kept(tova_scores(q[:, :prompt], k[:, :prompt], keep_last=keep_last, **options), budget)[0]
    history, outputs = [kept], []
    for t in range(prompt, q.shape[1]):
        kept = np.append(kept, t)
        query = q[:, t : t + 1]
        outputs.append(attention(query, k[:, kept], v[:, kept], **options)[:, 0])
        scores = tova_scores(query, k[:, kept], keep_last=keep_last, **options)
        kept = kept[tova_kept(scores, budget)[0]]
        history.append(kept)
    return history, np.stack(outputs, axis=1)
