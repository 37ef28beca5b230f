"""Trains DuoAttention's gates: which KV heads retrieve, and which do with sinks and recent tokens.

    task = passkeys(model.tokenizer, text, length=1024)
    gates = train_gates(model.params, model.config, task, "runs/duo")
    save_gates("gates.tsv", gates)
    policy = kvjax.policy("duo_attention", "gates.tsv", retrieval=0.5)

Every KV head of a full-attention layer has a gate in [0, 1] that mixes full and streaming attention. The model is
frozen; its own last hidden states are the target, at the tokens of questions and answers behind a long context with
passkeys in it. A penalty on the gates makes every head stream that can (Xiao et al., DuoAttention, arXiv 2410.10819,
sections 2.2 and 2.3).

Differs from the paper, as the authors' code does: the student mixes in the teacher's full attention, not that of its
own keys and values (`full="student"` for the paper's); questions count as labelled, not passkeys alone.
"""

import dataclasses
import functools
import math
import os
import pathlib
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax

from kvjax.cache import EMPTY, LayerSpec, Tokens
from kvjax.checkpoints import Tokenizer
from kvjax.kernels.parts import attend_part, dot_keys, dot_values, fold, unfold
from kvjax.kernels.prefill import BLOCK, causal_attention
from kvjax.models.config import Config
from kvjax.models.transformer import Params, embed, positions, rms_norm, run_layers
from kvjax.training.loop import load_state, train

Ids = tuple[int, ...]
Full = Literal["teacher", "student"]

# The authors' words and sentences.
WORDS = (
    "alpha bravo charlie delta echo foxtrot golf hotel india juliett kilo lima mike november oscar papa quebec romeo "
    "sierra tango uniform victor whiskey xray yankee zulu"
).split()
ORDINALS = (
    "first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth thirteenth fourteenth fifteenth "
    "sixteenth seventeenth eighteenth nineteenth twentieth"
).split()
NEEDLE = "Remember this sequence of words, it's the {ordinal} passkey to the vault:"
QUESTION = "Based on the content of the book, what is the {ordinal} passkey to the vault?\nPasskey:"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Passkeys:
    """Contexts with passkeys in them, and questions for each behind; all in token ids.

    Attributes:
      start: What a context begins with. haystack: The text around the passkeys. end: What ends the context.
      needles: What introduces each passkey in the context, and questions: what asks for it.
      separator: Around passkeys, and behind answers.
      words: What passkeys are made of. size: Words of a passkey.
      least, length: Shortest and longest prompt, in tokens; those in between are padded.
      depths: Part of the context in which passkeys lie, (0, 1) for all of it.
      batch: Prompts of a batch.
      seed: Of everything that is drawn.
    """

    start: Ids
    haystack: Ids
    end: Ids
    needles: tuple[Ids, ...]
    questions: tuple[Ids, ...]
    separator: Ids
    words: tuple[Ids, ...]
    size: int
    least: int
    length: int
    depths: tuple[float, float] = (0.05, 0.95)
    batch: int = 1
    seed: int = 0

    def __post_init__(self):
        longest = self.length - self._hay(self.length)
        if self._hay(self.least) < 0 or self.least > self.length:
            raise ValueError(
                f"Passkeys and questions take up to {longest} tokens: prompts of {self.least} to {self.length} have no "
                "room for them. Use longer prompts, fewer passkeys or shorter ones."
            )
        if len(self.haystack) < self._hay(self.length):
            raise ValueError(
                f"The text has {len(self.haystack)} tokens, and a prompt of {self.length} needs "
                f"{self._hay(self.length)} of it."
            )

    def _hay(self, length: int) -> int:
        """Tokens of text in a prompt of at most `length`."""
        word = max(len(word) for word in self.words)
        around = sum(len(x) + self.size * word for x in self.needles + self.questions)
        return length - len(self.start) - len(self.end) - around - 3 * len(self.needles) * len(self.separator)

    def sample(self, rng: np.random.Generator) -> tuple[list[int], int]:
        """One prompt's ids, and where its questions begin."""
        hay = self._hay(int(rng.integers(self.least, self.length + 1)))
        first = int(rng.integers(0, len(self.haystack) - hay + 1))
        text = self.haystack[first : first + hay]
        keys = [
            [i for word in rng.integers(0, len(self.words), self.size) for i in self.words[word]] for _ in self.needles
        ]
        cuts = np.sort(rng.uniform(*self.depths, len(keys)) * len(text)).astype(int)
        ids, before = list(self.start), 0
        for cut, needle, key in zip(cuts.tolist(), self.needles, keys, strict=True):
            ids += [*text[before:cut], *self.separator, *needle, *key, *self.separator]
            before = cut
        ids += [*text[before:], *self.end]
        context = len(ids)
        for question, key in zip(self.questions, keys, strict=True):
            ids += [*question, *key, *self.separator]
        return ids, context

    def __call__(self, step: int) -> tuple[Array, Array, Array]:
        """The batch of one step: tokens [B, length] int32, lengths [B] int32, labelled [B, length] bool."""
        rng = np.random.default_rng([self.seed, step])
        tokens, lengths = np.zeros((self.batch, self.length), np.int32), np.zeros(self.batch, np.int32)
        labelled = np.zeros(tokens.shape, bool)
        for row in range(self.batch):
            ids, context = self.sample(rng)
            tokens[row, : len(ids)], lengths[row] = ids, len(ids)
            labelled[row, context : len(ids)] = True
        return jnp.asarray(tokens), jnp.asarray(lengths), jnp.asarray(labelled)


