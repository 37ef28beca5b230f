"""ChunkKV: meaning lives in chunks of tokens, not in single ones. Liu et al., 2025, https://arxiv.org/abs/2502.00299

Any score, averaged over chunks of neighbouring tokens and over heads; the best chunks stay whole, alike in all heads.

Differs from kvpress: chunks are chosen for every row of a batch by its own scores (kvpress applies those of the first
row to all); as many are kept as fit the budget, never one more; a chunk with a token that the wrapped method must keep
comes first (kvpress averages that token's top score with its neighbours').
"""

import dataclasses

from kvjax.policies import Budget, Evict, Phase, Policy, TopChunks, parse_policy, register


@register(
    "ChunkKV: Semantic-Preserving KV Cache Compression",
    "https://arxiv.org/abs/2502.00299",
    budget=0.25,
    small={"chunk": 4, "score": "snapkv(window=4)"},
)
def chunkkv(budget: Budget | int | float | str, *, score: str = "snapkv", chunk: int = 20) -> Policy:
    """Keeps whole chunks of neighbouring tokens, ranked by any other method's score.

    Args:
      budget: Slots per layer and head.
      score: The method that scores, with its parameters if need be: "knorm", "snapkv(window=16)".
      chunk: Tokens per chunk.
    """
    if chunk < 1:
        raise ValueError(f"chunk must be positive, got {chunk}.")
    inner = parse_policy(score, budget=Budget.of(budget))
    if len(inner.stages) != 1 or not isinstance(inner.stages[0], Evict) or inner.store is not None:
        raise ValueError(f"chunkkv wraps one method that evicts by a score; {score!r} is none.")
    stage = dataclasses.replace(inner.stages[0], select=TopChunks(chunk), phase=Phase(), floor=chunk)
    return Policy(stages=(stage,))
