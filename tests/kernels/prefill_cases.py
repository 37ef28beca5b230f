"""Prefill attention written out in NumPy float64, query by query; every implementation is held to it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.cache import EMPTY
from kvjax.kernels.prefill import ColumnSums, Past, Prefill, Statistics

B, SCALE = 2, 0.3
ALL = Statistics(
    lse=True,
    entropy=True,
    column_sums=(
        ColumnSums(),
        ColumnSums(forgetting=0.95, window=40, normalized=True),
    ),
    window=6,
)
EVERY_SUM = Statistics(
    column_sums=tuple(
        ColumnSums(forgetting=forgetting, window=window, normalized=normalized)
        for forgetting in (1.0, 0.9)
        for window in (0, 5)
        for normalized in (False, True)
    )
)


@dataclasses.dataclass(frozen=True)
class Case:
    """Two rows and their lengths; `packed`: lengths of the prompts that a row consists of; `past`: slots of what came
    before, about a third of them empty, the same for all heads or not.
    """

    length: int
    lengths: tuple[int, int]
    dim: int = 64
    value_dim: int = 0
    kv_heads: int = 2
    group: int = 2
    window: int = 0
    softcap: float = 0.0
    packed: tuple[int, ...] = ()
    past: int = 0
    by_head: bool = False
    statistics: Statistics = ALL
    dtype: str = "float32"


def draw(case: Case):
    """Arguments of `prefill_attention`, NaN wherever there is no token: (q, k, v, pos), keywords."""
    rng = np.random.default_rng(case.length + case.past)
    heads, length = case.kv_heads * case.group, case.length
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    there = np.arange(length) < np.array(case.lengths)[:, None]
    pos, segments = np.arange(length) + case.past, None
    if case.packed:
        segments = np.repeat(np.arange(len(case.packed)), case.packed)[:length] * 7 % 5
        pos = np.concatenate([np.arange(n) for n in case.packed])[:length]
        segments = jnp.asarray(np.tile(segments, (B, 1)), jnp.int32)
    pos = np.where(there, pos, EMPTY).astype(np.int32)
    hide = lambda x, there: jnp.asarray(np.where(there[..., None], x, np.nan), case.dtype)  # noqa: E731
    q, k = (
        hide(2 * normal(B, heads, length, case.dim), there[:, None]),
        hide(normal(B, case.kv_heads, length, case.dim), there[:, None]),
    )
    v = hide(normal(B, case.kv_heads, length, case.value_dim or case.dim), there[:, None])
    past = None
    if case.past:
        rows = (B, case.kv_heads if case.by_head else 1, case.past)
        old = np.argsort(rng.normal(size=rows), -1)  # In no particular order.
        old = np.where(rng.random(rows) < 0.7, old, EMPTY).astype(np.int32)
        past = Past(
            k=hide(normal(B, case.kv_heads, case.past, case.dim), old >= 0),
            v=hide(normal(B, case.kv_heads, case.past, case.value_dim or case.dim), old >= 0),
            pos=jnp.asarray(old),
        )
    keywords = dict(
        scale=SCALE,
        window=case.window,
        softcap=case.softcap,
        segments=segments,
        past=past,
        statistics=case.statistics,
    )
    return (q, k, v, jnp.asarray(pos)), keywords


@functools.cache
def naive(case: Case) -> Prefill:
    """The answer as its definition says, for statistics `case.statistics`."""
    (q, k, v, pos), keywords = draw(case)
    past, asked = keywords["past"], case.statistics
    pos, length = np.asarray(pos), case.length
    seg = np.zeros_like(pos) if keywords["segments"] is None else np.asarray(keywords["segments"])
    exact = lambda x: np.asarray(x.astype(jnp.float32), np.float64)  # noqa: E731
    # Products are taken in the storage type: what is rounded before is no error.
    q = exact((q * SCALE).astype(k.dtype))
    k, v = exact(k), exact(v)
    heads, slots = q.shape[1], case.past + length
    k_pos = np.broadcast_to(pos[:, None], (B, case.kv_heads, length))
    k_seg = np.broadcast_to(seg[:, None], k_pos.shape)
    if past is not None:
        old = np.broadcast_to(np.asarray(past.pos), (B, case.kv_heads, case.past))
        k_pos, k_seg = np.concatenate([old, k_pos], -1), np.concatenate([0 * old, k_seg], -1)
        k, v = np.concatenate([exact(past.k), k], 2), np.concatenate([exact(past.v), v], 2)

    out, weights = np.zeros((B, heads, length, v.shape[-1])), np.zeros((B, heads, length, slots))
    lse, entropy = np.full((B, heads, length), -1e30), np.zeros((B, heads, length))
    seen = np.zeros((B, heads, length, slots), bool)
    for b, h, t in np.ndindex(B, heads, length):
        g = h // case.group
        mask = (k_pos[b, g] >= 0) & (k_pos[b, g] <= pos[b, t]) & (k_seg[b, g] == seg[b, t])
        mask &= (pos[b, t] - k_pos[b, g] < case.window) if case.window else True
        seen[b, h, t] = mask
        if not mask.any():
            continue
        logits = k[b, g, mask] @ q[b, h, t]
        logits = case.softcap * np.tanh(logits / case.softcap) if case.softcap else logits
        lse[b, h, t] = logits.max() + np.log(np.exp(logits - logits.max()).sum())
        p = np.exp(logits - lse[b, h, t])
        out[b, h, t], weights[b, h, t, mask], entropy[b, h, t] = p @ v[b, g, mask], p, -(p * np.log(p)).sum()

    def sums(asked: ColumnSums):
        count = np.zeros((B, length))
        for b, t in np.ndindex(B, length):
            if pos[b, t] >= 0:
                age = pos[b][(pos[b] >= 0) & (seg[b] == seg[b, t])].max() - pos[b, t]
                count[b, t] = asked.forgetting**age if not asked.window or age < asked.window else 0
        received = np.einsum("bht,bhts->bhs", np.broadcast_to(count[:, None], lse.shape), weights)
        number = np.einsum("bht,bhts->bhs", np.broadcast_to(count[:, None], lse.shape), seen)
        return np.where(number > 0, received / np.where(number > 0, number, 1), 0) if asked.normalized else received

    window = np.zeros((B, heads, asked.window, slots))
    for b in range(B):
        n = min(asked.window, case.lengths[b])
        window[b, :, asked.window - n :] = weights[b, :, case.lengths[b] - n : case.lengths[b]]
    return Prefill(
        out=out,
        lse=lse if asked.lse else None,
        entropy=entropy if asked.entropy else None,
        column_sums=tuple(sums(one) for one in asked.column_sums),
        window=window if asked.window else None,
    )


def check(got: Prefill, case: Case, tolerance: float = 3e-5, out_tolerance: float | None = None) -> dict[str, float]:
    """Compares all that is asked for.

    Sums may be off by the tolerance times the square root of their size, roughly as rounding errors add up.
    """
    want = naive(case)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    assert got.out.dtype == jnp.dtype(case.dtype)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(dataclasses.replace(got, out=got.out.astype("f"))))
    errors = {}
    for name in ("out", "lse", "entropy", "column_sums", "window"):
        limit = (out_tolerance or tolerance) if name == "out" else tolerance
        pairs = zip(jax.tree.leaves(getattr(got, name)), jax.tree.leaves(getattr(want, name)), strict=True)
        for i, (a, b) in enumerate(pairs):
            a = np.asarray(a.astype(jnp.float32))
            assert a.shape == b.shape, name
            np.testing.assert_allclose(
                a,
                b,
                atol=limit * max(1, np.sqrt(np.abs(b[b > -1e29]).max(initial=0))),
                rtol=tolerance,
                err_msg=f"{name} {i}",
            )
            errors[f"{name} {i}"] = float(np.abs(a - b).max())
    return errors
