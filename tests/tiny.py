"""A model small enough for every test, a ragged batch for it, and a way to look into any cache.

Shapes are shared on purpose: what one test compiles, the next one finds compiled.
"""

import functools

import jax
import numpy as np

import kvjax
from kvjax.cache import EMPTY
from kvjax.models.config import Rope
from kvjax.models.transformer import layer_spec
from kvjax.training.locret import init_retaining_heads, with_retaining_heads

# One sliding layer, so that "full-attention layers only" means something; grouped queries.
CONFIG = kvjax.Config(
    family="llama",
    vocab_size=128,
    hidden_size=32,
    mlp_size=48,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    layer_types=("full", "sliding", "full"),
    sliding_window=8,
    rope=Rope(theta=1e4, rotary_dim=16),
    sliding_rope=Rope(theta=1e3, rotary_dim=16),
    max_length=512,
    query_scale=0.5,  # Twice the usual: attention of random weights is too even otherwise.
    tied=True,
    eos_ids=(1,),
)
LENGTHS = np.array([48, 37, 21, 30], np.int32)
QUESTION_LENGTHS = np.array([6, 4, 6, 1], np.int32)
# No token twice in a row: equal keys score equally but for the last bit, and which of them stays would be chance.
_ROWS = np.random.default_rng(1).permuted(np.tile(np.arange(2, 128, dtype=np.int32), (4, 1)), axis=1)
TOKENS, QUESTION = _ROWS[:, :48], _ROWS[:, 48:54]


@functools.cache
def params():
    return kvjax.init_params(CONFIG, jax.random.key(0))


@functools.cache
def trained():
    """`params` with what trained methods add to them, here untrained."""
    return with_retaining_heads(params(), CONFIG, init_retaining_heads(CONFIG, jax.random.key(1), hidden=8))


def model() -> kvjax.Model:
    return kvjax.Model(params(), CONFIG)


def small(name: str, **changes) -> kvjax.Policy:
    """A method's typical policy, fit for short prompts; budgets are a half unless changed."""
    method = kvjax.methods()[name]
    half = {"budget": 0.5} if "budget" in method.parameters else {}
    return kvjax.policy(name, **{**method.example, **half, **method.small, **changes})


def read_back(layer) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What a layer's cache holds, as attention reads it: positions [B, H, S], keys and values [B, H, S, D] float32."""
    pos, k, v = _held(layer)
    return np.asarray(pos), np.asarray(k, np.float32), np.asarray(v, np.float32)


@jax.jit
def _held(layer):
    return layer.held(layer_spec(CONFIG, 0))


def kept(cache, row: int) -> list[list[list[int]]]:
    """Sorted positions that one row holds, for every full-attention layer and head."""
    layers = [np.asarray(layer.pos)[row] for layer in full_layers(cache)]
    layers = [np.broadcast_to(pos, (CONFIG.num_kv_heads, pos.shape[-1])) for pos in layers]
    return [[sorted(head[head != EMPTY].tolist()) for head in layer] for layer in layers]


def full_layers(cache) -> list:
    """Layers that policies act on, each with its own copy of what it shares with others."""
    transform = cache.policy.transform
    layers = cache.layers if transform is None else transform.apart(cache)
    return [layers[i] for i in CONFIG.full_layers]


def content(layer, row: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What one row holds, in order of position, wherever it stands: positions [H, n], keys and values [H, n, D]."""
    pos, k, v = (x[row] for x in read_back(layer))
    k, v = (np.where((pos == EMPTY)[..., None], 0.0, x) for x in (k, v))
    order = np.argsort(np.where(pos == EMPTY, 10**6, pos), -1, kind="stable")[:, : (pos != EMPTY).sum(-1).max()]
    return np.take_along_axis(pos, order, -1), *(np.take_along_axis(x, order[..., None], 1) for x in (k, v))


def assert_same_content(layer, other, atol: float, rows=None) -> None:
    """The same tokens with the same keys and values in every row; `rows`: pairs of rows to compare."""
    for row, other_row in rows or [(i, i) for i in range(layer.pos.shape[0])]:
        (pos, *found), (want_pos, *want) = content(layer, row), content(other, other_row)
        np.testing.assert_array_equal(pos, want_pos)
        for x, y in zip(found, want, strict=True):
            np.testing.assert_allclose(x, y, atol=atol)


def assert_trees_equal(a, b) -> None:
    """Same structure (static fields too) and the same bits."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))
