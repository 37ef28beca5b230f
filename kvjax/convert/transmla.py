"""TransMLA (Meng et al., arXiv 2502.07864): grouped-query attention becomes multi-head latent attention.

A query head of GQA reads its KV head's part of one long key; written like that, GQA is MLA with a full-size latent.
Three steps make the latent small (section 4):

1. *RoRoPE.* Channels of one frequency can be turned among each other without any change, as long as both channels of a
   pair turn alike. A PCA of the keys gathers their energy in `rope_dim` channels; only these go on rotating. *FreqFold*
   takes neighbouring frequencies for one, so that more channels take part in a turn.
2. *Balance.* The channels that no longer rotate are made as large as the values.
3. *Joint PCA* of both, on what the model computes after step 1, keeps `rank` channels.

What is left per token and layer is `rope_dim + rank` numbers in place of `2 * num_kv_heads * head_dim`. Decoding is
absorbed: up projections are applied to queries and outputs, never to the cache, so every policy and every slot codec
works on the latent cache as on that of a model with one KV head. Layouts that write keys and values in different ways
(KIVI, GEAR, MiKV) hold the latent twice, once as each.

Step 1 alone is exact with `rope_dim = num_kv_heads * rotary_dim` and `freqfold = 1`; steps 2 and 3 are exact with the
largest rank, `2 * num_kv_heads * head_dim - rope_dim`. Every family can be converted: biases are absorbed; channels
that never rotated (Phi-3) join the rest of the key without loss; where heads are normed (Qwen3, Gemma 3) the turn comes
after the norm, which keeps the key and value projections in the model (their cost, not their cache).

Differs from the authors' code (MuLabPKU/TransMLA):
  - `freqfold=None` compares perplexities on the calibration tokens; they take a test set.
  - Keys per query head are not scaled by `sqrt((head_dim + rope_dim) / head_dim)`: the logits' scale stays what it was.
  - `rope_dim` may be a multiple of `rotary_dim`, up to all rotating channels.
  - Rope scalings that lengthen rotated channels (yarn, longrope) go on lengthening those that no longer rotate.
  - No low-rank queries, and no norm between down and up projection: both need training to pay.
  - Parameters are absorbed in float64 and rounded once.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from kvjax.cache import EMPTY, LayerSpec, Tokens
from kvjax.models.config import Config, Mla, Rope
from kvjax.models.params import layer_names, layer_params
from kvjax.models.transformer import embed, layer_spec, plain_attend, positions, run_layer, unembed

Params = dict[str, Any]


def transmla(
    params: Params,
    config: Config,
    tokens: Any,
    lengths: Any = None,
    *,
    rank: int = 512,
    rope_dim: int = 64,
    freqfold: int | None = None,
    balance: float | None = 1.0,
    batch: int = 8,
) -> tuple[Params, Config]:
    """Converts a model with grouped-query attention to one with multi-head latent attention.

    Args:
      params, config: The model; every layer is converted, sliding ones too.
      tokens: Calibration text, ids [B, T] int32, right-padded (the paper: 128 pieces of 256 tokens).
      lengths: Tokens of each row [B]; default: all.
      rank: Channels of the latent.
      rope_dim: Channels of the key that go on rotating: `rotary_dim` divided by a whole number, or times one.
      freqfold: Neighbouring frequencies that count as one; a multiple of `rotary_dim / rope_dim` and a divisor of
        `rotary_dim / 2`. None doubles it until the perplexity of the calibration tokens gets worse.
      balance: Size of the keys that no longer rotate, relative to the values; None leaves it as it is.
      batch: Rows of tokens that are worked on at once.

    Returns:
      New params, one dict per layer, in the dtype of the old, and their config. What methods have trained on the old
      keys (`params["layers"][i]["trained"]`) says nothing of the new ones and is left behind.

    Raises:
      ValueError: The sizes do not fit the model, the model is already latent, or there are fewer tokens than the PCA
        has channels to find.
    """
    layers = [{name: x for name, x in old.items() if name != "trained"} for old in layer_params(params, config)]
    _check(config, rank, rope_dim, freqfold)
    tokens = jnp.asarray(tokens, jnp.int32)
    rows = (
        jnp.full(tokens.shape[:1], tokens.shape[1], jnp.int32) if lengths is None else jnp.asarray(lengths, jnp.int32)
    )
    full = full_rank(config, rope_dim)
    if int(rows.sum()) < rank < full:
        raise ValueError(f"{int(rows.sum())} calibration tokens cannot show which {rank} channels matter: give more.")
    pos = positions(tokens, rows)
    pieces = [slice(i, i + batch) for i in range(0, tokens.shape[0], batch)]
    start = [(embed(params, config, tokens[piece]), pos[piece]) for piece in pieces]

    moments, text = [], start
    for i, weights in enumerate(layers):
        moment, text = _advance(weights, config, i, text)
        moments.append(moment)

    def rotated(i: int, fold: int) -> "Latent":
        return partial_rope(layers[i], config, config.layer_rope(i), moments[i], rope_dim, fold)

    exact = dataclasses.replace(config, mla=Mla(full, rope_dim))
    if freqfold is None:

        def loss(fold: int) -> float:
            text = start
            for i, weights in enumerate(layers):
                _, text = _advance(with_latent(weights, exact, rotated(i, fold)), exact, i, text)
            found = [_loss(params, config, x, tokens[piece], p) for (x, p), piece in zip(text, pieces, strict=True)]
            return sum(float(total) for total, _ in found) / max(sum(int(number) for _, number in found), 1)

        freqfold = _best_fold(loss, _folds(config, rope_dim))

    small, new, text = dataclasses.replace(config, mla=Mla(rank, rope_dim)), [], start
    for i, weights in enumerate(layers):
        wide = rotated(i, freqfold)
        moment, text = _advance(with_latent(weights, exact, wide), exact, i, text)
        new.append(with_latent(weights, small, joint_pca(wide, moment, rank, balance)))
    return {**params, "layers": tuple(new)}, small


def full_rank(config: Config, rope_dim: int) -> int:
    """The rank at which nothing is lost: channels of all keys that do not rotate, and of all values."""
    return 2 * config.num_kv_heads * config.head_dim - rope_dim


@dataclasses.dataclass(frozen=True)
class Latent:
    """Latent attention of one layer, NumPy float64. C channels: `rope_dim` that rotate, then the latent.

    Attributes:
      down: From a layer's input (or from all heads' normed keys and values) to the key that is stored [in, C].
      bias: Of the same [C], or None.
      k_up: Takes queries to that key [num_heads, head_dim, C].
      v_up: Takes mixed latents to values [num_heads, rank, head_dim].
    """

    down: np.ndarray
    bias: np.ndarray | None
    k_up: np.ndarray
    v_up: np.ndarray


def concentration(
    moment: np.ndarray, kv_heads: int, rope: Rope, rope_dim: int, freqfold: int
) -> tuple[np.ndarray, np.ndarray]:
    """RoRoPE with FreqFold: how to turn all heads' channels so that few of those that rotate hold most of the energy.

    Args:
      moment: Sum of `k k^T` over unrotated keys of all heads [Hk * D, Hk * D].
      rope: Of the layer, as it was.

    Returns:
      An orthogonal matrix [Hk * D, Hk * D] from channels to turned channels (first the `rope_dim` that go on rotating,
      real parts before imaginary parts; last those that never did), and which of these no longer rotate, bool [Hk * D].
    """
    channels = len(moment)
    dim, pairs = channels // kv_heads, rope.rotary_dim // 2
    stride = max(rope.rotary_dim // rope_dim, 1)
    groups, per = pairs // freqfold, freqfold // stride
    turn, kept = np.zeros((channels, channels)), rope_dim // 2
    per_block = pairs // stride  # Pairs that one head's worth of frequencies gives.
    stopped = kv_heads * pairs - kept
    for group in range(groups):
        members = np.add.outer(np.arange(kv_heads) * dim, np.arange(freqfold) + group * freqfold).ravel()
        real, imaginary = np.ix_(members, members), np.ix_(members + pairs, members + pairs)
        vectors = np.linalg.eigh(moment[real] + moment[imaginary])[1][:, ::-1]
        order = np.arange(len(members))
        # The n-th component takes the frequency of a pair in its own group; a block has all groups' frequencies once.
        block, place = np.divmod(order, per)
        pair = block * per_block + group * per + place
        rotates = pair < kept
        # Those that no longer rotate follow, group by group.
        first = rope_dim + group * 2 * (stopped // groups)
        rest = first + 2 * (order - rotates.sum())
        turn[np.ix_(members, np.where(rotates, pair, rest))] = vectors
        turn[np.ix_(members + pairs, np.where(rotates, kept + pair, rest + 1))] = vectors
    never = np.add.outer(np.arange(kv_heads) * dim, np.arange(2 * pairs, dim)).ravel()
    turn[never, channels - len(never) + np.arange(len(never))] = 1.0
    position = np.arange(channels)
    return turn, (position >= rope_dim) & (position < channels - len(never))


def partial_rope(
    weights: Params, config: Config, rope: Rope, moment: np.ndarray, rope_dim: int, freqfold: int
) -> Latent:
    """Step 1: a layer's attention with one key for all heads, of which `rope_dim` channels rotate; nothing is cut.

    Args:
      weights: The layer, grouped-query. config, rope: As they were.
      moment: Sum of `k k^T` over unrotated keys of all heads [Hk * D, Hk * D].
    """
    heads, kv_heads, dim = config.num_heads, config.num_kv_heads, config.head_dim
    turn, stopped = concentration(moment, kv_heads, rope, rope_dim, freqfold)
    both = np.zeros((2 * kv_heads * dim,) * 2)
    both[: kv_heads * dim, : kv_heads * dim] = turn
    both[kv_heads * dim :, kv_heads * dim :] = np.eye(kv_heads * dim)

    def beside(kind: str) -> np.ndarray:
        return np.concatenate([_float64(weights[f"{x}_{kind}"]) for x in "kv"], -1)

    owner = np.repeat(np.arange(kv_heads), heads // kv_heads)  # The KV head of each query head.
    up = both.reshape(2, kv_heads, dim, -1)[:, owner]
    # Rotation by no angle still has the embedding's length, for queries and for keys.
    length = np.where(np.append(stopped, np.zeros(kv_heads * dim, bool)), rope.attention_factor**2, 1.0)
    return Latent(
        down=both if config.qk_norm else beside("proj") @ both,
        bias=beside("bias") @ both if config.qkv_bias and not config.qk_norm else None,
        k_up=up[0] * length,
        v_up=np.swapaxes(up[1][..., rope_dim:], 1, 2),
    )


def joint_pca(latent: Latent, moment: np.ndarray, rank: int, balance: float | None = 1.0) -> Latent:
    """Steps 2 and 3: the latent in its `rank` most important directions.

    Args:
      latent: From `partial_rope`.
      moment: Sum of `z z^T` over what is stored, unrotated [C, C].
    """
    channels, values = latent.down.shape[1], moment.shape[0] // 2  # Half of all channels are values.
    rope_dim = channels - latent.v_up.shape[1]
    moment = moment[rope_dim:, rope_dim:]
    keys, size = channels - values - rope_dim, np.sqrt(np.diag(moment))
    ratio = 1.0
    if balance is not None and keys:
        # As the authors' code: of the values, too, the first `rope_dim` channels do not count.
        ratio = size[:keys].mean() / max(size[keys + rope_dim :].mean() * balance, 1e-30) or 1.0
    scale = np.concatenate([np.full(keys, ratio), np.ones(values)])
    vectors = np.linalg.eigh(moment / np.outer(scale, scale))[1][:, ::-1][:, :rank]
    encode, decode = vectors / scale[:, None], vectors * scale[:, None]

    def last(x: np.ndarray, matrix: np.ndarray) -> np.ndarray:
        return np.concatenate([x[..., :rope_dim], x[..., rope_dim:] @ matrix], -1)

    return Latent(
        down=last(latent.down, encode),
        bias=None if latent.bias is None else last(latent.bias, encode),
        k_up=last(latent.k_up, decode),
        v_up=np.einsum("cr,hcd->hrd", decode, latent.v_up),
    )


def with_latent(weights: Params, config: Config, latent: Latent) -> Params:
    """A layer's parameters with its attention replaced; `config` is the converted one."""
    dtype = weights["q_proj"].dtype
    parts = {"kv_down": latent.down, "kv_bias": latent.bias, "k_up": latent.k_up, "v_up": latent.v_up}
    new = {name: jnp.asarray(x, dtype) for name, x in parts.items() if x is not None}
    return {name: new[name] if name in new else weights[name] for name in layer_names(config)}


