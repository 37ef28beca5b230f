"""Trains Locret's retaining heads: small MLPs that say of a token what it will be worth to queries that come later.

    heads = train_retaining_heads(model.params, model.config, batches, "runs/locret")
    save_retaining_heads("heads", heads)
    params = with_retaining_heads(model.params, model.config, load_retaining_heads("heads"))
    cache = kvjax.prefill(params, model.config, kvjax.policy("locret", 6000), tokens)

An example is a prompt with its answer. The frozen model runs over both once; the largest scaled logit that a token of
the prompt gets from any query of the answer and of the query group is its target (Huang et al., arXiv 2410.01805,
section 3.2). Smooth L1 loss, and a small penalty on how much neighbouring tokens' scores differ (equations 3 and 4).
Nothing flows back into the model.

Defaults are the paper's: 3,000 steps of one example, AdamW at 5e-4 with a linear warm-up over two thirds of the steps
and a linear decay after, gradients clipped to 0.5 each. As in the authors' code the penalty is summed over layers while
the loss is their mean. Differs from the authors' code: targets are computed along with the scores, in float32, instead
of beforehand in bfloat16; prompts and answers of a batch may differ in length, and each prompt counts alike.
"""

import functools
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from kvjax.cache import LayerSpec, Tokens
from kvjax.cache.slots import take_slots
from kvjax.checkpoints.orbax import load_pytree, save_pytree
from kvjax.kernels.parts import dot_keys, fold
from kvjax.kernels.prefill import causal_attention
from kvjax.methods.locret import RetainingHead
from kvjax.models.config import Config
from kvjax.models.params import layer_params
from kvjax.models.transformer import Params, embed, positions, run_layers
from kvjax.training.loop import train

Heads = tuple[dict[str, Array], ...]
SHARE = 0.1  # Of the tokens that "overlap" compares.


class Examples(NamedTuple):
    """A batch of prompts with their answers.

    Attributes:
      tokens: Ids [B, T] int32: a prompt, its answer behind it, padding.
      prompt: Tokens of each prompt [B] int32.
      length: Tokens of each prompt and answer together [B] int32.
    """

    tokens: Array
    prompt: Array
    length: Array


def init_retaining_heads(config: Config, key: Array, hidden: int = 1024, dtype: Any = jnp.float32) -> Heads:
    """Random heads, one per full-attention layer.

    Returns:
      Per layer w1 [(H * G + 2 * H) * D, hidden] and w2 [hidden, H], uniform within 1 / sqrt(fan-in).
    """
    channels = config.num_heads * config.key_dim + config.cache_heads * (config.key_dim + config.value_dim)

    def draw(key: Array, rows: int, columns: int) -> Array:
        return jax.random.uniform(key, (rows, columns), dtype, -(rows**-0.5), rows**-0.5)

    keys = jax.random.split(key, (len(config.full_layers), 2))
    return tuple({"w1": draw(a, channels, hidden), "w2": draw(b, hidden, config.cache_heads)} for a, b in keys)


def with_retaining_heads(params: Params, config: Config, heads: Sequence[dict[str, Array]]) -> Params:
    """The model with its heads, one dict per layer.

    Raises:
      ValueError: There are not as many heads as full-attention layers.
    """
    if len(heads) != len(config.full_layers):
        raise ValueError(
            f"{len(heads)} retaining heads for {len(config.full_layers)} full-attention layers: they belong to another "
            "model."
        )
    layers = list(layer_params(params, config))
    for layer, head in zip(config.full_layers, heads, strict=True):
        layers[layer] = {**layers[layer], "trained": {**layers[layer].get("trained", {}), RetainingHead.name: head}}
    return {**params, "layers": tuple(layers)}


def save_retaining_heads(path: str | os.PathLike[str], heads: Heads, *, overwrite: bool = False) -> None:
    """Saves heads as an Orbax folder; see `kvjax.checkpoints.orbax.save_pytree`."""
    save_pytree(path, tuple(heads), overwrite=overwrite)


def load_retaining_heads(path: str | os.PathLike[str]) -> Heads:
    """Loads what `save_retaining_heads` saved."""
    return load_pytree(path)


def causal_importance(new: Tokens, spec: LayerSpec, prompt: Array, length: Array, longest: int) -> Array:
    """The largest scaled logit of each key from the answers' queries [B, H, T] float32.

    Args:
      new: Prompts and answers.
      prompt, length: As in `Examples`.
      longest: Tokens of an answer that are looked at.
    """
    heads, width = new.k.shape[1], new.k.shape[2]
    index = prompt[:, None] + jnp.arange(longest, dtype=jnp.int32)
    q = take_slots(new.q, jnp.minimum(index, width - 1)[:, None])
    logits = dot_keys(fold(q * spec.scale, heads), new.k).reshape(*new.k.shape[:2], -1, longest, width)
    return jnp.where((index < length[:, None])[:, None, None, :, None], logits, -jnp.inf).max((2, 3))


