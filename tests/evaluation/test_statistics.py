"""Intervals and tests, against scipy's and against what can be counted by hand."""

import numpy as np
import pytest
import scipy.stats

from kvjax.evaluation.statistics import bootstrap, differs, macro, paired, wilson


def test_an_interval_agrees_with_scipys():
    values = np.random.default_rng(0).normal(3, 2, 40)
    low, high = bootstrap(values.tolist())
    other = scipy.stats.bootstrap((values,), np.mean, method="percentile", n_resamples=20000, rng=1).confidence_interval
    width = other.high - other.low
    assert abs(low - other.low) < width / 15 and abs(high - other.high) < width / 15


def test_intervals_cover_the_truth_as_often_as_they_say():
    draw = np.random.default_rng(1)
    hits = sum(low <= 0.4 <= high for low, high in (bootstrap(draw.binomial(1, 0.4, 60).tolist()) for _ in range(300)))
    assert 0.90 < hits / 300 < 0.985


def test_samples_of_one_context_count_as_one():
    contexts = np.random.default_rng(2).normal(0, 1, 12)
    values, clusters = np.repeat(contexts, 8).tolist(), np.repeat(np.arange(12), 8).tolist()
    assert bootstrap(values, clusters) == pytest.approx(bootstrap(contexts.tolist()))
    low, high = bootstrap(values)
    wide = bootstrap(values, clusters)
    assert (wide[1] - wide[0]) > 2 * (high - low)


def test_contexts_with_more_questions_weigh_more_and_no_mean_leaves_the_values():
    values, clusters = [1.0] * 9 + [0.0] + [1.0] * 3, ["a"] * 9 + ["b"] + ["c"] * 3
    low, high = bootstrap(values, clusters)
    assert 0 <= low and high == 1.0  # A draw of the large context alone is all ones, and no more.


def test_no_difference_is_ever_certain():
    assert 0 < paired([1.0] * 40, [0.0] * 40).p < 0.001


def test_one_context_says_nothing():
    assert bootstrap([0.1, 0.9], ["a", "a"]) == (-np.inf, np.inf)
    assert paired([1.0, 1.0], [0.0, 0.0], ["a", "a"]).p == 1.0


def test_a_paired_difference():
    a, b = [1.0, 1.0, 1.0, 1.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    found = paired(a, b)
    assert found.difference == pytest.approx(5 / 6)
    # Of 64 assignments of signs, those with all five alike, whatever the sign of the tie: 2 * 2.
    assert found.p == pytest.approx(4 / 64)
    assert found.low > 0


def test_many_pairs_agree_with_scipy():
    a = np.random.default_rng(3).normal(0.4, 1, 30)
    found = paired(a.tolist(), [0.0] * 30)
    other = scipy.stats.permutation_test(
        (a, np.zeros(30)), lambda x, y, axis: (x - y).mean(axis), permutation_type="samples", n_resamples=9999, rng=0
    )
    assert found.p == pytest.approx(other.pvalue, abs=0.015)


def test_holm():
    assert differs([0.01, 0.04, 0.03, 0.005]) == [True, False, False, True]
    assert differs([]) == []
    assert differs([0.04]) == [True]


def test_chance_alone_is_rarely_called_a_difference():
    draw = np.random.default_rng(4)
    wrong = 0
    for _ in range(100):
        full = draw.binomial(1, 0.6, 30).tolist()
        wrong += any(differs([paired(draw.permutation(full).tolist(), full).p for _ in range(5)]))
    assert wrong <= 10


def test_shares_near_one_keep_a_width():
    low, high = wilson(12, 12)
    assert (low, high) == (pytest.approx(0.7575, abs=1e-3), 1.0)


def test_the_mean_of_tasks_is_drawn_within_tasks():
    # The two tasks differ by much and have no spread of their own: their mean has none either.
    assert macro([[0.0] * 5, [1.0] * 5], [range(5), range(5)]) == (0.5, 0.5)
    assert macro([[0.0] * 5, [1.0]], [range(5), range(1)]) == (-np.inf, np.inf)  # Nothing is known of the second.


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="no values"):
        bootstrap([])
    with pytest.raises(ValueError, match="2 values and 1 clusters"):
        bootstrap([1.0, 2.0], ["a"])
    with pytest.raises(ValueError, match="got 1 and 2"):
        paired([1.0], [1.0, 2.0])
