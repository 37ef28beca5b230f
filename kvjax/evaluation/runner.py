"""Runs a task: one prefill feeds every policy, so that a comparison is cheap and exactly fair.

For every sample the prompt is seen once (`generation.observe`), compressed by each policy, and asked: how likely is the right
answer, would greedy decoding write it, and how far are predictions from the full cache's along the text that it would write?
"""

import dataclasses
import datetime
import functools
import itertools
import math
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.cache import EMPTY, Cache
from kvjax.cache.types import tree_nbytes
from kvjax.evaluation.results import Row, config_hash, read_rows, versions, write_rows
from kvjax.evaluation.score import divergence, feed, follow, likelihood, padded
from kvjax.evaluation.speed import decode_speed, greedy
from kvjax.evaluation.tasks import Ids, Sample, Task
from kvjax.generation import observe
from kvjax.model import Model, bucket
from kvjax.models.config import Config
from kvjax.models.transformer import unembed
from kvjax.policies import Needs, Observed, Plan, Policy, PolicyError, abstract_cache, compress, parse_policy, plan

Progress = Callable[[int, int, str], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """How a task is run.

    Attributes:
      policies: The full cache comes first: it is what the others are measured against.
      protocol: "aware": the question is part of the compressed prompt, only its last token comes after. "agnostic": the context
        is compressed first, the question comes after. Perplexity is agnostic always.
      tokens: Length of the full cache's greedy continuation, along which predictions are compared.
      speed: Whether decoding is timed.
    """

    policies: tuple[Policy, ...]
    protocol: Literal["aware", "agnostic"] = "aware"
    tokens: int = 16
    speed: bool = True

    def __post_init__(self):
        if self.protocol not in ("aware", "agnostic"):
            raise ValueError(f"The protocol is aware or agnostic, got {self.protocol!r}.")
        if self.tokens < 1:
            raise ValueError(f"The continuation must have at least 1 token, got {self.tokens}.")


def parse_policies(text: str) -> tuple[Policy, ...]:
    """Policies as written on the command line, separated by semicolons; the full cache is put first.

    Raises:
      PolicyError: One cannot be read or makes no sense, or is given twice.
    """
    policies = [parse_policy(part) for part in text.split(";") if part.strip()]
    if not policies:
        raise PolicyError('No policies given. Write them like "full; snapkv(0.25); kivi(bits=4)".')
    for policy, other in itertools.combinations(policies, 2):
        if policy == other:
            raise PolicyError(f"{policy} and {other} are the same policy. Give it once.")
    return (Policy(), *(policy for policy in policies if policy != Policy()))


def resolved_config(name: str, dtype: Any, task: Task, settings: Settings) -> dict[str, Any]:
    """All that results depend on, for JSON; two runs of the same configuration may continue each other."""
    return {
        "model": name,
        "dtype": jnp.dtype(dtype).name,
        "task": task.resolved(),
        "policies": [str(policy) for policy in settings.policies],
        "protocol": protocol_of(task, settings),
        "continuation": settings.tokens,
        "speed": settings.speed,
    }


def protocol_of(task: Task, settings: Settings) -> str:
    return "agnostic" if task.metric == "perplexity" else settings.protocol


def prompt_and_question(sample: Sample, protocol: str) -> tuple[Ids, Ids]:
    """What is compressed and what comes after."""
    if protocol == "agnostic":
        return sample.context_ids, sample.question_ids
    return sample.context_ids + sample.question_ids[:-1], sample.question_ids[-1:]


def check(model: Model, samples: Sequence[Sample], protocol: str, settings: Settings) -> None:
    """Everything that can be known before anything is computed.

    Raises:
      ValueError: A sample is longer than the model's context. PolicyError: A policy cannot serve the model or a prompt.
    """
    lengths = set()
    for sample in samples:
        prompt, question = prompt_and_question(sample, protocol)
        after = len(question) + max(settings.tokens, *map(len, sample.answers))
        if len(prompt) + after > model.config.max_length:
            raise ValueError(
                f"Sample {sample.id} has {len(prompt)} tokens to compress and {after} after them; this model's context is "
                f"{model.config.max_length}."
            )
        lengths.add(len(prompt))
    for length in sorted(lengths):
        for policy in settings.policies:
            plan(policy, model.config, length, _dtype(model))


def run(
    model: Model,
    task: Task,
    samples: Sequence[Sample],
    settings: Settings,
    config: Mapping[str, Any],
    folder: pathlib.Path,
    rows: Sequence[Row] = (),
    progress: Progress = lambda done, total, what: None,
) -> list[Row]:
    """Runs what has not been run yet, and writes the file of rows after every sample.

    Args:
      samples: Of the task, see `check`.
      config: The resolved one, which goes into every row.
      folder: Where results go.
      rows: Those of an earlier run, see `results.read_rows`.
      progress: Called with rows done, rows in all and what comes next.

    Returns:
      All rows, those of the earlier run first.
    """
    protocol, total = protocol_of(task, settings), len(samples) * len(settings.policies)
    rows = list(rows)
    done = {row["sample"] for row in rows}
    shared = {
        "task": task.name,
        "metric": task.metric,
        "protocol": protocol,
        "model": config["model"],
        "seed": config["task"].get("seed"),
        "config": dict(config),
        "config_hash": config_hash(config),
        "versions": versions(),
        "device": jax.devices()[0].device_kind,
    }
    speeds: dict[Any, float] = {}
    todo = [sample for sample in samples if sample.id not in done]
    # Questions about one context follow one another: they share its prefill where the question is not part of it.
    for prompt, group in itertools.groupby(todo, key=lambda sample: prompt_and_question(sample, protocol)[0]):
        progress(len(rows), total, "prefill")
        observed = _observe(model, prompt, settings.policies)
        for sample in group:
            mine = []
            for measured in _ask(model, observed, sample, protocol, settings, speeds):
                time = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
                mine.append(shared | {"sample": sample.id, **sample.info} | measured | {"time": time})
                progress(len(rows) + len(mine), total, measured["policy"])
            rows += [_with_perplexity(row) if task.metric == "perplexity" else row for row in mine]
            write_rows(folder, rows)
    return rows


def _with_perplexity(row: Row) -> Row:
    """Whether a long text would have been written word for word is no question of interest."""
    return {key: value for key, value in row.items() if key != "correct"} | {"perplexity": math.exp(row["nll"])}


def _dtype(model: Model) -> Any:
    return model.params["embed"].dtype


def _observe(model: Model, prompt: Ids, policies: Sequence[Policy]) -> Observed:
    needs = functools.reduce(Needs.__or__, (policy.needs for policy in policies))
    tokens, lengths = model.encode(prompt)
    return observe(model.params, model.config, tokens, lengths, needs)


def _ask(
    model: Model, observed: Observed, sample: Sample, protocol: str, settings: Settings, speeds: dict[Any, float]
) -> Iterator[Row]:
    """One row per policy: the full cache's first, whose continuation the others are led along."""
    prompt, question = prompt_and_question(sample, protocol)
    after = padded(len(question) + settings.tokens - 1)
    room = bucket(max(after + 1, *(padded(len(question) + len(answer) - 1) for answer in sample.answers)))
    continuation: list[int] = []
    reference = np.zeros(())
    for policy in settings.policies:
        tight = plan(policy, model.config, len(prompt), _dtype(model))
        cache = _ready(_wide(tight, observed), observed, room)
        speed = policy, cache.layers[model.config.full_layers[0]].pos.shape if model.config.full_layers else 0
        if not continuation or (settings.speed and speed not in speeds):
            x, asked = feed(model, cache, question, after)
            logits = _next_logits(model.params, model.config, jnp.asarray(x[-1:]))
            if not continuation:
                continuation = greedy(model, asked, logits, settings.tokens)[0].tolist()
            if settings.speed:
                speeds[speed] = decode_speed(model, asked, logits, settings.tokens)
        answers = [likelihood(model, follow(model, cache, question, answer), answer) for answer in sample.answers]
        best = max(answers, key=lambda answer: (answer.greedy, -answer.nll))
        x = follow(model, cache, question, continuation)
        reference = x if reference.ndim == 0 else reference
        kl, top1 = divergence(model, x, reference)
        nbytes, compressed = _sizes(tight, model.config, _dtype(model))
        yield {
            "policy": str(policy),
            "prompt_tokens": len(prompt),
            "correct": best.greedy,
            "nll": best.nll,
            "log_likelihood": best.log,
            "answer_tokens": best.tokens,
            "kl": kl,
            "top1": top1,
            "nbytes": nbytes,
            "nbytes_full_layers": compressed,
            "compression": cache.full_nbytes / nbytes,
            "kept": _kept(cache),
            "decode_tokens_per_s": speeds.get(speed),
        }


_next_logits = jax.jit(unembed, static_argnames="config")


def _wide(tight: Plan, observed: Observed) -> Plan:
    """A plan with capacities for every prompt that is padded to the same length, so that they share compilations.

    Rows know how many slots are theirs, so what is kept does not depend on it.
    """
    width = next((layer[0].k.shape[2] for layer in observed.layers if isinstance(layer, tuple)), tight.length)
    if width == tight.length:
        return tight
    return plan(tight.policy, observed.config, [tight.length, width], observed.last.dtype)


@functools.partial(jax.jit, static_argnames=("plan", "room"))
def _ready(plan: Plan, observed: Observed, room: int) -> Cache:
    """The compressed cache with room for questions and answers, and a policy that knows only what comes after the prompt."""
    return dataclasses.replace(compress(plan, observed).reserve(room), policy=plan.policy.after_prompt)


@functools.lru_cache(maxsize=4096)
def _sizes(tight: Plan, config: Config, dtype: Any) -> tuple[int, int]:
    """Bytes of the cache as `prefill` allocates it for this prompt alone, and of its full-attention layers."""
    cache = abstract_cache(tight, config, 1, dtype)
    return cache.nbytes, sum(tree_nbytes(cache.layers[layer]) for layer in config.full_layers)


def _kept(cache: Cache) -> list[int]:
    """Slots in use in every full-attention layer; of the head with most, where heads differ."""
    layers = jax.device_get([cache.layers[layer].pos for layer in cache.config.full_layers])
    return [int((pos != EMPTY).sum(-1).max()) for pos in layers]
