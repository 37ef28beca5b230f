"""Runs a task: one prefill feeds every policy, so that a comparison is cheap and exactly fair.

For every sample the prompt is seen once (`generation.observe`), compressed by each policy, and asked: how likely is the
right answer, what does greedy decoding write, and how far are predictions from the full cache's along the text that it
would write?
"""

import concurrent.futures
import datetime
import hashlib
import itertools
import json
import os
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax

from kvjax.evaluation.ask import ask, measure
from kvjax.evaluation.caches import compressed, see
from kvjax.evaluation.cases import Case, Settings
from kvjax.evaluation.kept import who_stays
from kvjax.evaluation.results import Row, config_hash, versions, write_json, write_rows
from kvjax.evaluation.speed import greedy
from kvjax.evaluation.tasks import Task
from kvjax.model import Model, bucket
from kvjax.policies import Observed, Policy

KEPT = "kept.json"
TIMED_ROUNDS = 3  # Decoding is timed so often; the fastest counts.
MAPS = 40_000  # Compiled code takes memory maps, of which a process has some 65,000.
TOGETHER = 40  # So many policies are compiled before they run; of more, code would have to go before it is used.
COMPILERS = 4  # At most so many compilations at a time: each needs memory.
Progress = Callable[[int, int, str], None]


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
      All rows, those of the earlier run first. `prefill_s`, seconds of the prefill that all policies share, is None
      where it was compiled first; `compress_s` is the policy's own.
    """
    shared = {
        "task": task.name,
        "group": task.group,
        "length": task.length,
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
    speeds: dict[tuple[int, ...], list[float]] = {}
    warm: set[tuple[int, ...]] = set()
    read: set[int] = set()
    todo = [case for case in cases if case.sample.id not in done]
    # Questions about one context follow one another: they share its prefill, unless they are part of it.
    for prompt, group in itertools.groupby(todo, key=lambda case: case.prompt):
        progress(len(rows), total, "prefill")
        start = time.perf_counter()
        observed = jax.block_until_ready(see(model, [prompt], settings.policies))
        prefill_s = time.perf_counter() - start if bucket(len(prompt)) in read else None  # The first one compiles.
        read.add(bucket(len(prompt)))
        for case in group:
            if case.shape not in warm and len(settings.policies) <= TOGETHER:
                for number in _compile(model, observed, task, case, settings):
                    progress(len(rows), total, f"compiling {number} of {len(settings.policies)} policies")
                warm.add(case.shape)
            if not rows:
                write_json(folder / KEPT, who_stays(model, observed, case, settings.policies))
            mine = []
            for measured in _ask(model, observed, task, case, settings.policies):
                mine.append(measured)
                progress(len(rows) + len(mine), total, measured["policy"])
            if settings.speed and case.shape not in speeds:
                progress(len(rows) + len(mine), total, "decoding speed")
                speeds[case.shape] = _decode_speeds(model, observed, case, settings)
            origin = shared | _origin(case)
            timings = {
                "prefill_s": prefill_s,
                "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            }
            for row, speed in zip(mine, speeds.get(case.shape, [None] * len(mine)), strict=True):
                rows.append(origin | row | {"decode_tokens_per_s": speed} | timings)
            write_rows(folder, rows)
    return rows


def _origin(case: Case) -> Row:
    """Where a row comes from; samples with the same context have the same digest of it."""
    sample = case.sample
    context = hashlib.sha256(json.dumps(sample.context_ids).encode()).hexdigest()[:12]
    return {"sample": sample.id, "context": context, "references": list(sample.references), **sample.info}


def _ask(model: Model, observed: Observed, task: Task, case: Case, policies: Sequence[Policy]) -> Iterator[Row]:
    """One row per policy: the full cache's first, whose continuation the others are led along."""
    path = None
    for policy in policies:
        row, path = measure(model, observed, task, case, policy, path)
        yield row
        if _memory_maps() > MAPS:  # What compiles again comes from the compilation cache, if there is one.
            jax.clear_caches()


def _memory_maps() -> int:
    """Of this process; 0 where there is no way to know."""
    try:
        return pathlib.Path("/proc/self/maps").read_bytes().count(b"\n")
    except OSError:
        return 0


def _decode_speeds(model: Model, observed: Observed, case: Case, settings: Settings) -> list[float]:
    """Tokens per second of every policy's compiled decode loop, by turns: a busy moment does not hit one alone."""

    def timed(policy: Policy) -> float:
        return settings.tokens / _decode_seconds(model, observed, case, policy, settings)

    rounds = [[timed(policy) for policy in settings.policies] for _ in range(TIMED_ROUNDS)]
    return [max(speeds) for speeds in zip(*rounds, strict=True)]


def _decode_seconds(model: Model, observed: Observed, case: Case, policy: Policy, settings: Settings) -> float:
    _, cache = compressed(model, observed, [case.prompt], policy, case.shape[1])
    asked = ask(model, cache, case)
    return greedy(model, asked.cache, asked.logits, settings.tokens)[1]


def _compile(model: Model, observed: Observed, task: Task, case: Case, settings: Settings) -> Iterator[int]:
    """Runs every policy once, and says before each which it is. One compilation keeps one core busy, so several run at
    a time."""
    yield 1
    _, path = measure(model, observed, task, case, settings.policies[0], None)

    def once(policy: Policy) -> None:
        measure(model, observed, task, case, policy, path)
        if settings.speed:
            _decode_seconds(model, observed, case, policy, settings)

    with concurrent.futures.ThreadPoolExecutor(min(os.cpu_count() or 1, COMPILERS)) as pool:
        running = [pool.submit(once, policy) for policy in settings.policies]
        for done, one in enumerate(concurrent.futures.as_completed(running), 1):
            one.result()
            yield min(done + 1, len(running))
