"""Intervals against values known from elsewhere, and their coverage on known truth."""

import math

import numpy as np
import pytest
from scipy.stats import binomtest
from sklearn.metrics import roc_auc_score

from safetynet.statistics import (
    auroc,
    bootstrap_interval,
    clopper_pearson,
    clustered_wilson,
    draw_counts,
    resampled_auroc,
    wilson,
)


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (81, 263, 0.2553, 0.3662), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_gives_the_published_values(successes, n, low, high):
    # the last two are the examples of Newcombe (1998), table I, method 3
    assert wilson(successes, n) == pytest.approx((low, high), abs=1e-4)


@pytest.mark.parametrize(("method", "interval"), [("wilson", wilson), ("exact", clopper_pearson)])
def test_intervals_of_rates_are_those_of_scipy(method, interval):
    for successes, n in [(0, 1), (1, 1), (0, 80), (3, 80), (80, 80), (1234, 2973)]:
        theirs = binomtest(successes, n).proportion_ci(method=method)
        assert interval(successes, n) == pytest.approx(tuple(theirs), abs=1e-11)


def test_wilson_without_rows_knows_nothing():
    assert wilson(0, 0) == (0.0, 1.0)


@pytest.mark.parametrize(("successes", "n"), [(-1, 3), (4, 3)])
def test_wilson_refuses_impossible_counts(successes, n):
    with pytest.raises(ValueError, match=f"successes is {successes}, outside 0..{n}"):
        wilson(successes, n)


def test_wilson_covers_the_true_rate_about_as_often_as_it_says():
    draws = np.random.default_rng(0).binomial(40, 0.15, size=2000)
    covered = [low <= 0.15 <= high for low, high in (wilson(int(k), 40) for k in draws)]
    assert 0.93 <= np.mean(covered) <= 0.98


@pytest.mark.parametrize(("rate", "likeness"), [(0.2, 0.5), (0.05, 0.3), (0.9, 0.8)])
def test_an_interval_over_clusters_covers_where_one_over_all_trials_does_not(rate, likeness):
    """Beta-binomial clusters; `likeness` is the correlation of two trials of one cluster."""
    rng, weight = np.random.default_rng(0), 1 / likeness - 1
    draws = rng.binomial(10, rng.beta(rate * weight, (1 - rate) * weight, size=(1000, 200)))
    clustered = [clustered_wilson(counts / 10, 10) for counts in draws]
    plain = [wilson(int(counts.sum()), 2000) for counts in draws]
    covered, by_trials = (np.mean([low <= rate <= high for low, high in each]) for each in (clustered, plain))
    assert 0.92 <= covered <= 0.98
    assert by_trials < 0.8


def test_an_interval_over_clusters_is_wilsons_where_a_cluster_is_one_trial_or_all_are_alike():
    trials = np.repeat([1.0, 0.0], [30, 70])
    assert clustered_wilson(trials, 1) == pytest.approx(wilson(30, 100), abs=2e-3)
    assert clustered_wilson(np.zeros(40), 10) == wilson(0, 40), "nothing is known of how they differ"
    assert clustered_wilson(np.full(40, 0.5), 10) == wilson(200, 400), "clusters that do not differ at all"
    assert clustered_wilson(np.ones(1), 10) == wilson(1, 1)
    assert clustered_wilson(np.array([]), 10) == (0.0, 1.0)


def test_bootstrap_of_a_mean_agrees_with_the_normal_interval():
    x = np.random.default_rng(0).normal(5, 2, size=400)
    low, high = bootstrap_interval(np.mean, x)
    margin = 1.96 * x.std(ddof=1) / math.sqrt(len(x))
    assert (low, high) == pytest.approx((x.mean() - margin, x.mean() + margin), abs=0.02)


def test_bootstrap_keeps_the_columns_of_a_row_together():
    x = np.random.default_rng(0).exponential(size=50)

    def ratio(a, b, axis=-1):
        return a.sum(axis=axis) / b.sum(axis=axis)

    assert bootstrap_interval(ratio, 3 * x, x) == pytest.approx((3, 3))


def test_bootstrap_is_the_same_for_the_same_seed():
    x = np.random.default_rng(0).normal(size=30)
    assert bootstrap_interval(np.mean, x, seed=1) == bootstrap_interval(np.mean, x, seed=1)
    assert bootstrap_interval(np.mean, x, seed=1) != bootstrap_interval(np.mean, x, seed=2)


@pytest.mark.parametrize("values", [[], [1.0], [1.0, math.inf], [1.0, math.nan, 2.0]])
def test_bootstrap_of_too_few_or_not_finite_values_is_unknown(values):
    assert all(math.isnan(bound) for bound in bootstrap_interval(np.mean, np.array(values)))


def test_each_resample_draws_as_many_rows_as_there_are():
    counts = draw_counts(7, resamples=50)
    assert counts.shape == (50, 7) and (counts.sum(1) == 7).all()


def test_aurocs_are_those_of_scikit_learn_with_ties():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 5, 40), rng.integers(0, 4, 60)
    assert auroc(a, b) == pytest.approx(roc_auc_score(np.r_[np.ones(40), np.zeros(60)], np.r_[a, b]))


def test_weighted_auroc_is_that_of_repeated_rows():
    rng = np.random.default_rng(1)
    scores, labels = rng.integers(0, 5, 30).astype(float), np.arange(30) % 3 == 0
    weights = rng.integers(0, 4, (6, 30))
    expected = [roc_auc_score(np.repeat(labels, w), np.repeat(scores, w)) for w in weights]
    np.testing.assert_allclose(resampled_auroc(scores, labels, weights), expected)
    assert resampled_auroc(scores, labels, labels[None].astype(int)) == [0.5]  # one class alone


def test_the_ends_of_an_interval_are_exact():
    for n in range(1, 300):
        assert wilson(0, n)[0] == 0.0
        assert wilson(n, n)[1] == 1.0
