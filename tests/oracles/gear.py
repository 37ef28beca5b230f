"""GEAR (arXiv 2403.05527, section 3, algorithm 1): X ~ D + L + S, a quantized backbone, a low-rank matrix of its error
and a sparse matrix of outliers.

S: of every vector (a key channel over the tokens of the block; a value's token over the channels of all heads) the s/2
largest and the s/2 smallest entries are stored exactly; for the backbone they are replaced by the vector's mean,
outliers included. D: asymmetric round to nearest of what results, in groups along the same vectors (KIVI), or with one
group per vector (KCVT). L: rank r, of the error X - (D + S), per head, by power iteration.

Counts of outliers are rounded down. The paper's count for a key channel is of its tokens, n s / 2; the authors' code
takes H D s / 2, whatever n is (a value's count), `per_side` gives it. Their backbone takes b^2 - 1 levels where there
are outliers: 3 for 2 bits, 15 for 4, as 2^b - 1, but 8 for 3 bits (`levels`). Their D + S is rounded to float16 before
its error is taken, which is not done here.

Decoding, as in the authors' CUDA model (`LlamaAttention_GEAR`): of n prompt tokens the first n - n % R are one block,
the rest wait in full precision in a buffer; as soon as R are together, and have been attended to, they become a block
of their own, with factors of their own.
"""

import numpy as np

from tests.oracles.attention import attention


def count_outliers(size: int, sparsity: float) -> int:
    """How many of `size` entries are kept exactly on each side, for a share `sparsity` on both sides together."""
    return int(size * sparsity / 2)


def find_outliers(rows: np.ndarray, per_side: int) -> np.ndarray:
    """Mask of the `per_side` largest and smallest entries of each row of [..., N]; of equal ones the earlier."""
    mask = np.zeros(rows.shape, bool)
    for signed in (rows, -rows):
        np.put_along_axis(mask, np.argsort(signed, axis=-1, kind="stable")[..., :per_side], True, axis=-1)
    return mask


def backbone(rows: np.ndarray, levels: int, group: int) -> np.ndarray:
    """Rounds rows [..., N] to `levels` + 1 evenly spaced values between the extremes of each `group` entries."""
    groups = rows.reshape(*rows.shape[:-1], rows.shape[-1] // group, group)
    low, high = groups.min(axis=-1, keepdims=True), groups.max(axis=-1, keepdims=True)
    scale = (high - low) / levels
    codes = np.rint((groups - low) / np.where(scale > 0, scale, 1.0))
    return (codes * scale + low).reshape(rows.shape)


def dense_and_sparse(
    rows: np.ndarray, bits: int, group: int, per_side: int, levels: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """D + S of rows [..., N], and the mask of the outliers."""
    rows = np.asarray(rows, np.float64)
    mask = find_outliers(rows, per_side)
    smooth = np.where(mask, rows.mean(axis=-1, keepdims=True), rows)
    return np.where(mask, rows, backbone(smooth, levels or 2**bits - 1, group)), mask


def low_rank(error: np.ndarray, start: np.ndarray, loops: int) -> np.ndarray:
    """Q P^T ~ error [H, T, D] per head, by power iteration from P = start [H, D, r] (the authors draw it uniformly).

    In the last loop P is orthonormal before and Q after the product.
    """
    out = np.zeros_like(error)
    for h, e in enumerate(error):
        p, q = np.asarray(start[h], np.float64), np.zeros((error.shape[1], start.shape[-1]))
        for loop in range(loops):
            last = loop == loops - 1
            q = e @ (np.linalg.qr(p)[0] if last else p)
            q = np.linalg.qr(q)[0] if last else q
            p = e.T @ q
        out[h] = q @ p.T
    return out


def _key_rows(k: np.ndarray) -> np.ndarray:
    """[Hk, T, D] -> [Hk, D, T] (its own inverse): a row is one channel."""
    return np.swapaxes(k, 1, 2)


def _value_rows(v: np.ndarray) -> np.ndarray:
    """[Hk, T, D] -> [T, Hk * D]: a row is one token, all heads."""
    return np.moveaxis(v, 0, 1).reshape(v.shape[1], -1)


def gear_keys(
    k: np.ndarray,
    start: np.ndarray | None,
    *,
    bits: int = 2,
    group: int = 32,
    sparsity: float = 0.02,
    loops: int = 3,
    per_side: int | None = None,
    levels: int | None = None,
) -> np.ndarray:
    """A block of keys [Hk, T, D] as it reads back.

    Args:
      start: [Hk, D, r] of the power iteration; None leaves L out (GEAR-S).
      group: Tokens that share a scale; 0 for the whole block (KCVT).
      sparsity: Share of outliers on both sides together; 0 leaves S out (GEAR-L).
    """
    number = count_outliers(k.shape[1], sparsity) if per_side is None else per_side
    out = _key_rows(dense_and_sparse(_key_rows(k), bits, group or k.shape[1], number, levels)[0])
    return out if start is None else out + low_rank(k - out, start, loops)


def gear_values(
    v: np.ndarray,
    start: np.ndarray | None,
    *,
    bits: int = 2,
    group: int = 32,
    sparsity: float = 0.02,
    loops: int = 3,
    levels: int | None = None,
) -> np.ndarray:
    """As `gear_keys`; groups and outliers run over the channels of all heads of a token."""
    heads, length, dim = v.shape
    number = count_outliers(heads * dim, sparsity)
    rows = dense_and_sparse(_value_rows(v), bits, group or heads * dim, number, levels)[0]
    out = np.moveaxis(rows.reshape(length, heads, dim), 1, 0)
    return out if start is None else out + low_rank(v - out, start, loops)


def gear_cache(
    k: np.ndarray,
    v: np.ndarray,
    *,
    prompt: int,
    buffer: int,
    starts: tuple[np.ndarray, np.ndarray],
    later: tuple[np.ndarray, np.ndarray],
    **options,
) -> tuple[np.ndarray, np.ndarray]:
    """Keys and values [Hk, n, D] read back from a cache of all n tokens of k, v, of which the first are the prompt.

    Args:
      buffer: R, tokens; a multiple of the group.
      starts, later: Starts for keys and for values, of the prompt's block and of those that follow.
    """
    keys, values = np.array(k, np.float64), np.array(v, np.float64)
    first = prompt - prompt % buffer
    blocks = ([(0, first)] if first else []) + [(t, t + buffer) for t in range(first, k.shape[1] - buffer + 1, buffer)]
    for start, stop in blocks:
        of_keys, of_values = later if start >= first else starts
        keys[:, start:stop] = gear_keys(k[:, start:stop], of_keys, **options)
        values[:, start:stop] = gear_values(v[:, start:stop], of_values, **options)
    return keys, values


def gear_decode(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, *, prompt: int, scale: float | None = None, **options
) -> np.ndarray:
    """Attention outputs [H, T - prompt, D] of tokens prompt..T-1, decoded one by one; options of `gear_cache`."""
    outputs = []
    for t in range(prompt, q.shape[1]):
        keys, values = gear_cache(k[:, :t], v[:, :t], prompt=prompt, **options)
        keys = np.concatenate([keys, k[:, t : t + 1]], axis=1)
        values = np.concatenate([values, v[:, t : t + 1]], axis=1)
        outputs.append(attention(q[:, t : t + 1], keys, values, scale=scale)[:, 0])
    return np.stack(outputs, axis=1)