def passkeys(
    tokenizer: Tokenizer,
    text: str,
    *,
    length: int,
    least: int | None = None,
    keys: int = 10,
    size: int = 32,
    batch: int = 1,
    seed: int = 0,
) -> Passkeys:
    """The authors' task in a model's own tokens.

    Args:
      tokenizer: Of the model. text: The haystack, any long text.
      length, least: Longest and shortest prompt in tokens; the shortest is half of the longest by default.
      keys: Passkeys of a prompt, at most 20. size: Words of a passkey.
      batch, seed: See `Passkeys`.

    Raises:
      ValueError: Passkeys do not fit the prompts, or the text is too short.
    """
    if not 1 <= keys <= len(ORDINALS):
        raise ValueError(f"keys must be between 1 and {len(ORDINALS)}, got {keys}.")

    def ids(part: str) -> Ids:
        return tuple(tokenizer.encode(part, add_bos=False))

    return Passkeys(
        start=tuple(tokenizer.encode("This is a very long story book: <book> ")),
        haystack=ids(text),
        end=ids(" </book>.\n\n"),
        needles=tuple(ids(NEEDLE.format(ordinal=ordinal)) for ordinal in ORDINALS[:keys]),
        questions=tuple(ids(QUESTION.format(ordinal=ordinal)) for ordinal in ORDINALS[:keys]),
        separator=ids("\n\n"),
        words=tuple(ids(f" {word}") for word in WORDS),
        size=size,
        least=length // 2 if least is None else least,
        length=length,
        batch=batch,
        seed=seed,
    )


def full_attention(spec: LayerSpec, new: Tokens) -> Array:
    """Causal attention of a prompt over itself [B, H * G, T, D]."""
    return causal_attention(new.q, new.k, new.v, new.pos, scale=spec.scale, window=spec.window, softcap=spec.softcap)[0]


