"""ChunkKV (arXiv 2502.00299, algorithm 1): whole chunks of consecutive tokens are kept or dropped, alike in all heads.

Wraps any token scores. kvpress applies the chunks of batch entry 0 to the whole batch; here each sequence has its own.
"""

import numpy as np


def chunk_scores(scores: np.ndarray, chunk: int) -> np.ndarray:
    """Mean over the tokens of a chunk of the scores summed over heads.

    Args:
      scores: [Hk, T].
      chunk: Tokens per chunk; the last chunk may be shorter and is averaged over its own tokens.

    Returns:
      [ceil(T / chunk)].
    """
    per_token = np.asarray(scores, np.float64).sum(axis=0)
    return np.array([per_token[start : start + chunk].mean() for start in range(0, len(per_token), chunk)])


def chunks_for_ratio(length: int, chunk: int, ratio: float) -> int:
    """kvpress: the share 1 - ratio of all chunks, a short last one included; at least one. May exceed (1 - ratio) T."""
    return max(1, int(-(-length // chunk) * (1 - ratio)))


def chunks_for_budget(length: int, chunk: int, budget: int) -> int:
    """floor(budget / chunk) chunks, so never more than `budget` tokens; all of them if T fits."""
    if length <= budget:
        return -(-length // chunk)
    if budget < chunk:
        raise ValueError(f"a budget of {budget} tokens holds no chunk of {chunk}")
    return budget // chunk


def chunkkv_kept(scores: np.ndarray, *, chunk: int, chunks: int) -> np.ndarray:
    """Tokens of the `chunks` best chunks: [Hk, n] ascending, every row the same.

    Chunks that lie wholly in a protected window tie; of chunks equal to 12 digits the later one wins, so that the
    newest tokens stay. (kvpress leaves the choice to float32 rounding.)
    """
    kv_heads, length = scores.shape
    rounded = [float(f"{score:.12g}") for score in chunk_scores(scores, chunk)]
    best = sorted(range(len(rounded)), key=lambda c: (-rounded[c], -c))[:chunks]
    kept = [t for c in sorted(best) for t in range(c * chunk, min(length, (c + 1) * chunk))]
    return np.tile(np.array(kept, int), (kv_heads, 1))
