"""Intervals and tests, against scipy's and against what can be counted by hand, and how often intervals are right."""

import numpy as np
import pytest
import scipy.stats

from kvjax.evaluation.statistics import (
    bootstrap_interval,
    difference_interval,
    differs,
    share_interval,
    sign_flip,
    t_interval,
)

TIES = [-1.0, 1.0] + 18 * [0.0]  # Differences of which few are there.
LEADERBOARD = (5, 5, 3, 3, 3, 3, 3, 2, 2, 2, 2)  # Contexts of each job.


def own(groups):
    """A cluster for every value."""
    return [[(i, j) for j in range(len(values))] for i, values in enumerate(groups)]


def interval(groups, of=share_interval):
    return of(groups, own(groups))


def coverage(interval, sizes, rates, draw, times=200, repeats=1):
    """How often an interval has the mean of the rates, over draws of values [size, repeats] and clusters of repeats.

    `rates` are of each job; None: drawn anew each time, uniformly.
    """
    random = np.random.default_rng(0)
    clusters = [[(i, j) for j in range(size) for _ in range(repeats)] for i, size in enumerate(sizes)]
    hits = 0
    for _ in range(times):
        truth = random.random(len(sizes)) if rates is None else np.resize(np.asarray(rates, float), len(sizes))
        values = [np.repeat(draw(random, p, n), repeats).tolist() for p, n in zip(truth, sizes, strict=True)]
        low, high = interval(values, clusters)
        hits += low - 1e-9 <= truth.mean() <= high + 1e-9
    return hits / times


def ones(random, rate, size):
    return random.binomial(1, rate, size)


def fifths(random, rate, size):
    return random.binomial(5, rate, size) / 5


# Of 200 intervals that are right 95 times of 100, 91 % or more are right, but for one in 200 such tests.
@pytest.mark.parametrize("rates", [None, [0.02], [0.05], [0.5], [0.95], [0, 1, 0.5, 0.05, 0.95]], ids=str)
@pytest.mark.parametrize(
    "sizes", [LEADERBOARD, (20,), (3, 3), (2,) * 15, (10,) * 4, (1, 1, 5, 5, 10), (1,)], ids=lambda sizes: str(sizes)
)
def test_intervals_of_scores_cover_the_truth_as_often_as_they_say(sizes, rates):
    assert coverage(share_interval, sizes, rates, ones) >= 0.91
    assert coverage(share_interval, sizes, rates, fifths) >= 0.91


def test_intervals_of_scores_cover_the_truth_in_94_of_100_cases():
    covered = [
        coverage(share_interval, LEADERBOARD, rates, ones, times=2000) for rates in (None, [0.05], [0.5], [0.95])
    ]
    assert min(covered) >= 0.94
    # They are no wider than they must be where there is much to go by.
    assert coverage(share_interval, (200,), [0.3], ones, times=1000) <= 0.97


def test_intervals_cover_the_truth_where_one_context_has_many_questions():
    assert coverage(share_interval, LEADERBOARD, None, ones, repeats=4) >= 0.91
    assert coverage(share_interval, (8, 8), [0.1], ones, repeats=4) >= 0.91


def test_intervals_cover_the_truth_where_two_tasks_share_their_contexts():
    random, hits = np.random.default_rng(1), 0
    names = [list(range(6)), list(range(6)), [*"abcdef"]]
    for _ in range(300):
        shared, other = random.binomial(1, 0.4, 6).tolist(), random.binomial(1, 0.4, 6).tolist()
        low, high = share_interval([shared, shared, other], names)
        hits += low <= 0.4 <= high
    assert 0.93 <= hits / 300


def test_the_bootstrap_is_scipys_and_draws_contexts_as_a_whole():
    values = np.random.default_rng(0).random(30).tolist()
    low, high = interval([values], bootstrap_interval)
    theirs = scipy.stats.bootstrap((values,), np.mean, n_resamples=10_000, method="percentile", random_state=1)
    assert (low, high) == pytest.approx(theirs.confidence_interval, abs=0.01)
    twice = bootstrap_interval([[v for v in values for _ in range(2)]], [[i for i in range(30) for _ in range(2)]])
    assert twice == pytest.approx((low, high), abs=0.01)
    both = bootstrap_interval([values, values], [list(range(30))] * 2)  # The same contexts: no more is known.
    assert both == pytest.approx((low, high), abs=0.01)
    apart = interval([values, values], bootstrap_interval)
    assert apart[1] - apart[0] == pytest.approx((high - low) / 2**0.5, rel=0.1)
    assert interval([[1.0], values], bootstrap_interval) is None


def test_the_bootstrap_is_too_sure_of_itself_with_few_contexts():
    """Why it is not the interval that is shown."""
    assert coverage(bootstrap_interval, LEADERBOARD, [0.05], ones, times=100) < 0.88
    assert interval([[0.0] * 5] * 3, bootstrap_interval) == (0, 0)


def test_intervals_of_differences_cover_the_truth():
    def draw(random, rate, size):
        return random.choice([-1.0, 0.0, 1.0], size, p=[max(-rate, 0), 1 - abs(rate), max(rate, 0)])

    for sizes in (LEADERBOARD, (20,), (3, 3), (1, 4, 4)):
        for rates in ([0.0], [-0.05], [-0.5], [-0.9, 0.1]):
            assert coverage(difference_interval, sizes, rates, draw) >= 0.91
        # Gains and losses are alike, and few: where only some of them show, the others may still be there.
        rare = coverage(difference_interval, sizes, [0.0], lambda random, _, n: random.choice(TIES, n))
        assert rare >= 0.91

    def likelihood(random, rate, size):
        return random.normal(rate, 0.3 + rate, size)

    for sizes in (LEADERBOARD, (20,), (2,), (3, 3)):
        assert coverage(t_interval, sizes, [0.1, 2.0], likelihood, times=1000) == pytest.approx(0.95, abs=0.025)