def _float64(x: Array) -> np.ndarray:
    return np.asarray(jax.device_get(x)).astype(np.float64)


@functools.partial(jax.jit, static_argnames=("config", "spec"))
def _layer(weights: Params, x: Array, pos: Array, *, config: Config, spec: LayerSpec) -> tuple[Array, Array]:
    """One layer on part of the text, and the sum of `k k^T` over unrotated keys (of all heads together), float32."""

    def attend(spec: LayerSpec, state: None, new: Tokens, shared: None):
        out, _, shared = plain_attend(spec, state, new, shared)
        k = jnp.moveaxis(new.k_raw.astype(jnp.float32), 2, 1)
        k = jnp.where(new.pos[..., None, None] == EMPTY, 0.0, k).reshape(-1, k.shape[2] * k.shape[3])
        return out, jnp.matmul(k.T, k, precision=lax.Precision.HIGHEST), shared

    x, moment, _ = run_layer(weights, config, spec, x, pos, None, None, attend)
    return x, moment


def _advance(
    weights: Params, config: Config, layer: int, text: list[tuple[Array, Array]]
) -> tuple[np.ndarray, list[tuple[Array, Array]]]:
    """One layer on the whole text, piece by piece: (hidden states, positions) of each."""
    spec, moment, out = layer_spec(config, layer), 0.0, []
    for x, pos in text:
        x, part = _layer(weights, x, pos, config=config, spec=spec)
        moment = moment + _float64(part)
        out.append((x, pos))
    return np.asarray(moment), out


