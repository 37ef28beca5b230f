"""What a cache knows: likelihoods of given tokens, and how far its predictions are from those of the full cache.

Teacher-forced: the tokens are fed, and every prediction on the way is looked at. Where each of them is the likeliest,
greedy decoding would have written them. The vocabulary may be large, so logits exist for a few tokens at a time only.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from kvjax.cache import Cache
from kvjax.generation import extend_hidden
from kvjax.model import Model, bucket
from kvjax.models.config import Config
from kvjax.models.transformer import Params, unembed

ROWS = 16  # Tokens whose logits exist at once; fed tokens are padded to multiples of it.


def padded(length: int) -> int:
    """The padded length of a question with its answer."""
    return bucket(length, ROWS)


def feed(model: Model, cache: Cache, ids: Sequence[int], length: int) -> tuple[np.ndarray, Cache]:
    """Feeds tokens to the cache of one sequence.

    Args:
      cache: With room for the tokens.
      ids: The tokens.
      length: They are padded to so many, so that different questions share a compilation.

    Returns:
      Final hidden states [len(ids), hidden] and the new cache.
    """
    tokens = np.zeros((1, length), np.int32)
    tokens[0, : len(ids)] = ids
    valid = jnp.arange(length)[None] < len(ids)
    x, cache = extend_hidden(model.params, model.config, cache.policy, cache, jnp.asarray(tokens), valid)
    return np.asarray(x)[0, : len(ids)], cache


def follow(model: Model, cache: Cache, question: Sequence[int], answer: Sequence[int]) -> np.ndarray:
    """Hidden states [len(answer), hidden] from which each token of the answer is predicted."""
    ids = [*question, *answer[:-1]]
    return feed(model, cache, ids, padded(len(ids)))[0][len(question) - 1 :]


def _in_rows(x: np.ndarray) -> np.ndarray:
    """[N, ...] -> [N / ROWS, ROWS, ...], padded with zeros."""
    pad = [(0, -len(x) % ROWS)] + [(0, 0)] * (x.ndim - 1)
    return np.pad(x, pad).reshape(-1, ROWS, *x.shape[1:])


@functools.partial(jax.jit, static_argnames="config")
def _likelihoods(params: Params, config: Config, x: Array, targets: Array) -> tuple[Array, Array]:
    def rows(args: tuple[Array, Array]) -> tuple[Array, Array]:
        x, targets = args
        logits = unembed(params, config, x)
        log_p = jnp.take_along_axis(logits, targets[:, None], 1)[:, 0] - jax.nn.logsumexp(logits, -1)
        return log_p, jnp.argmax(logits, -1) == targets

    return lax.map(rows, (x, targets))


@functools.partial(jax.jit, static_argnames="config")
def _log_probs(params: Params, config: Config, x: Array) -> Array:
    return lax.map(lambda x: jax.nn.log_softmax(unembed(params, config, x), -1), x)


@functools.partial(jax.jit, static_argnames="config")
def _divergences(params: Params, config: Config, x: Array, reference: Array) -> tuple[Array, Array]:
    def rows(args: tuple[Array, Array]) -> tuple[Array, Array]:
        x, log_p = args
        log_q = jax.nn.log_softmax(unembed(params, config, x), -1)
        kl = jnp.sum(jnp.exp(log_p) * (log_p - log_q), -1)
        return kl, jnp.argmax(log_q, -1) == jnp.argmax(log_p, -1)

    return lax.map(rows, (x, reference))


@dataclasses.dataclass(frozen=True)
class Likelihood:
    """Of one answer.

    Attributes:
      log: Natural log of its probability, summed over tokens.
      tokens: How many it has.
      greedy: Whether greedy decoding writes exactly this.
    """

    log: float
    tokens: int
    greedy: bool

    @property
    def nll(self) -> float:
        """Mean negative log-likelihood per token, in nats."""
        return -self.log / self.tokens


def likelihood(model: Model, x: np.ndarray, answer: Sequence[int]) -> Likelihood:
    """Of an answer, from the hidden states x [len(answer), hidden] that `follow` returns."""
    targets = _in_rows(np.asarray(answer, np.int32))
    log_p, best = _likelihoods(model.params, model.config, _in_rows(x), targets)
    number = len(answer)
    log_p = np.asarray(log_p, np.float64).ravel()[:number]
    return Likelihood(float(log_p.sum()), number, bool(np.asarray(best).ravel()[:number].all()))


def predictions(model: Model, x: np.ndarray) -> Array:
    """Log-probabilities [N / ROWS, ROWS, vocab] float32 after hidden states x [N, hidden], for `divergence`."""
    return _log_probs(model.params, model.config, _in_rows(x))


def divergence(model: Model, x: np.ndarray, reference: Array) -> tuple[float, float]:
    """How predictions from hidden states x [N, hidden] differ from the reference's `predictions`.

    Returns:
      Mean KL(reference || x) in nats per token, and the share of tokens where the likeliest is the same.
    """
    kl, same = _divergences(model.params, model.config, _in_rows(x), reference)
    number = len(x)
    kl, same = (np.asarray(value, np.float64).ravel()[:number].mean() for value in (kl, same))
    return float(kl), float(same)