def retaining_loss(
    heads: Heads,
    params: Params,
    config: Config,
    examples: Examples,
    *,
    longest: int = 64,
    smooth: float = 0.0025,
    activation: str = "silu",
) -> tuple[Array, dict[str, Array]]:
    """Loss, and metrics: "loss", "fit" (without the penalty), and "overlap", the part of the most important tenth of
    the tokens that the heads' own top tenth holds.

    Args:
      heads: Differentiate with respect to these.
      params, config: The frozen model.
      examples: A batch.
      longest: Tokens of an answer that are looked at.
      smooth: Weight of the penalty.
      activation: See `RetainingHead`.
    """
    head = RetainingHead(activation)

    def attend(spec: LayerSpec, state: Any, new: Tokens, shared: Any) -> tuple[Array, Any, Any]:
        out, _ = causal_attention(
            new.q, new.k, new.v, new.pos, scale=spec.scale, window=spec.window, softcap=spec.softcap
        )
        if not new.trained:
            return out, None, shared
        target = causal_importance(new, spec, examples.prompt, examples.length, longest)
        return out, (head(new), target), shared

    params = with_retaining_heads(params, config, heads)
    pos = positions(examples.tokens, examples.length)
    x = embed(params, config, examples.tokens)
    _, states, _ = run_layers(params, config, x, pos, (None,) * config.num_layers, None, attend)
    scores, targets = (jnp.stack(x, 1) for x in zip(*(s for s in states if s is not None), strict=True))
    inside = jnp.arange(scores.shape[-1]) < examples.prompt[:, None, None, None]  # Both are [B, L, H, T].
    fit = optax.losses.huber_loss(scores, jnp.where(inside, targets, 0.0), delta=1.0)
    fit = _mean(fit, inside).mean()
    rough = _mean((scores[..., 1:] - scores[..., :-1]) ** 2, inside[..., 1:]).mean(2).sum(1).mean()
    loss = fit + smooth * rough
    return loss, {"loss": loss, "fit": fit, "overlap": _overlap(scores, targets, inside).mean()}


def train_retaining_heads(
    params: Params,
    config: Config,
    batches: Callable[[int], Examples],
    folder: str | os.PathLike[str],
    *,
    steps: int = 3000,
    hidden: int = 1024,
    rate: float = 5e-4,
    warmup: float = 2 / 3,
    longest: int = 64,
    smooth: float = 0.0025,
    activation: str = "silu",
    seed: int = 0,
    every: int = 100,
    log_every: int = 10,
    show: bool = True,
) -> Heads:
    """Trains retaining heads; stops and goes on at any moment (see `kvjax.training.train`).

    Args:
      params, config: The model, which stays as it is.
      batches: `batches(i)` is the batch of step i. Batches of one shape share a compilation.
      folder: For checkpoints and the log.
      steps: In all.
      hidden: Width of the MLPs.
      rate: Highest learning rate, reached after the share `warmup` of the steps.
      longest: Tokens of an answer that are looked at.
      smooth: Weight of the penalty on differences between neighbours.
      activation: Of the MLPs.
      seed: Of their first weights.
      every, log_every, show: See `kvjax.training.train`.

    Raises:
      ValueError: The model has no full-attention layer, or its attention is latent.
      TrainingError: See `kvjax.training.train`.
    """
    if config.mla is not None or not config.full_layers:
        raise ValueError("Retaining heads rate the KV heads of full-attention layers, and this model has none.")
    ramp = max(round(steps * warmup), 1)
    schedule = optax.join_schedules(
        [optax.linear_schedule(0.0, rate, ramp), optax.linear_schedule(rate, 0.0, max(steps - ramp, 1))], [ramp]
    )
    optimizer = optax.chain(optax.clip(0.5), optax.adamw(schedule, b1=0.9, b2=0.95, weight_decay=0.01))
    loss = functools.partial(retaining_loss, longest=longest, smooth=smooth, activation=activation)

    @functools.partial(jax.jit, donate_argnums=0)
    def update(state: Any, params: Params, examples: Examples) -> tuple[Any, dict[str, Array]]:
        heads, optimizer_state = state
        gradients, metrics = jax.grad(loss, has_aux=True)(heads, params, config, examples)
        updates, optimizer_state = optimizer.update(gradients, optimizer_state, heads)
        return (optax.apply_updates(heads, updates), optimizer_state), metrics

    heads = init_retaining_heads(config, jax.random.key(seed), hidden)
    settings = {
        "steps": steps,
        "hidden": hidden,
        "rate": rate,
        "warmup": warmup,
        "longest": longest,
        "smooth": smooth,
        "activation": activation,
        "seed": seed,
    }
    return train(
        lambda state, examples: update(state, params, examples),
        (heads, optimizer.init(heads)),
        batches,
        steps,
        folder,
        every=every,
        log_every=log_every,
        settings=settings,
        show=show,
    )[0]


def _mean(x: Array, where: Array) -> Array:
    """Over the last axis, where true."""
    return jnp.where(where, x, 0.0).sum(-1) / jnp.maximum(where.sum(-1), 1)


def _overlap(scores: Array, targets: Array, inside: Array) -> Array:
    """Part of the top `SHARE` of targets that is in the top of scores, over the last axis."""
    number = jnp.maximum(inside.sum(-1, keepdims=True) * SHARE, 1.0)

    def top(x: Array) -> Array:
        order = jnp.argsort(jnp.where(inside, -x, jnp.inf), axis=-1, stable=True)
        return jnp.argsort(order, axis=-1) < number

    wanted = top(targets)
    return (top(scores) & wanted).sum(-1) / wanted.sum(-1)