@functools.partial(jax.jit, static_argnames="config")
def _loss(params: Params, config: Config, x: Array, tokens: Array, pos: Array) -> tuple[Array, Array]:
    """Sum and number of the negative log-likelihoods of next tokens, from final hidden states [B, T, hidden]."""

    def row(xs: tuple[Array, Array, Array]) -> Array:
        x, tokens, pos = xs
        log_p = jax.nn.log_softmax(unembed(params, config, x[:-1]))
        found = jnp.take_along_axis(log_p, tokens[1:, None], -1)[:, 0]
        return -jnp.where(pos[1:] == EMPTY, 0.0, found).sum()

    return lax.map(row, (x, tokens, pos)).sum(), (pos[:, 1:] != EMPTY).sum()


def _best_fold(loss: Callable[[int], float], folds: list[int]) -> int:
    """The last of a series before the loss gets worse."""
    best, least = folds[0], loss(folds[0]) if len(folds) > 1 else 0.0
    for fold in folds[1:]:
        found = loss(fold)
        if not found < least:
            break
        best, least = fold, found
    return best


def _folds(config: Config, rope_dim: int) -> list[int]:
    """What FreqFold may be: doubling, from the least that leaves one pair per frequency."""
    if rope_dim == config.num_kv_heads * config.rope.rotary_dim:
        return [1]  # Everything rotates: nothing to gain.
    fold, folds = max(1, *(rope.rotary_dim // rope_dim for rope in _ropes(config))), []
    while all(rope.rotary_dim // 2 % fold == 0 for rope in _ropes(config)):
        folds.append(fold)
        fold *= 2
    return folds


def _ropes(config: Config) -> set[Rope]:
    return {config.layer_rope(layer) for layer in range(config.num_layers)}


def _check(config: Config, rank: int, rope_dim: int, freqfold: int | None) -> None:
    if config.mla:
        raise ValueError("This model has latent attention already; convert the original with the sizes you want.")
    for rope in _ropes(config):
        least = max(rope.rotary_dim // max(rope_dim, 1), 1)
        if not Mla(rank, rope_dim).fits(rope) or rope_dim > config.num_kv_heads * rope.rotary_dim:
            raise ValueError(
                f"rope_dim={rope_dim} does not fit: in each of {config.num_kv_heads} KV heads {rope.rotary_dim} "
                f"channels rotate, so it must be even, and {rope.rotary_dim} divided by a whole number, or times one "
                f"up to {config.num_kv_heads}."
            )
        if freqfold is None and (rope.rotary_dim // 2) % least == 0:
            continue
        if freqfold is None or freqfold < 1 or freqfold % least or (rope.rotary_dim // 2) % freqfold:
            raise ValueError(
                f"freqfold={freqfold} does not fit: it must be a multiple of {least} (rotary_dim / rope_dim) and "
                f"divide {rope.rotary_dim // 2}, the number of frequencies."
            )
    full = full_rank(config, rope_dim)
    if not 1 <= rank <= full:
        raise ValueError(
            f"rank={rank} does not fit: with rope_dim={rope_dim}, {full} other channels are in this model's keys and "
            "values, so rank must be between 1 and that; at that rank nothing is lost."
        )
