"""DuoAttention (Xiao et al., arXiv 2410.10819): some heads keep everything, the others sinks and recent tokens.

A gate per KV head is trained with the model frozen: its attention is `alpha * full + (1 - alpha) * streaming`, where
streaming sees the first `sinks` tokens and the last `recent`, itself included (section 2.2). The loss is the squared
distance of the last hidden states to those of the unchanged model at the labelled tokens, plus `weight * mean(alpha)`
(section 2.3). Deployed, the gates' quantile at the wished sparsity parts heads into the two kinds (section 2.4).
"""

import numpy as np

from tests.oracles.attention import attention


def streaming_mask(length: int, sinks: int, recent: int) -> np.ndarray:
    """Which key [T] each query [T] of a streaming head sees: bool [T, T]."""
    mask = np.zeros((length, length), bool)
    for i in range(length):
        for j in range(i + 1):
            mask[i, j] = j < sinks or i - j < recent
    return mask


def gated_attention(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, gates: np.ndarray, *, sinks: int, recent: int, **options
) -> np.ndarray:
    """Output [H, T, D] of gated heads, as in training. gates [Hk] are cut to [0, 1]; `options` as in `attention`."""
    full = attention(q, k, v, **options)
    streaming = attention(q, k, v, sinks=sinks, window=recent, **options)
    alpha = np.repeat(np.clip(gates, 0, 1), len(q) // len(k))[:, None, None]
    return alpha * full + (1 - alpha) * streaming


def retrieval_heads(gates: np.ndarray, sparsity: float) -> np.ndarray:
    """Which heads keep everything: those whose gate is at least the quantile `sparsity` of all layers' gates.

    The authors add noise below 1e-6 to part equal gates; here a little that falls from head to head does.

    Args:
      gates: [L, Hk].
      sparsity: Part of the heads that stream; from 1 on all do, up to 0 none.

    Returns:
      [L, Hk] bool.
    """
    if sparsity >= 1:
        return np.zeros(gates.shape, bool)
    parted = np.asarray(gates) - 1e-9 * np.arange(np.size(gates)).reshape(np.shape(gates))
    return parted >= (-1 if sparsity <= 0 else np.quantile(parted, sparsity))


def duo_kept(retrieval: np.ndarray, length: int, *, sinks: int, recent: int) -> list[np.ndarray]:
    """Positions that each KV head of a layer holds after `length` tokens, ascending. retrieval: [Hk] bool."""
    everything = np.arange(length)
    ring = everything[(everything < sinks) | (everything >= length - recent)]
    return [everything if full else ring for full in retrieval]


def duo_decode(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    retrieval: np.ndarray,
    *,
    prompt: int,
    sinks: int,
    recent: int,
    **options,
) -> np.ndarray:
    """Outputs [H, T - prompt, D] of tokens prompt..T-1: a streaming head's query sees itself, `recent - 1` before it
    and the sinks, as in training."""
    outputs = []
    for t in range(prompt, q.shape[1]):
        kept = duo_kept(retrieval, t + 1, sinks=sinks, recent=recent)
        group = len(q) // len(k)
        heads = []
        for h in range(len(q)):
            kv, tokens = h // group, kept[h // group]
            heads.append(attention(q[h : h + 1, t : t + 1], k[kv : kv + 1, tokens], v[kv : kv + 1, tokens], **options))
        outputs.append(np.concatenate(heads)[:, 0])
    return np.stack(outputs, axis=1)


def duo_loss(
    teacher: np.ndarray, student: np.ndarray, labelled: np.ndarray, gates: np.ndarray, weight: float
) -> tuple[float, float]:
    """Distillation and regularization: teacher, student [T, hidden], labelled [T] bool, gates [L, Hk]."""
    squared = ((np.asarray(teacher, np.float64) - student) ** 2).mean(axis=-1)
    return float(squared[labelled].mean()), float(weight * np.abs(gates).mean())