def gated_attention(
    spec: LayerSpec, new: Tokens, gates: Array, full: Array | None = None, *, sinks: int, recent: int
) -> Array:
    """`gate * full + (1 - gate) * streaming` [B, H * G, T, D] for gates [H]; `full` is its own unless given."""
    full = full_attention(spec, new) if full is None else full
    alpha = jnp.repeat(gates, new.q.shape[1] // new.k.shape[1])[:, None, None]
    return alpha * full + (1 - alpha) * streaming_attention(spec, new, sinks=sinks, recent=recent)


def streaming_attention(spec: LayerSpec, new: Tokens, *, sinks: int, recent: int, block: int = BLOCK) -> Array:
    """Attention of a prompt whose queries see the first `sinks` tokens and the last `recent`, themselves included.

    Args:
      new: Positions are 0, 1, ... and `EMPTY` for padding at the end.
      block: Queries at once; a block meets the sinks and the keys from `recent` before it.

    Returns:
      [B, H * G, T, D] float32.
    """
    q, k, v, pos = new.q * spec.scale, new.k, new.v, new.pos
    batch, heads, length, dim = q.shape
    kv_heads, block = k.shape[1], min(block, length)
    extra = -length % block
    reach = min(recent - 1 + block, length + extra)
    pad = lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, extra), (0, 0)))  # noqa: E731
    q, k, v = pad(q), pad(k), pad(v)
    k_pos = jnp.pad(pos, ((0, 0), (0, extra)), constant_values=EMPTY)

    @jax.checkpoint
    def one(start: Array) -> Array:
        first = jnp.maximum(start + block - reach, 0)
        q_pos = lax.dynamic_slice_in_dim(k_pos, start, block, 1)
        near = lambda x, axis: lax.dynamic_slice_in_dim(x, first, reach, axis)  # noqa: E731
        keys, values = (jnp.concatenate([x[:, :, :sinks], near(x, 2)], 2) for x in (k, v))
        # A sink that is near is met as a sink, not twice.
        near_pos = jnp.where(near(k_pos, 1) < sinks, EMPTY, near(k_pos, 1))
        seen = jnp.concatenate([k_pos[:, :sinks], near_pos], 1)[:, None, :]
        age = q_pos[..., None] - seen
        mask = (seen != EMPTY) & (age >= 0) & ((age < recent) | (seen < sinks))
        rows = fold(lax.dynamic_slice_in_dim(q, start, block, 2), kv_heads)
        part = attend_part(dot_keys(rows, keys), mask[:, None], lambda p: dot_values(p, values), spec.softcap)
        return unfold(part.out, block)

    out = lax.map(one, jnp.arange(0, length + extra, block))  # [blocks, B, H * G, block, D].
    return jnp.moveaxis(out, 0, 2).reshape(batch, heads, length + extra, dim)[:, :, :length]


def hidden_states(
    params: Params,
    config: Config,
    gates: Array | None,
    tokens: Array,
    lengths: Array,
    targets: Sequence[Array | None],
    *,
    sinks: int,
    recent: int,
) -> tuple[Array, tuple[Any, ...]]:
    """Last hidden states [B, T, hidden], normed, and every layer's attention output.

    Args:
      gates: [full-attention layers, H]; None for the model as it is.
      targets: What each gated layer takes for its full attention [B, H * G, T, D]; None for its own.
    """
    pos = positions(tokens, lengths)
    gate = iter(()) if gates is None else iter(gates)
    states = [next(gate, None) if kind == "full" else None for kind in config.layer_types]

    def attend(spec: LayerSpec, state: Any, new: Tokens, shared: Any):
        own, target = state
        if own is None:
            out = full_attention(spec, new)
        else:
            out = gated_attention(spec, new, own, target, sinks=sinks, recent=recent)
        return out, out, shared

    x, outputs, _ = run_layers(
        params, config, embed(params, config, tokens), pos, tuple(zip(states, targets, strict=True)), None, attend
    )
    return rms_norm(x, params["final_norm"], config), outputs


def duo_loss(
    params: Params,
    config: Config,
    gates: Array,
    tokens: Array,
    lengths: Array,
    labelled: Array,
    *,
    sinks: int,
    recent: int,
    weight: float = 0.05,
    full: Full = "teacher",
) -> tuple[Array, dict[str, Array]]:
    """Squared distance to the model's own hidden states, mean over labelled tokens, plus `weight * mean |gates|`.

    Args:
      gates: [full-attention layers, H] float32 in [0, 1].
      tokens, lengths, labelled: As `Passkeys` makes them.
      full: Whose full attention a gate mixes in.

    Returns:
      The loss, and its parts by name.
    """
    run = functools.partial(hidden_states, params, config, sinks=sinks, recent=recent)
    nothing = (None,) * config.num_layers
    want, outputs = lax.stop_gradient(run(None, tokens, lengths, nothing))
    found, _ = run(gates, tokens, lengths, outputs if full == "teacher" else nothing)
    distance = jnp.square(want.astype(jnp.float32) - found.astype(jnp.float32)).mean(-1)
    distill = jnp.where(labelled, distance, 0.0).sum() / jnp.maximum(labelled.sum(), 1)
    penalty = jnp.abs(gates).mean()
    return distill + weight * penalty, {"distill": distill, "gates": penalty}