def test_an_interval_of_one_share_is_wilsons():
    for right, number in ((7, 20), (0, 12), (30, 30)):
        low, high = interval([[1.0] * right + [0.0] * (number - right)])
        z = scipy.stats.t.ppf(0.975, number - 1)
        level = 2 * scipy.stats.norm.cdf(z) - 1
        other = scipy.stats.binomtest(right, number).proportion_ci(level, method="wilson")
        # The variance is the unbiased one: n / (n - 1) of Wilson's.
        assert (low, high) == pytest.approx((other.low, other.high), abs=0.35 / number)


def test_no_interval_is_of_no_width():
    zeros, ones_ = interval([[0.0] * 2] * 11), interval([[1.0] * 2] * 11)
    assert zeros[0] == 0 and 0.1 < zeros[1] < 0.25
    assert ones_ == pytest.approx((1 - zeros[1], 1.0))
    assert interval([[0.5] * 20])[1] - interval([[0.5] * 20])[0] > 0.1  # Values between may still hide.
    low, high = interval([[0.0] * 9] * 3, difference_interval)
    assert low == -high and 0.1 < high < 0.2
    assert interval([[0.3]]) == pytest.approx((0, 1))  # One context says nothing.


def test_tasks_of_one_context_may_vary_as_much_as_they_can():
    values = [0.0, 1.0] * 6
    assert interval([[value] for value in values]) == pytest.approx(interval([values]), abs=0.02)
    # Eight tasks of one context among sixteen: their part of the error alone is at most 1 / 2 / 16 * sqrt(8).
    low, high = interval([values] * 8 + [[0.5]] * 8)
    assert high - low > 2 * 1.96 * 8**0.5 / 32 * 0.95
    low, high = interval([[2 * value - 1] for value in values], difference_interval)
    assert -low == high > 0.6


def test_samples_of_one_context_count_as_one():
    contexts = np.random.default_rng(2).random(12)
    values, clusters = np.repeat(contexts, 8).tolist(), np.repeat(np.arange(12), 8).tolist()
    assert share_interval([values], [clusters]) == pytest.approx(interval([contexts.tolist()]))
    low, high = interval([values])
    wide = share_interval([values], [clusters])
    assert (wide[1] - wide[0]) > 2 * (high - low)
    # The same contexts in two tasks are no more contexts than in one.
    twice = share_interval([contexts.tolist()] * 2, [range(12)] * 2)
    assert twice == pytest.approx(interval([contexts.tolist()]))
    assert t_interval([contexts.tolist()] * 2, [range(12)] * 2) == pytest.approx(
        interval([contexts.tolist()], t_interval)
    )


def test_the_spread_of_tasks_is_none_of_their_mean():
    apart = interval([[0.0] * 30, [1.0] * 30])
    assert apart[1] - apart[0] < 0.15 < np.diff(interval([[0.0] * 30 + [1.0] * 30]))[0]
    assert interval([[1.0, 2.0, 3.0], [11.0, 12.0, 13.0]], t_interval) == pytest.approx(
        (7 - 2.776445 / 6**0.5, 7 + 2.776445 / 6**0.5)
    )


def test_an_interval_without_bounds_is_students():
    values = np.random.default_rng(0).normal(3, 2, 14)
    other = scipy.stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert interval([values.tolist()], t_interval) == pytest.approx((other.low, other.high))
    assert interval([[1.0, 2.0], [3.0]], t_interval) is None


def test_sign_flips_are_counted():
    # Of 64 assignments of signs, those with all five alike, whatever the sign of the tie: 2 * 2.
    assert sign_flip([1.0] * 5 + [0.0]) == pytest.approx(4 / 64)
    assert sign_flip([1.0]) == 1.0
    assert 0 < sign_flip([1.0] * 40) < 0.001  # No difference is ever certain.


def test_many_sign_flips_agree_with_scipy():
    a = np.random.default_rng(3).normal(0.4, 1, 30)
    other = scipy.stats.permutation_test(
        (a, np.zeros(30)), lambda x, y, axis: (x - y).mean(axis), permutation_type="samples", n_resamples=9999, rng=0
    )
    assert sign_flip(a.tolist()) == pytest.approx(other.pvalue, abs=0.015)


def test_holm():
    assert differs([0.01, 0.04, 0.03, 0.005]) == [True, False, False, True]
    assert differs([]) == []
    assert differs([0.04]) == [True]


def test_chance_alone_is_rarely_called_a_difference():
    draw = np.random.default_rng(4)
    wrong = 0
    for _ in range(100):
        full = draw.binomial(1, 0.6, 30)
        wrong += any(differs([sign_flip((draw.permutation(full) - full).tolist()) for _ in range(5)]))
    assert wrong <= 10


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="no values"):
        share_interval([], [])
    with pytest.raises(ValueError, match="no values"):
        share_interval([[]], [[]])
    with pytest.raises(ValueError, match=r"\[2\] values and \[1\] clusters"):
        share_interval([[1.0, 0.0]], [["a"]])
    with pytest.raises(ValueError, match="from 0 to 1"):
        share_interval([[50.0]], [["a"]])
