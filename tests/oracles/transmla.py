"""TransMLA (arXiv 2502.07864, section 4): a layer of grouped-query attention becomes multi-head latent attention.

Keys of all KV heads together are one latent key that every query head reads; the head's own part is picked by an up
projection (section 4.1). RoRoPE (4.2) turns the latent key so that its energy gathers in a few channels: among channels
of one frequency any rotation commutes with rotary embedding, as long as real and imaginary parts share it. FreqFold
takes `freqfold` neighbouring frequencies for one. Only the first channels keep their rotation. Balanced KV PCA (4.3)
then writes the rest of the key, made as large as the value, and the value with few common channels.

Channels are in the authors' order: real and imaginary part next to each other, and the `head_dim / collapse` channels
with the most energy in front. With `collapse` 2 these have every second frequency. Followed in everything that shows:
the balance leaves out as many value channels as keys are rotated. Left out: 1 % of the mean on the diagonal of every
covariance, which changes no eigenvector; and the factor on queries that undoes another scale of the logits.
"""

import math

import numpy as np

from tests.oracles.attention import softmax


def concentration(keys: np.ndarray, *, freqfold: int = 1, collapse: int = 1) -> np.ndarray:
    """The orthogonal matrix [Hk * D, Hk * D] that turns unrotated keys [n, Hk, D]: `keys.reshape(n, -1) @ matrix`."""
    keys = np.asarray(keys, np.float64)
    _, heads, dim = keys.shape
    half, per = dim // 2, freqfold // collapse
    groups = half // freqfold
    matrix = np.zeros((heads * dim, heads * dim))
    for group in range(groups):
        members = [(h, group * freqfold + j) for h in range(heads) for j in range(freqfold)]
        covariance = np.zeros((len(members), len(members)))
        for part in (0, half):
            samples = np.stack([keys[:, h, part + i] for h, i in members], axis=1)
            covariance += samples.T @ samples
        vectors = np.linalg.eigh(covariance)[1][:, ::-1]
        for n in range(len(members)):
            block, place = divmod(n, per)
            for imaginary, part in enumerate((0, half)):
                column = 2 * ((block * groups + group) * per + place) + imaginary
                for member, (h, i) in enumerate(members):
                    matrix[h * dim + part + i, column] = vectors[member, n]
    return matrix


def rotate(x: np.ndarray, rope_dim: int, dim: int, collapse: int, theta: float = 1e4) -> np.ndarray:
    """Rotates the first `rope_dim` channels of x [..., T, channels] at positions 0, 1, ...; pairs are neighbours."""
    out = np.array(x, np.float64)
    pairs_per_head = dim // 2 // collapse
    for t in range(x.shape[-2]):
        for p in range(rope_dim // 2):
            angle = t * theta ** (-2.0 * collapse * (p % pairs_per_head) / dim)
            a, b = x[..., t, 2 * p], x[..., t, 2 * p + 1]
            out[..., t, 2 * p] = a * math.cos(angle) - b * math.sin(angle)
            out[..., t, 2 * p + 1] = b * math.cos(angle) + a * math.sin(angle)
    return out


def causal(q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: float) -> np.ndarray:
    """One head: q, k [T, C], v [T, D] -> [T, D]."""
    out = np.zeros((len(q), v.shape[1]))
    for t in range(len(q)):
        out[t] = softmax(scale * (k[: t + 1] @ q[t])) @ v[: t + 1]
    return out


def partial_rope(
    x: np.ndarray, weights: dict[str, np.ndarray], matrix: np.ndarray, *, rope_dim: int, dim: int, collapse: int = 1
) -> np.ndarray:
    """The layer's output [T, hidden] where only the first `rope_dim` channels of the turned latent key rotate.

    Args:
      x: Inputs [T, hidden].
      weights: q, k, v, o as PyTorch has them, [out, in].
      matrix: From `concentration`.
    """
    heads = len(weights["q"]) // dim
    group = heads // (len(weights["k"]) // dim)
    q, k, v = (x @ weights[name].T for name in ("q", "k", "v"))
    k = rotate(k @ matrix, rope_dim, dim, collapse)
    out = []
    for h in range(heads):
        mine = slice(h // group * dim, (h // group + 1) * dim)
        query = rotate(q[:, h * dim : (h + 1) * dim] @ matrix[mine], rope_dim, dim, collapse)
        out.append(causal(query, k, v[:, mine], dim**-0.5))
    return np.concatenate(out, axis=1) @ weights["o"].T


def joint_pca(
    k: np.ndarray, v: np.ndarray, *, rope_dim: int, rank: int, balance: float | None = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """Balanced PCA of the channels that do not rotate, and the values.

    Args:
      k, v: Turned keys and values of the calibration tokens [n, Hk * D].
      balance: How much larger than the value the key may be; None leaves it as it is.

    Returns:
      encode [2 * Hk * D - rope_dim, rank] and decode [rank, 2 * Hk * D - rope_dim]:
      `concatenate(k[rope_dim:], v) @ encode` is the latent.
    """
    nope, ratio = k[:, rope_dim:], 1.0
    if balance is not None:
        size = [np.sqrt((y**2).sum(0)).mean() for y in (nope, v[:, rope_dim:])]
        ratio = size[0] / (size[1] * balance)
    both = np.concatenate([nope / ratio, v], axis=1)
    vectors = np.linalg.eigh(both.T @ both)[1][:, ::-1][:, :rank]
    sizes = np.concatenate([np.full(nope.shape[1], ratio), np.ones(v.shape[1])])
    return vectors / sizes[:, None], vectors.T * sizes


def latent_attention(
    x: np.ndarray,
    weights: dict[str, np.ndarray],
    matrix: np.ndarray,
    encode: np.ndarray,
    decode: np.ndarray,
    *,
    rope_dim: int,
    dim: int,
    collapse: int = 1,
) -> np.ndarray:
    """The layer's output [T, hidden] from a cache of `rank + rope_dim` numbers a token; keys and values written out."""
    heads = len(weights["q"]) // dim
    group = heads // (len(weights["k"]) // dim)
    q, k, v = (x @ weights[name].T for name in ("q", "k", "v"))
    k = k @ matrix
    latent = np.concatenate([k[:, rope_dim:], v], axis=1) @ encode
    rope_key = rotate(k[:, :rope_dim], rope_dim, dim, collapse)
    nope = len(matrix) - rope_dim
    out = []
    for h in range(heads):
        mine = slice(h // group * dim, (h // group + 1) * dim)
        query = q[:, h * dim : (h + 1) * dim]
        turned = query @ matrix[mine, :rope_dim]
        up = matrix[mine, rope_dim:] @ decode[:, :nope].T  # [D, rank]
        keys = np.concatenate([latent @ up.T, rope_key], axis=1)
        queries = np.concatenate([query, rotate(turned, rope_dim, dim, collapse)], axis=1)
        out.append(causal(queries, keys, latent @ decode[:, nope:][:, mine], dim**-0.5))
    return np.concatenate(out, axis=1) @ weights["o"].T
