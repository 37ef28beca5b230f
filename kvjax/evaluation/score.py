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
from kvjax.generation import Sampler, decode, extend_hidden
from kvjax.model import Model
from kvjax.models.config import Config
from kvjax.models.transformer import Params, unembed

ROWS = 16  # Tokens whose logits exist at once.
FED = 32  # Tokens that are fed at once.
PIECE = 16  # Tokens that are written at once.


def feed(model: Model, cache: Cache, ids: Sequence[int]) -> tuple[np.ndarray, Cache]:
    """Feeds tokens to the cache of one sequence, in pieces of one size: one compilation serves texts of all lengths.

    Args:
      cache: With room for the tokens.
      ids: The tokens.

    Returns:
      Final hidden states [len(ids), hidden] and the new cache.
    """
    states = []
    for start in range(0, len(ids), FED):
        piece = ids[start : start + FED]
        tokens = np.zeros((1, FED), np.int32)
        tokens[0, : len(piece)] = piece
        valid = np.arange(FED)[None] < len(piece)
        x, cache = extend_hidden(model.params, model.config, cache.policy, cache, tokens, valid)
        states.append(np.asarray(x)[0, : len(piece)])
    return np.concatenate(states), cache


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
def _divergences(params: Params, config: Config, x: Array, reference: Array) -> tuple[Array, Array]:
    def rows(args: tuple[Array, Array]) -> tuple[Array, Array]:
        log_q, log_p = (jax.nn.log_softmax(unembed(params, config, x), -1) for x in args)
        kl = jnp.sum(jnp.exp(log_p) * (log_p - log_q), -1)
        return kl, jnp.argmax(log_q, -1) == jnp.argmax(log_p, -1)

    return lax.map(rows, (x, reference))


@dataclasses.dataclass(frozen=True)
class Likelihood:
    """Of one answer.

    Attributes:
      logs: Natural logs of its tokens' probabilities [tokens] float64.
      greedy: Whether greedy decoding writes exactly this.
    """

    logs: np.ndarray
    greedy: bool

    @property
    def log(self) -> float:
        return float(self.logs.sum())

    @property
    def tokens(self) -> int:
        return len(self.logs)

    @property
    def nll(self) -> float:
        """Mean negative log-likelihood per token, in nats."""
        return -self.log / self.tokens


def likelihood(model: Model, x: np.ndarray, answer: Sequence[int]) -> Likelihood:
    """Of an answer, from the hidden states x [len(answer), hidden] that `follow` returns."""
    targets = _in_rows(np.asarray(answer, np.int32))
    log_p, best = _likelihoods(model.params, model.config, _in_rows(x), targets)
    number = len(answer)
    logs = np.asarray(log_p, np.float64).ravel()[:number]
    return Likelihood(logs, bool(np.asarray(best).ravel()[:number].all()))


def divergence(model: Model, x: np.ndarray, reference: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How predictions from hidden states x [N, hidden] differ from those of a reference [N, hidden].

    Returns:
      KL(reference || x) in nats [N] float64, and whether the likeliest token is the same [N] bool.
    """
    kl, same = _divergences(model.params, model.config, _in_rows(x), _in_rows(reference))
    return np.asarray(kl, np.float64).ravel()[: len(x)], np.asarray(same).ravel()[: len(x)]


def write(
    model: Model,
    cache: Cache,
    logits: Array,
    limit: int,
    sampler: Sampler = Sampler(),  # noqa: B008
    stop: Sequence[int] = (),
) -> list[int]:
    """Continues one sequence for `limit` tokens, or until one of `stop` is drawn.

    Args:
      cache: With room for `limit` tokens in multiples of `PIECE`; stays usable.
      logits: Of the first token [1, vocab]; stay usable.
      sampler: Greedy by default; what is drawn depends on logits and the place in the continuation alone.

    Returns:
      Token ids, without the one that ended them.
    """
    ids: list[int] = []
    cache, logits = jax.tree.map(jnp.copy, (cache, logits))  # Decoding takes them away.
    done = jnp.zeros(logits.shape[0], bool)
    while len(ids) < limit:
        key = jax.random.key(len(ids))
        tokens, _, logits, _, cache = decode(
            model.params, model.config, cache.policy, cache, logits, key, done, sampler=sampler, max_new_tokens=PIECE
        )
        piece = tokens[0].tolist()
        end = next((i for i, token in enumerate(piece) if token in stop), None)
        ids += piece[:end]
        if end is not None:
            break
    return ids[:limit]
