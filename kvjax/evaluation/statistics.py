"""When a difference is one: bootstrap intervals, paired differences, and their correction for many comparisons.

Questions about one context stand or fall together, so contexts are what is drawn again, with all of their questions:
samples that share a context are a cluster.
"""

import dataclasses
import functools
from collections.abc import Hashable, Sequence

import numpy as np

DRAWS = 2000  # An interval's ends then move by about a twentieth of its width from seed to seed.
EXACT = 12  # Up to so many clusters all 2^n sign flips are counted.


@dataclasses.dataclass(frozen=True)
class Paired:
    """How the same samples fared under two policies.

    Attributes:
      difference: Mean of a - b.
      low: Lower end of its bootstrap interval.
      high: Upper end.
      p: Probability of a difference at least as large if signs were a matter of chance (two-sided sign-flip test). With
        n clusters it is at least 2^(1 - n): a handful of contexts cannot show a difference.
    """

    difference: float
    low: float
    high: float
    p: float


def bootstrap(
    values: Sequence[float],
    clusters: Sequence[Hashable] | None = None,
    seed: int = 0,
    level: float = 0.95,
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean (Efron 1979), clusters drawn as a whole.

    Args:
      values: One per sample.
      clusters: Of each sample, such as its context; default: every sample is its own.
      seed: Of the draws.
      level: Of confidence.

    Returns:
      (low, high). With a single cluster nothing can be said: (-inf, inf).

    Raises:
      ValueError: There are no values, or not as many clusters as values.
    """
    sums, sizes = _sums(values, clusters)
    if len(sums) == 1:
        return -np.inf, np.inf
    counts = _draws(len(sums), seed)
    means = counts @ sums / (counts @ sizes)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def paired(
    a: Sequence[float],
    b: Sequence[float],
    clusters: Sequence[Hashable] | None = None,
    seed: int = 0,
    level: float = 0.95,
) -> Paired:
    """The mean of a - b over the same samples, with its interval and the p-value of a sign-flip test.

    Raises:
      ValueError: a and b differ in length, or there are none.
    """
    if len(a) != len(b):
        raise ValueError(f"Pairs need as many values on both sides, got {len(a)} and {len(b)}.")
    differences = np.asarray(a, np.float64) - np.asarray(b, np.float64)
    low, high = bootstrap(differences.tolist(), clusters, seed, level)
    sums, _ = _sums(differences.tolist(), clusters)
    return Paired(float(differences.mean()), low, high, sign_flip(sums.tolist(), seed))


def sign_flip(values: Sequence[float], seed: int = 0) -> float:
    """Two-sided: the share of sign assignments that give a sum at least as large, all of them if they are few.

    Args:
      values: Differences of independent things, such as of clusters.
    """
    x = np.asarray(values, np.float64)
    number, observed = len(x), abs(x.sum()) - 1e-12 * np.abs(x).sum()
    signs = _signs(number, seed)
    hits = int((np.abs(signs @ x) >= observed).sum())
    # Where signs are drawn, the assignment that was observed is one of them: p is never zero.
    return hits / len(signs) if number <= EXACT else (hits + 1) / (len(signs) + 1)


@functools.lru_cache(maxsize=64)
def _signs(number: int, seed: int) -> np.ndarray:
    """Assignments of signs [assignments, number]: all there are, or many at random."""
    if number <= EXACT:
        return 1.0 - 2.0 * ((np.arange(2**number)[:, None] >> np.arange(number)) & 1)
    generator = np.random.Generator(np.random.PCG64([seed, number, 1]))
    return generator.choice(np.array([-1.0, 1.0]), size=(DRAWS * 5, number))


def differs(p_values: Sequence[float], level: float = 0.95) -> list[bool]:
    """Which of many comparisons are differences, by Holm's step-down procedure (1979): at most 1 - level of such
    families name even one that is none."""
    order = np.argsort(p_values, kind="stable")
    verdict = [False] * len(p_values)
    for rank, i in enumerate(order):
        if p_values[i] > (1 - level) / (len(p_values) - rank):
            break
        verdict[i] = True
    return verdict


def wilson(successes: int, number: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's interval (1927) of a share of independent samples: unlike the bootstrap's it has a width at 0 and 1."""
    share, denominator = successes / number, 1 + z * z / number
    middle = (share + z * z / (2 * number)) / denominator
    half = z / denominator * np.sqrt(share * (1 - share) / number + z * z / (4 * number * number))
    return float(max(0.0, middle - half)), float(min(1.0, middle + half))


def macro(
    groups: Sequence[Sequence[float]],
    clusters: Sequence[Sequence[Hashable]],
    seed: int = 0,
    level: float = 0.95,
) -> tuple[float, float]:
    """Bootstrap interval of the mean of groups' means, such as of tasks; samples are drawn within their group.

    Args:
      groups: Values of each group.
      clusters: Of each value.

    Returns:
      (low, high); (-inf, inf) if a group has a single cluster, of whose spread nothing is known.

    Raises:
      ValueError: A group is empty.
    """
    means = []
    for i, (values, names) in enumerate(zip(groups, clusters, strict=True)):
        sums, sizes = _sums(values, names)
        if len(sums) == 1:
            return -np.inf, np.inf
        counts = _draws(len(sums), seed + i)
        means.append(counts @ sums / (counts @ sizes))
    low, high = np.quantile(np.mean(means, 0), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _sums(values: Sequence[float], clusters: Sequence[Hashable] | None) -> tuple[np.ndarray, np.ndarray]:
    """Sums and sizes of clusters, in the order in which they first appear."""
    if not len(values):
        raise ValueError("There are no values.")
    names = range(len(values)) if clusters is None else clusters
    if len(names) != len(values):
        raise ValueError(f"Every value has a cluster: got {len(values)} values and {len(names)} clusters.")
    totals: dict[Hashable, tuple[float, int]] = {}
    for name, value in zip(names, values, strict=True):
        total, size = totals.get(name, (0.0, 0))
        totals[name] = total + float(value), size + 1
    sums, sizes = zip(*totals.values(), strict=True)
    return np.asarray(sums, np.float64), np.asarray(sizes, np.float64)


@functools.lru_cache(maxsize=256)
def _draws(number: int, seed: int) -> np.ndarray:
    """How often each of so many clusters is drawn, [DRAWS, number]."""
    generator = np.random.Generator(np.random.PCG64([seed, number]))
    return generator.multinomial(number, np.full(number, 1 / number), size=DRAWS).astype(np.float64)
