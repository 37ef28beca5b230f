"""When a difference is one: intervals of means over tasks, a test of paired differences, and its correction for many.

What is averaged comes in groups, such as tasks: a mean is the mean of the groups' means. Questions about one context
stand or fall together, in whichever group they are: values that share a context are a cluster, and clusters are what
is independent.
"""

import dataclasses
import functools
import math
from collections.abc import Hashable, Sequence

import numpy as np
from scipy.special import stdtrit  # JAX needs scipy: it is there.

DRAWS = 10_000  # Assignments of signs, where they are too many to count; and samples of a bootstrap.
EXACT = 12  # Up to so many clusters all 2^n sign flips are counted.

Groups = Sequence[Sequence[float]]  # Values of each group.
Clusters = Sequence[Sequence[Hashable]]  # The cluster of each value; the same name is the same cluster in all groups.


@dataclasses.dataclass(frozen=True)
class _Mean:
    """A mean of groups' means, and what its clusters tell about its error.

    Attributes:
      value: The mean.
      variance: Of its error, as clusters differ within their groups (unbiased). Groups of one cluster add nothing.
      number: Of equal and independent clusters that would have as much weight: 1 / sum of squared weights.
      alone: Sum of squared weights of groups of one cluster, of whose spread nothing is known.
      freedom: Degrees of freedom of the variance (Satterthwaite 1946); infinite where nothing differs.
    """

    value: float
    variance: float
    number: float
    alone: float
    freedom: float


def share_interval(groups: Groups, clusters: Clusters, level: float = 0.95) -> tuple[float, float]:
    """Score interval of the mean of groups' means, of values from 0 to 1.

    Wilson's interval (1927) of one share is all means from which what was found is at most z standard errors away,
    where the error is that *at this mean*. This is the same for groups (cf. Yan & Su 2010, Stratified Wilson and
    Newcombe Confidence Intervals for Multiple Binomial Proportions): at the mean that was found, the variance is that
    within groups; from there it changes with the mean as the variance of shares does. Where all spread is within
    groups, this is Wilson's slope; where there is none, variance may still be hidden, and grows with slope one. So the
    interval has a width even where all values are 0, and a group of one cluster counts with the most that it can vary.
    The quantile is Student's, with the effective number of clusters less one.

    Args:
      groups: Values of each group, from 0 to 1.
      clusters: Of each value.
      level: Of confidence.

    Returns:
      (low, high), within 0 and 1.

    Raises:
      ValueError: There is no group or an empty one, or not as many clusters as values, or a value is out of range.
    """
    if any(not -1e-9 <= value <= 1 + 1e-9 for values in groups for value in values):  # But for rounding.
        raise ValueError("An interval of shares is one of values from 0 to 1.")
    mean = _mean(groups, clusters)
    most = mean.value * (1 - mean.value)
    variance = mean.variance + mean.alone * most
    within = min(1.0, variance * mean.number / most) if most > 0 else 0.0  # The part of the spread within groups.
    low = mean.value - _reach(mean, variance, 1 - 2 * within * (1 - mean.value), level)
    high = mean.value + _reach(mean, variance, 1 - 2 * within * mean.value, level)
    return max(0.0, low), min(1.0, high)


def difference_interval(groups: Groups, clusters: Clusters, level: float = 0.95) -> tuple[float, float]:
    """As `share_interval`, of differences between two shares, from -1 to 1.

    Equal answers everywhere do not say that none ever differs, and a few gains do not say that there are no losses:
    away from the mean, the variance grows with slope one, as that of differences which are there or not. So zero may
    be inside where `sign_flip`, which asks about zero alone, finds a difference.

    Returns:
      (low, high), within -1 and 1.
    """
    mean = _mean(groups, clusters)
    size = _mean([[abs(value) for value in values] for values in groups], clusters).value
    reach = _reach(mean, mean.variance + mean.alone * size, 1.0, level)
    return max(-1.0, mean.value - reach), min(1.0, mean.value + reach)


def t_interval(groups: Groups, clusters: Clusters, level: float = 0.95) -> tuple[float, float] | None:
    """Student's interval of the mean of groups' means, of values without bounds (stratified, Satterthwaite 1946).

    Returns:
      (low, high); None if a group has a single cluster, of whose spread nothing is known.
    """
    mean = _mean(groups, clusters)
    if mean.alone:
        return None
    reach = float(stdtrit(mean.freedom, (1 + level) / 2)) * math.sqrt(mean.variance) if mean.variance else 0.0
    return mean.value - reach, mean.value + reach


