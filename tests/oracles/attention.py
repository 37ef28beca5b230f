"""Causal attention with grouped queries, one sequence, float64: the definition every other oracle builds on.

Sources: scaled dot-product attention (Vaswani et al., arXiv 1706.03762, eq. 1), grouped queries (arXiv 2305.13245),
rotary embedding (arXiv 2104.09864, half-rotation layout as in Llama), logit softcap (Gemma 2, arXiv 2408.00118),
sinks beside a window (StreamingLLM, arXiv 2309.17453, and DuoAttention, arXiv 2410.10819).
"""

import math

import numpy as np


def softmax(logits: np.ndarray) -> np.ndarray:
    """Softmax over the last axis; `-inf` gets exactly zero. A row without any finite logit is all zeros."""
    logits = np.asarray(logits, np.float64)
    top = logits.max(axis=-1, keepdims=True)
    weights = np.exp(logits - np.where(np.isfinite(top), top, 0.0))
    total = weights.sum(axis=-1, keepdims=True)
    return weights / np.where(total > 0, total, 1.0)


def rope(x: np.ndarray, positions: np.ndarray, theta: float = 1e4) -> np.ndarray:
    """Rotates the pair (x[i], x[i + D/2]) of the token at position p by the angle p * theta^(-2i/D).

    Args:
      x: [..., T, D].
      positions: [T].
      theta: Base of the frequencies.
    """
    x = np.asarray(x, np.float64)
    half = x.shape[-1] // 2
    out = np.empty_like(x)
    for t, position in enumerate(positions):
        for i in range(half):
            angle = position * theta ** (-2.0 * i / x.shape[-1])
            a, b = x[..., t, i], x[..., t, i + half]
            out[..., t, i] = a * math.cos(angle) - b * math.sin(angle)
            out[..., t, i + half] = b * math.cos(angle) + a * math.sin(angle)
    return out


def attention_weights(
    q: np.ndarray,
    k: np.ndarray,
    *,
    scale: float | None = None,
    window: int | None = None,
    sinks: int = 0,
    softcap: float | None = None,
    q_positions: np.ndarray | None = None,
    k_positions: np.ndarray | None = None,
) -> np.ndarray:
    """Attention probabilities. Query head h reads KV head h // (H / Hk).

    The query at position i sees the key at position j when j <= i and, with a window, i - j < window or j < sinks.

    Args:
      q: [H, Tq, D], k: [Hk, Tk, D], as they enter the dot product (rotated).
      scale: Multiplies the logits; 1/sqrt(D) by default.
      window: Sliding window in tokens, the query's own included.
      sinks: First positions that stay visible beside the window.
      softcap: c * tanh(logit / c), after the scale and before the mask.
      q_positions: [Tq]; by default the last Tq of Tk.
      k_positions: [Tk] or, for a cache that keeps other tokens in each head, [Hk, Tk]; by default 0..Tk-1.

    Returns:
      [H, Tq, Tk].
    """
    q, k = np.asarray(q, np.float64), np.asarray(k, np.float64)
    heads, num_q, dim = q.shape
    kv_heads, num_k, _ = k.shape
    logit_scale = dim**-0.5 if scale is None else scale
    q_positions = np.arange(num_k - num_q, num_k) if q_positions is None else np.asarray(q_positions)
    k_positions = np.arange(num_k) if k_positions is None else np.asarray(k_positions)
    k_positions = np.broadcast_to(k_positions, (kv_heads, num_k))
    weights = np.zeros((heads, num_q, num_k))
    for h in range(heads):
        kv = h // (heads // kv_heads)
        for t in range(num_q):
            logits = logit_scale * (k[kv] @ q[h, t])
            if softcap is not None:
                logits = softcap * np.tanh(logits / softcap)
            distance = q_positions[t] - k_positions[kv]
            visible = distance >= 0
            if window is not None:
                visible &= (distance < window) | (k_positions[kv] < sinks)
            weights[h, t] = softmax(np.where(visible, logits, -np.inf))
    return weights


def attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, **options) -> np.ndarray:
    """Attention output [H, Tq, D] of q [H, Tq, D] over k, v [Hk, Tk, D]; `options` as in `attention_weights`."""
    weights = attention_weights(q, k, **options)
    group = len(q) // len(k)
    return np.stack([weights[h] @ np.asarray(v[h // group], np.float64) for h in range(len(q))])


def group_sum(per_head: np.ndarray, kv_heads: int) -> np.ndarray:
    """Sums [H, ...] over the query heads of each KV head: [Hk, ...]."""
    group = len(per_head) // kv_heads
    return np.stack([per_head[kv * group : (kv + 1) * group].sum(axis=0) for kv in range(kv_heads)])


def group_mean(per_head: np.ndarray, kv_heads: int) -> np.ndarray:
    """Averages [H, ...] over the query heads of each KV head: [Hk, ...]."""
    return group_sum(per_head, kv_heads) / (len(per_head) // kv_heads)


def gather(x: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """The kept tokens of every head: x [Hk, T, D], kept [Hk, n] -> [Hk, n, D]."""
    return np.stack([x[h][kept[h]] for h in range(len(x))])