def schedule(rate: float, steps: int) -> optax.Schedule:
    """The authors': up over the first fifth, down over the last, never below a tenth."""
    fifth = max(steps // 5, 1)

    def at(step: Any) -> Array:
        up, down = (step + 1) / fifth, (steps - step) / fifth
        return rate * jnp.minimum(1.0, jnp.minimum(jnp.maximum(up, 0.1), jnp.maximum(down, 0.1)))

    return at


@functools.partial(
    jax.jit,
    static_argnames=("config", "rate", "steps", "sinks", "recent", "weight", "full"),
    donate_argnames="state",
)
def _step(params, config, state, batch, *, rate, steps, sinks, recent, weight, full):
    def loss(gates):
        return duo_loss(params, config, gates, *batch, sinks=sinks, recent=recent, weight=weight, full=full)

    (value, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(state["gates"])
    updates, optimizer = optax.adam(schedule(rate, steps)).update(gradient, state["optimizer"], state["gates"])
    gates = jnp.clip(jnp.asarray(optax.apply_updates(state["gates"], updates)), 0.0, 1.0)
    return {"gates": gates, "optimizer": optimizer}, {"loss": value, **metrics}


def train_gates(
    params: Params,
    config: Config,
    batches: Any,
    folder: str | os.PathLike[str],
    *,
    steps: int = 2000,
    rate: float = 0.02,
    weight: float = 0.05,
    sinks: int = 128,
    recent: int = 256,
    initial: float = 1.0,
    full: Full = "teacher",
    every: int = 50,
    show: bool = True,
) -> np.ndarray:
    """Trains the gates of a frozen model; a run that was stopped goes on where it was.

    Args:
      params, config: The model.
      batches: Step -> tokens, lengths, labelled: a `Passkeys`, or any function like it.
      folder: Of the run: checkpoints (Orbax) and `log.jsonl`.
      steps, rate, weight: As in the authors' runs (their function's defaults are 1,000 steps at 0.1).
      sinks, recent: What a streaming head sees while training, in tokens.
      initial: First value of all gates.
      full: See `duo_loss`.
      every: Steps between checkpoints.
      show: A progress bar.

    Returns:
      Gates [full-attention layers, H] float32.

    Raises:
      ValueError: The model has nothing to gate, or a number makes no sense.
      TrainingError: The folder holds another run, or the loss is not finite.
    """
    layers = len(config.full_layers)
    if not layers:
        raise ValueError("Gates are for full-attention layers, and this model has none.")
    if config.mla is not None:
        raise ValueError("Latent attention keeps one key for all heads: there is nothing to gate. Train before.")
    if sinks < 1 or recent < 1 or not 0 <= initial <= 1 or weight < 0 or rate <= 0:
        raise ValueError(
            f"sinks and recent must be positive, initial in [0, 1], weight at least 0 and rate positive; got "
            f"sinks={sinks}, recent={recent}, initial={initial}, weight={weight}, rate={rate}."
        )
    gates = jnp.full((layers, config.cache_heads), initial, jnp.float32)
    state = {"gates": gates, "optimizer": optax.adam(schedule(rate, steps)).init(gates)}
    options = {"rate": rate, "steps": steps, "sinks": sinks, "recent": recent, "weight": weight, "full": full}

    def step(state: Any, batch: Any):
        return _step(params, config, state, batch, **options)

    settings = {**options, "initial": initial}
    state = train(step, state, batches, steps, folder, every=every, settings=settings, show=show)
    return np.asarray(state["gates"])


def load_gates(folder: str | os.PathLike[str], config: Config) -> np.ndarray:
    """Gates [full-attention layers, H] of a run's newest checkpoint.

    Raises:
      TrainingError: There is none, or it is of a model of other shapes.
    """
    gates = jnp.zeros((len(config.full_layers), config.cache_heads), jnp.float32)
    _, state = load_state(folder, {"gates": gates, "optimizer": optax.adam(schedule(1.0, 1)).init(gates)})
    return np.asarray(state["gates"])


def save_gates(path: str | os.PathLike[str], gates: Any) -> None:
    """Writes gates [layers, H] as `duo_attention` reads them: a line per layer, numbers with tabs between, as the
    authors publish theirs."""
    gates = np.asarray(gates, np.float64)
    if gates.ndim != 2 or not all(map(math.isfinite, gates.ravel())):
        raise ValueError(f"Gates are finite numbers [layers, heads], got {gates.shape}.")
    np.savetxt(pathlib.Path(path), gates, fmt="%.6f", delimiter="\t")
