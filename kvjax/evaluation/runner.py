"""Runs a task: one prefill feeds every policy, so that a comparison is cheap and exactly fair.

For every sample the prompt is seen once (`generation.observe`), compressed by each policy, and asked: how likely is the
right answer, would greedy decoding write it, and how far are predictions from the full cache's along the text that it
would write?
"""

import concurrent.futures
import dataclasses
import datetime
import functools
import itertools
import math
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from kvjax.cache import EMPTY, Cache
from kvjax.cache.types import tree_nbytes
from kvjax.evaluation.results import Row, config_hash, versions, write_rows
from kvjax.evaluation.score import divergence, feed, follow, likelihood, padded
from kvjax.evaluation.speed import greedy
from kvjax.evaluation.tasks import Ids, Sample, Task
from kvjax.generation import observe, prefill
from kvjax.model import Model, bucket
from kvjax.models.config import Config
from kvjax.models.transformer import unembed
from kvjax.policies import (
    Budget,
    Needs,
    Observed,
    Plan,
    Policy,
    PolicyError,
    abstract_cache,
    compress_decided,
    decide,
    methods,
    parse_policy,
    plan,
)

TIMED_ROUNDS = 3  # Decoding is timed so often; the fastest counts.
TOGETHER = (
    40  # Policies that stay compiled at a time: their code takes memory maps, of which a process has some 65,000.
)
COMPILERS = 4  # At most so many compilations at a time: each needs memory.
Progress = Callable[[int, int, str], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """How a task is run.

    Attributes:
      policies: The full cache comes first: it is what the others are measured against.
      protocol: "aware": the question is part of the compressed prompt, only its last token comes after. "agnostic": the
        context is compressed first, the question comes after. Perplexity is agnostic always.
      tokens: Length of the full cache's greedy continuation, along which predictions are compared. Its predictions are
        kept while a sample is asked: tokens * vocab_size * 4 bytes.
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


def parse_policies(text: str, sizes: Sequence[float] = ()) -> tuple[Policy, ...]:
    """Policies as written on the command line, separated by semicolons; the full cache is put first.

    Args:
      text: Policies; "all" stands for every method.
      sizes: Budgets for policies that need one and give none, as parts of the uncompressed cache's bytes, or of its
        tokens where a budget is what is read: each of these policies comes once per size.

    Raises:
      PolicyError: One cannot be read, makes no sense or is given twice.
    """
    given = [part.strip() for part in text.split(";") if part.strip()]
    parts = [name for part in given for name in (methods() if part == "all" else [part])]
    # Without a budget of its own a policy is another at every size; with one it is the same.
    wanted = sizes or (None,)
    policies = [policy for part in parts for policy in dict.fromkeys(_of_size(part, size) for size in wanted)]
    if not policies:
        raise PolicyError('No policies given. Write them like "full; snapkv(0.25); kivi(bits=4)".')
    for policy, other in itertools.combinations(policies, 2):
        if policy == other:
            raise PolicyError(f"{policy} and {other} are the same policy. Give it once.")
    return (Policy(), *(policy for policy in policies if policy != Policy()))


def _of_size(text: str, size: float | None) -> Policy:
    if size is None:
        return parse_policy(text)
    try:
        return parse_policy(text, budget=Budget(size=size))
    except PolicyError:
        return parse_policy(text, budget=Budget(ratio=size))


def resolved_config(name: str, dtype: Any, task: Task, settings: Settings) -> dict[str, Any]:
    """All that results depend on, for JSON; a run may go on where another of the same configuration stopped."""
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


# A sample under a protocol


@dataclasses.dataclass(frozen=True)
class Case:
    """What is compressed, what comes after, and the room that this takes.

    Attributes:
      sample: Its origin.
      prompt: Compressed.
      question: Fed to the compressed cache; its last token asks for the answer.
      tokens: Length of the continuation.
    """

    sample: Sample
    prompt: Ids
    question: Ids
    tokens: int

    @property
    def longest(self) -> int:
        """Tokens after the prompt, at most."""
        return len(self.question) + max(self.tokens, *map(len, self.sample.answers))

    @property
    def asked(self) -> int:
        """Padded tokens of the question with its continuation."""
        return padded(len(self.question) + self.tokens - 1)

    @property
    def room(self) -> int:
        return bucket(max(padded(self.longest), self.asked + 1))

    @property
    def shape(self) -> tuple[int, int]:
        """What compilations depend on."""
        return bucket(len(self.prompt)), self.asked


def make_cases(task: Task, samples: Sequence[Sample], settings: Settings) -> list[Case]:
    """The samples under the protocol of the settings."""

    def case(sample: Sample) -> Case:
        context, question = sample.context_ids, sample.question_ids
        if protocol_of(task, settings) == "aware":
            context, question = context + question[:-1], question[-1:]
        return Case(sample, context, question, settings.tokens)

    return [case(sample) for sample in samples]


def check(model: Model, cases: Sequence[Case], settings: Settings) -> None:
    """Everything that can be known before anything is computed.

    Raises:
      ValueError: A sample is longer than the model's context. PolicyError: A policy cannot serve the model or a prompt.
    """
    for case in cases:
        if len(case.prompt) + case.longest > model.config.max_length:
            raise ValueError(
                f"Sample {case.sample.id} has {len(case.prompt)} tokens to compress and {case.longest} after them; the "
                f"model's context is {model.config.max_length}."
            )
    for length in sorted({len(case.prompt) for case in cases}):
        for policy in settings.policies:
            plan(policy, model.config, length, _dtype(model))


def servable(
    model: Model, cases: Sequence[Case], policies: Sequence[Policy]
) -> tuple[tuple[Policy, ...], dict[Policy, str]]:
    """The policies that can serve the model and every prompt; and of the others why not."""
    reasons: dict[Policy, str] = {}
    for policy, length in itertools.product(policies, sorted({len(case.prompt) for case in cases})):
        try:
            plan(policy, model.config, length, _dtype(model))
        except PolicyError as error:
            reasons[policy] = str(error)
    return tuple(policy for policy in policies if policy not in reasons), reasons


def _dtype(model: Model) -> Any:
    return model.params["embed"].dtype


# The run


def run(
    model: Model,
    task: Task,
    cases: Sequence[Case],
    settings: Settings,
    config: Mapping[str, Any],
    folder: pathlib.Path,
    rows: Sequence[Row] = (),
    progress: Progress = lambda done, total, what: None,
) -> list[Row]:
    """Runs what has not been run yet, and writes the file of rows after every sample.

    Args:
      cases: Of the task, see `make_cases` and `check`.
      config: The resolved one, which goes into every row.
      folder: Where results go.
      rows: Those of an earlier run, see `results.read_rows`.
      progress: Called with rows done, rows in all and what has been done.

    Returns:
      All rows, those of the earlier run first.
    """
    shared = {
        "task": task.name,
        "metric": task.metric,
        "protocol": config["protocol"],
        "model": config["model"],
        "seed": config["task"].get("seed"),
        "config": dict(config),
        "config_hash": config_hash(config),
        "versions": versions(),
        "device": jax.devices()[0].device_kind,
    }
    rows, total = list(rows), len(cases) * len(settings.policies)
    done = {row["sample"] for row in rows}
    speeds: dict[tuple[int, int], list[float]] = {}
    warm: set[tuple[int, int]] = set()
    todo = [case for case in cases if case.sample.id not in done]
    # Questions about one context follow one another: they share its prefill, unless they are part of it.
    for prompt, group in itertools.groupby(todo, key=lambda case: case.prompt):
        progress(len(rows), total, "prefill")
        observed = _observe(model, prompt, settings.policies)
        for case in group:
            if case.shape not in warm and len(settings.policies) <= TOGETHER:
                progress(len(rows), total, "compiling")
                _compile(model, observed, case, settings)
                warm.add(case.shape)
            mine = []
            for measured in _ask(model, observed, case, settings):
                mine.append(measured)
                progress(len(rows) + len(mine), total, measured["policy"])
            if settings.speed and case.shape not in speeds:
                progress(len(rows) + len(mine), total, "decoding speed")
                speeds[case.shape] = _decode_speeds(model, observed, case, settings)
            origin = shared | {"sample": case.sample.id, **case.sample.info}
            time = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
            for row, speed in zip(mine, speeds.get(case.shape, [None] * len(mine)), strict=True):
                rows.append(origin | _in_terms_of(task, row) | {"decode_tokens_per_s": speed, "time": time})
            write_rows(folder, rows)
    return rows


def _in_terms_of(task: Task, row: Row) -> Row:
    """Whether a long text would have been written word for word is no question of interest; its perplexity is."""
    if task.metric == "accuracy":
        return row
    return {key: value for key, value in row.items() if key != "correct"} | {"perplexity": math.exp(row["nll"])}


def _observe(model: Model, prompt: Ids, policies: Sequence[Policy]) -> Observed:
    needs = functools.reduce(Needs.__or__, (policy.needs for policy in policies))
    tokens, lengths = model.encode(prompt)
    return observe(model.params, model.config, tokens, lengths, needs)


def _ask(model: Model, observed: Observed, case: Case, settings: Settings) -> Iterator[Row]:
    """One row per policy: the full cache's first, whose continuation the others are led along."""
    continuation, reference = [], np.zeros(())
    for number, policy in enumerate(settings.policies, 1):
        tight, cache = _compressed(model, observed, case, policy)
        if not continuation:
            ids, _ = greedy(model, *_question(model, cache, case), case.tokens)
            continuation = np.asarray(ids)[0].tolist()
            reference = follow(model, cache, case.question, continuation)
        answers = [
            likelihood(model, follow(model, cache, case.question, answer), answer) for answer in case.sample.answers
        ]
        best = max(answers, key=lambda answer: (answer.greedy, -answer.nll))
        kl, same = divergence(model, follow(model, cache, case.question, continuation), reference)
        nbytes, compressed = _sizes(tight, model.config, _dtype(model))
        yield {
            "policy": str(policy),
            "prompt_tokens": len(case.prompt),
            "correct": best.greedy,
            "nll": best.nll,
            "log_likelihood": best.log,
            "answer_tokens": best.tokens,
            "kl": float(kl.mean()),
            "top1": float(same.mean()),
            "nbytes": nbytes,
            "nbytes_full_layers": compressed,
            "compression": cache.full_nbytes / nbytes,
            "kept": _kept(cache),
        }
        if number % TOGETHER == 0:  # What compiles again comes from the compilation cache, if there is one.
            jax.clear_caches()


def _decode_speeds(model: Model, observed: Observed, case: Case, settings: Settings) -> list[float]:
    """Tokens per second of every policy's compiled decode loop, by turns: a busy moment does not hit one alone."""

    def timed(policy: Policy) -> float:
        _, cache = _compressed(model, observed, case, policy)
        return case.tokens / greedy(model, *_question(model, cache, case), case.tokens)[1]

    rounds = [[timed(policy) for policy in settings.policies] for _ in range(TIMED_ROUNDS)]
    return [max(speeds) for speeds in zip(*rounds, strict=True)]


def _compile(model: Model, observed: Observed, case: Case, settings: Settings) -> None:
    """Runs every policy once. One compilation keeps one core busy, so several run at a time."""

    def once(policy: Policy) -> None:
        _, cache = _compressed(model, observed, case, policy)
        asked = _question(model, cache, case)
        if settings.speed or policy == settings.policies[0]:
            greedy(model, *asked, case.tokens)

    with concurrent.futures.ThreadPoolExecutor(min(os.cpu_count() or 1, COMPILERS)) as pool:
        list(pool.map(once, settings.policies))


def _compressed(model: Model, observed: Observed, case: Case, policy: Policy) -> tuple[Plan, Cache]:
    """The plan for this prompt alone, and a cache that was compressed by it, with room for what comes after."""
    tight = plan(policy, model.config, len(case.prompt), _dtype(model))
    if policy.in_chunks:
        tokens, lengths = model.encode(case.prompt)
        cache = prefill(model.params, model.config, policy, tokens, lengths).reserve(case.room)
        return tight, dataclasses.replace(cache, policy=policy.after_prompt)
    wide, slots = decide(_wide(tight, observed), observed)
    return tight if tight.decided else wide, _ready(wide, slots, observed, case.room)


_next_logits = jax.jit(unembed, static_argnames="config")


def _question(model: Model, cache: Cache, case: Case) -> tuple[Cache, Array]:
    """The cache after the question, and the logits [1, vocab] of the answer's first token."""
    x, cache = feed(model, cache, case.question, case.asked)
    return cache, _next_logits(model.params, model.config, jnp.asarray(x[-1:]))


def _wide(tight: Plan, observed: Observed) -> Plan:
    """A plan with capacities for every prompt that is padded to the same length, so that they share compilations.

    Rows know how many slots are theirs, so what is kept does not depend on it.
    """
    width = next((layer[0].k.shape[2] for layer in observed.layers if isinstance(layer, tuple)), tight.length)
    if width == tight.length:
        return tight
    return plan(tight.policy, observed.config, [tight.length, width], observed.last.dtype)


@functools.partial(jax.jit, static_argnames=("plan", "room"))
def _ready(plan: Plan, slots: Array, observed: Observed, room: int) -> Cache:
    """The compressed cache with room for questions and answers; its policy knows only what comes after the prompt."""
    return dataclasses.replace(compress_decided(plan, slots, observed).reserve(room), policy=plan.policy.after_prompt)


@functools.lru_cache(maxsize=4096)
def _sizes(tight: Plan, config: Config, dtype: Any) -> tuple[int, int]:
    """Bytes of the cache as `prefill` allocates it for this prompt alone, and of its full-attention layers."""
    cache = abstract_cache(tight, config, 1, dtype)
    return cache.nbytes, sum(tree_nbytes(cache.layers[layer]) for layer in config.full_layers)


def _kept(cache: Cache) -> list[int]:
    """Slots in use in every full-attention layer; of the head with most, where heads differ."""
    layers = jax.device_get([cache.layers[layer].pos for layer in cache.config.full_layers])
    return [int((pos != EMPTY).sum(-1).max()) for pos in layers]
