"""Policies against each other on the same samples: differences of their scores and likelihoods, which of them are ones.

Tasks count alike, however many samples they have, and so do lengths and protocols: means are over jobs. What one
context has in several jobs, such as under both protocols, stands or falls together.
"""

import dataclasses
import math
from collections.abc import Callable, Hashable, Mapping, Sequence

from kvjax.evaluation.results import Row
from kvjax.evaluation.statistics import (
    Clusters,
    Groups,
    difference_interval,
    differs,
    share_interval,
    sign_flip,
    t_interval,
)
from kvjax.policies.registry import nearest

LEVEL = 0.95  # Of confidence, for intervals and for all differences from one policy together.

Key = tuple[Hashable, ...]
Jobs = Mapping[Key, Sequence[Row]]  # Of one policy.


@dataclasses.dataclass(frozen=True)
class Measure:
    """What is compared.

    Attributes:
      key: In a row; rows without it are not compared.
      value: Of a row, as it is averaged.
      interval: Of a mean difference: groups, clusters, level -> (low, high), None where it is unknown.
      more: Whether more is better.
    """

    key: str
    value: Callable[[Row], float]
    interval: Callable[[Groups, Clusters, float], tuple[float, float] | None]
    more: bool


MEASURES = {
    measure.key: measure
    for measure in (
        Measure("score", lambda row: row["score"], difference_interval, more=True),
        Measure("nll", lambda row: row["nll"], t_interval, more=False),
        Measure("perplexity", lambda row: math.log(row["perplexity"]), t_interval, more=False),
    )
}


@dataclasses.dataclass(frozen=True)
class Difference:
    """How the same samples fared under two policies.

    Attributes:
      mean: Of the first less the second (of log perplexity, where that is compared).
      low: Lower end of its interval, None where that is unknown.
      high: Upper end, likewise.
      p: Probability of a difference at least as large if signs were a matter of chance (two-sided sign-flip test, all
        that one context has in common).
      differs: Whether it is a difference, among all from the same policy (Holm).
    """

    mean: float
    low: float | None
    high: float | None
    p: float
    differs: bool = False


def job_of(row: Row) -> Key:
    """What a row belongs to: model, task, length and protocol."""
    return row.get("model"), row["task"], row.get("length"), row["protocol"]


def cluster_of(row: Row) -> Hashable:
    """Samples with one context stand and fall together."""
    return row["context"] if "context" in row else (job_of(row), row["sample"])


def jobs_of(rows: Sequence[Row]) -> dict[str, dict[Key, list[Row]]]:
    """The rows of each policy and job, in the order in which they first appear."""
    jobs: dict[str, dict[Key, list[Row]]] = {}
    for row in rows:
        jobs.setdefault(row["policy"], {}).setdefault(job_of(row), []).append(row)
    return jobs


def score_interval(
    jobs: Jobs,
    level: float = LEVEL,
    interval: Callable[[Groups, Clusters, float], tuple[float, float] | None] = share_interval,
) -> tuple[float, float] | None:
    """Of the mean score over jobs that are scored; None if there are none, or if it is unknown."""
    scored = [of for of in jobs.values() if "score" in of[0]]
    if not scored:
        return None
    groups = [[row["score"] for row in of] for of in scored]
    return interval(groups, [[*map(cluster_of, of)] for of in scored], level)


def difference(mine: Jobs, other: Jobs, measure: Measure, level: float = LEVEL) -> Difference | None:
    """Of the jobs and samples that both have; None if there are none."""
    groups: list[list[float]] = []
    clusters: list[list[Hashable]] = []
    for key, rows in mine.items():
        there = {row["sample"]: row for row in other.get(key, ())}
        pairs = [(row, there[row["sample"]]) for row in rows if measure.key in row and row["sample"] in there]
        if pairs:
            groups.append([measure.value(a) - measure.value(b) for a, b in pairs])
            clusters.append([cluster_of(row) for row, _ in pairs])
    if not groups:
        return None
    shares: dict[Hashable, float] = {}
    for values, names in zip(groups, clusters, strict=True):
        for value, name in zip(values, names, strict=True):
            shares[name] = shares.get(name, 0.0) + value / len(values) / len(groups)
    low, high = measure.interval(groups, clusters, level) or (None, None)
    return Difference(math.fsum(shares.values()), low, high, sign_flip([*shares.values()]))


def differences(
    jobs: Mapping[str, Jobs], against: str, measure: Measure, level: float = LEVEL
) -> dict[str, Difference]:
    """Of every policy that can be compared with one; Holm's correction is over all of them.

    Args:
      jobs: Of each policy, see `jobs_of`.
      against: The policy that all others are compared with.
      measure: One of `MEASURES`.
      level: Of confidence.
    """
    others = {name: difference(of, jobs[against], measure, level) for name, of in jobs.items() if name != against}
    return verdicts({name: found for name, found in others.items() if found}, level)


def verdicts(found: Mapping[str, Difference], level: float = LEVEL) -> dict[str, Difference]:
    """Which of the differences from one policy are ones (Holm)."""
    is_one = differs([one.p for one in found.values()], level)
    return {name: dataclasses.replace(one, differs=d) for (name, one), d in zip(found.items(), is_one, strict=True)}


def named(policy: str, names: Sequence[str]) -> str:
    """The policy of this name, whatever its spaces and quotation marks.

    Raises:
      ValueError: There is none.
    """
    found = next((name for name in names if _plain(name) == _plain(policy)), None)
    if found is None:
        raise ValueError(f"No policy {policy!r} was run. {nearest(policy, names)}")
    return found


def _plain(name: str) -> str:
    return "".join(name.split()).replace('"', "'")
