"""One policy is asked one question: how likely is the answer, what does it write, how far is it from the full cache?"""

import dataclasses
import math
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from kvjax.cache import Cache
from kvjax.evaluation.caches import compressed, sizes
from kvjax.evaluation.cases import Case, dtype_of
from kvjax.evaluation.kept import kept
from kvjax.evaluation.metrics import scores
from kvjax.evaluation.results import Row
from kvjax.evaluation.score import Likelihood, divergence, feed, likelihood, write
from kvjax.evaluation.tasks import Task
from kvjax.generation import Sampler
from kvjax.model import Model
from kvjax.models.transformer import unembed
from kvjax.policies import Observed, Policy, without_budget

CURVE = 32  # Pieces of a long text over which its divergence is shown.


@dataclasses.dataclass(frozen=True)
class Asked:
    """The cache of one sequence after the question.

    Attributes:
      cache: With room for answers.
      last: Hidden state of the question's last token [1, hidden].
      logits: Of the first token of an answer [1, vocab].
    """

    cache: Cache
    last: np.ndarray
    logits: Array


@dataclasses.dataclass(frozen=True)
class Path:
    """What the full cache writes, and the hidden states [tokens, hidden] from which it predicts each of its tokens."""

    ids: list[int]
    states: np.ndarray


def measure(
    model: Model, observed: Observed, task: Task, case: Case, policy: Policy, path: Path | None
) -> tuple[Row, Path]:
    """One policy's row. Without a path it is the full cache, and writes one."""
    start = time.perf_counter()
    plans, cache = compressed(model, observed, [case.prompt], policy, case.shape[1])
    jax.block_until_ready(cache)
    compress_s = time.perf_counter() - start
    asked = ask(model, cache, case)
    path = path or _continuation(model, asked, task, case)
    likelihoods = [likelihood(model, _follow(model, asked, answer), answer) for answer in case.sample.answers]
    best = max(likelihoods, key=lambda answer: (answer.greedy, -answer.nll))
    kl, same = divergence(model, _follow(model, asked, path.ids), path.states)
    nbytes, of_full_layers = sizes(plans, model.config, dtype_of(model))
    method, budget = without_budget(str(policy))
    return {
        "policy": str(policy),
        "method": method,
        "budget": budget,
        "prompt_tokens": len(case.prompt),
        **_quality(model, asked, task, case, best, same),
        "nll": best.nll,
        "log_likelihood": best.log,
        "answer_tokens": best.tokens,
        "kl": float(kl.mean()),
        "top1": float(same.mean()),
        **({"kl_curve": _curve(kl), "top1_curve": _curve(same)} if task.metric == "drift" else {}),
        "nbytes": nbytes,
        "nbytes_full_layers": of_full_layers,
        "compression": cache.full_nbytes / nbytes,
        "compress_s": compress_s,
        "kept": kept(cache),
    }, path


def _quality(model: Model, asked: Asked, task: Task, case: Case, best: Likelihood, same: np.ndarray) -> Row:
    """What the task's metric says, in the row's terms."""
    match task.metric:
        case "perplexity":  # Whether a long text would have been written word for word is no question of interest.
            return {"perplexity": math.exp(best.nll), "nll_curve": _curve(-best.logs)}
        case "exact":
            return {"score": float(best.greedy)}
        case "drift":  # Greedy decoding would leave the full cache's text at the first token that differs.
            leaves = np.flatnonzero(~same)
            return {"agrees_until": int(leaves[0]) if len(leaves) else len(same)}
    sample = case.sample
    assert model.tokenizer is not None
    ids = write(model, asked.cache, asked.logits, sample.max_new_tokens, stop=model.config.eos_ids)
    text = model.tokenizer.decode(ids)
    text = text[: min((at for at in map(text.find, sample.stop) if at >= 0), default=len(text))]
    return {**scores(task.metric, text, sample.references, sample.info), "prediction": text}


def _continuation(model: Model, asked: Asked, task: Task, case: Case) -> Path:
    """Greedy, or drawn where it is long: greedy text of a small model soon repeats itself, and is easy to follow."""
    sampler = Sampler(temperature=1.0) if task.metric == "drift" else Sampler()
    ids = write(model, asked.cache, asked.logits, case.tokens, sampler)
    return Path(ids, _follow(model, asked, ids))


def _follow(model: Model, asked: Asked, answer: Sequence[int]) -> np.ndarray:
    """Hidden states [len(answer), hidden] from which each token of the answer is predicted."""
    if len(answer) == 1:
        return asked.last
    return np.concatenate([asked.last, feed(model, asked.cache, answer[:-1])[0]])


def _curve(values: np.ndarray) -> list[float]:
    """Means of `CURVE` equal pieces, of the numbers at every position."""
    return [float(piece.mean()) for piece in np.array_split(values, min(CURVE, len(values)))]


_next_logits = jax.jit(unembed, static_argnames="config")


def ask(model: Model, cache: Cache, case: Case) -> Asked:
    x, cache = feed(model, cache, case.question)
    return Asked(cache, x[-1:], _next_logits(model.params, model.config, jnp.asarray(x[-1:])))
