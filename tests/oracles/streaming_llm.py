"""StreamingLLM (arXiv 2309.17453, section 3.2): attention sinks + recent window, positions inside the cache.

Keys are cached before RoPE. At every step they are rotated by their index in the cache, 0..n-1, and the query by n-1.
"""

import numpy as np

from tests.oracles.attention import attention, rope


def streaming_llm_kept(kv_heads: int, length: int, budget: int, sinks: int = 4) -> np.ndarray:
    """First `sinks` and last `budget - sinks` tokens, the same for every head: [Hk, min(budget, length)], ascending.

    A budget below `sinks` keeps the first `budget` tokens.
    """
    kept = [t for t in range(length) if t < min(sinks, budget) or t >= length - max(0, budget - sinks)]
    return np.tile(np.array(kept, int), (kv_heads, 1))


def streaming_llm_attend(q: np.ndarray, k: np.ndarray, v: np.ndarray, *, theta: float = 1e4, **options) -> np.ndarray:
    """One query over a cache whose last entry is the query's own token.

    Args:
      q: [H, D] un-rotated query.
      k, v: [Hk, n, D] un-rotated keys and values of the cached tokens in order of time.
      theta: Base of the rotary frequencies.
      options: Of `attention` (scale, softcap).

    Returns:
      [H, D].
    """
    n = k.shape[1]
    q_rotated = rope(q[:, None], np.array([n - 1]), theta)
    return attention(q_rotated, rope(k, np.arange(n), theta), v, **options)[:, 0]


def streaming_llm_decode(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    *,
    prompt: int,
    budget: int,
    sinks: int = 4,
    theta: float = 1e4,
    **options,
) -> np.ndarray:
    """Outputs of tokens prompt..T-1. Room is made before a token comes in: it sees `budget` tokens, itself included.

    The authors' chat demo makes room before a turn (`evict_for_space`), their perplexity script after each token. What
    was dropped never matters again, so the cache of every step follows from its length alone. `prompt=0` streams all
    tokens.

    Args:
      q: [H, T, D], k, v: [Hk, T, D], all un-rotated.

    Returns:
      [H, T - prompt, D].
    """
    outputs = []
    for t in range(prompt, q.shape[1]):
        kept = streaming_llm_kept(1, t + 1, budget, sinks)[0]
        outputs.append(streaming_llm_attend(q[:, t], k[:, kept], v[:, kept], theta=theta, **options))
    return np.stack(outputs, axis=1)
