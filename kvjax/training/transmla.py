"""Tunes a model with latent attention on what the model that it was converted from says.

    params, config = kvjax.convert.transmla(model.params, model.config, tokens, rank=128, rope_dim=32)
    params = distill((model.params, model.config), (params, config), batches, "runs/mla", steps=500)

Conversion is training-free and loses what rotation and channels it takes away; a short training brings much of it back
(Meng et al., TransMLA, arXiv 2502.07864, section 5). Here the original model is the teacher: the loss is the divergence
of the student's next-token distribution from the teacher's.

Differs from the paper, which goes on with pretraining of all parameters on 0.5 to 6 billion tokens: only the
attention's parameters are trained, on the teacher's distribution instead of the text.
"""

import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from kvjax.models.config import Config
from kvjax.models.params import layer_params
from kvjax.models.transformer import Params, forward
from kvjax.training.loop import train

Model = tuple[Params, Config]
TRAINED = ("q_proj", "q_bias", "kv_down", "kv_bias", "k_up", "v_up", "o_proj")


def distill(
    teacher: Model,
    student: Model,
    batches: Callable[[int], tuple[Array, Array]],
    folder: str | os.PathLike[str],
    *,
    steps: int,
    rate: float = 1e-3,
    warmup: int = 20,
    every: int = 100,
    show: bool = True,
) -> Params:
    """Trains the attention of a converted model; everything else stays as it is.

    Args:
      teacher: Parameters and config of the original.
      student: Of the converted model.
      batches: `batches(i)` gives tokens [B, T] int32, right-padded, and lengths [B] int32 of step i. Equal shapes share
        a compilation.
      folder: For checkpoints and the log (`training.train`); a run that was stopped goes on.
      steps: In all.
      rate: Highest learning rate of Adam; falls to zero along a cosine after `warmup` steps.
      every: Steps between checkpoints.
      show: A progress bar.

    Returns:
      The student's parameters, one dict per layer, in the dtype they had.

    Raises:
      ValueError: The student has no latent attention, or steps are fewer than `warmup`.
      TrainingError: As `training.train`.
    """
    params, config = student
    if config.mla is None:
        raise ValueError("The student has no latent attention: convert the teacher first (`kvjax.convert.transmla`).")
    if steps <= warmup:
        raise ValueError(f"steps ({steps}) must be more than warmup ({warmup}).")
    params = {**params, "layers": layer_params(params, config)}
    weights = tuple(
        {name: layer[name].astype(jnp.float32) for name in TRAINED if name in layer} for layer in params["layers"]
    )
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, warmup, steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))

    @jax.jit
    def step(state: Any, batch: tuple[Array, Array]):
        tokens, lengths = batch
        target = forward(*teacher, tokens, lengths)
        loss, gradient = jax.value_and_grad(
            lambda weights: divergence(target, forward(_with(params, weights), config, tokens, lengths), lengths)
        )(state["weights"])
        updates, optimizer_state = optimizer.update(gradient, state["optimizer"])
        weights = optax.apply_updates(state["weights"], updates)
        return {"weights": weights, "optimizer": optimizer_state}, {"loss": loss}

    state = {"weights": weights, "optimizer": optimizer.init(weights)}
    settings = {"rate": rate, "warmup": warmup, "steps": steps}
    state = train(step, state, batches, steps, folder, every=every, settings=settings, show=show)
    return _with(params, state["weights"])


def divergence(teacher: Array, student: Array, lengths: Array) -> Array:
    """KL divergence of the student's distributions from the teacher's, in nats, mean over tokens that are there.

    Args:
      teacher, student: Logits [B, T, vocab] float32. lengths: Tokens of each row [B].
    """
    log_p, log_q = jax.nn.log_softmax(teacher), jax.nn.log_softmax(student)
    each = (jnp.exp(log_p) * (log_p - log_q)).sum(-1)
    there = jnp.arange(each.shape[1]) < lengths[:, None]
    return jnp.where(there, each, 0.0).sum() / jnp.maximum(there.sum(), 1)


def _with(params: Params, weights: Any) -> Params:
    """The parameters with those of the attention replaced, in their dtype."""
    layers = tuple(
        {**layer, **{name: x.astype(layer[name].dtype) for name, x in new.items()}}
        for layer, new in zip(params["layers"], weights, strict=True)
    )
    return {**params, "layers": layers}