def bootstrap_interval(
    groups: Groups, clusters: Clusters, level: float = 0.95, seed: int = 0
) -> tuple[float, float] | None:
    """Percentile bootstrap interval (Efron 1979) of the mean of groups' means: clusters are drawn again as a whole.

    What papers report most often. With a handful of clusters it is too narrow, and has no width where all values are
    the same: prefer the others.

    Returns:
      (low, high); None if a cluster is the only one of its groups: it could be drawn but once.
    """
    names = list(dict.fromkeys(name for of in clusters for name in of))
    places = {name: i for i, name in enumerate(names)}
    sums, sizes = np.zeros((2, len(names), len(groups)))
    for g, (values, of) in enumerate(zip(groups, clusters, strict=True)):
        at = [places[name] for name in of]
        np.add.at(sums[:, g], at, values)
        np.add.at(sizes[:, g], at, 1)
    # Clusters that are in the same groups stand for one another, so no group is ever left without one.
    _, stratum = np.unique(sizes > 0, axis=0, return_inverse=True)
    number = np.bincount(stratum)
    if number.min() == 1:
        return None
    generator = np.random.Generator(np.random.PCG64(seed))
    counts = np.zeros((DRAWS, len(names)))
    for i, n in enumerate(number):
        counts[:, stratum == i] = generator.multinomial(n, np.full(n, 1 / n), size=DRAWS)
    means = (counts @ sums / (counts @ sizes)).mean(1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _reach(mean: _Mean, variance: float, slope: float, level: float) -> float:
    """The distance d at which d² = t² (variance + (slope d - d²) / number)."""
    t = float(stdtrit(max(mean.number - 1, 1e-3), (1 + level) / 2))
    pull = 1 / (1 + mean.number / t / t)
    half = pull * slope / 2
    return half + math.sqrt(half * half + pull * mean.number * variance)


def _mean(groups: Groups, clusters: Clusters) -> _Mean:
    sizes = [len(values) for values in groups]
    if not sizes or not all(sizes):
        raise ValueError("There are no values.")
    if sizes != [len(names) for names in clusters]:
        raise ValueError(f"Every value has a cluster: got {sizes} values and {[*map(len, clusters)]} clusters.")
    number = len(sizes)
    value, group = np.concatenate(groups).astype(np.float64), np.repeat(np.arange(number), sizes)
    places: dict[Hashable, int] = {}
    cluster = np.array([places.setdefault(name, len(places)) for names in clusters for name in names])
    there = np.zeros((len(places), number), bool)  # Which cluster is in which group.
    there[cluster, group] = True
    many = there.sum(0)
    middle, weight = np.bincount(group, value) / sizes, 1 / number / np.array(sizes)[group]
    lonely = many[group] == 1
    unbiased = np.where(lonely, 0.0, np.sqrt(many / np.maximum(many - 1, 1))[group])
    squares = np.bincount(cluster, weight * unbiased * (value - middle[group])) ** 2
    variance = float(squares.sum())
    return _Mean(
        value=float(middle.mean()),
        variance=variance,
        number=float(1 / (np.bincount(cluster, weight) ** 2).sum()),
        alone=float((np.bincount(cluster, weight * lonely) ** 2).sum()),
        freedom=_freedom(squares, there),
    )


def _freedom(squares: np.ndarray, there: np.ndarray) -> float:
    """Clusters that are in the same groups make a stratum, with one degree of freedom less than there are of them."""
    _, stratum = np.unique(there, axis=0, return_inverse=True)
    parts, sizes = np.bincount(stratum, squares), np.bincount(stratum)
    spread = float((parts**2 / np.maximum(sizes - 1, 1)).sum())
    return float(parts.sum() ** 2 / spread) if spread else math.inf


def sign_flip(values: Sequence[float], seed: int = 0) -> float:
    """Two-sided: the share of sign assignments that give a sum at least as large, all of them if they are few.

    Args:
      values: Differences of independent things, such as of clusters. With n of them the share is at least 2^(1 - n): a
        handful of contexts cannot show a difference.
      seed: Of the draws.
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
    return generator.choice(np.array([-1.0, 1.0]), size=(DRAWS, number))


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
