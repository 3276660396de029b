"""Intervals over seeds cover as often as they say, and permutation tests reject as seldom as they say."""

import math

import numpy as np
import pytest
from scipy.stats import t as student

from safetynet.comparison.seeds import (
    groups_differ,
    over_seed_pairs,
    over_seeds,
    rate_over_seeds,
    without_each_seed,
)
from safetynet.statistics import wilson


def test_the_interval_of_a_mean_is_students() -> None:
    found = over_seeds([1.0, 2.0, 3.0])
    margin = student.ppf(0.975, 2) / math.sqrt(3)  # standard deviation 1
    assert found.value == 2.0
    assert found.seeds == 3
    assert (found.low, found.high) == pytest.approx((2 - margin, 2 + margin), rel=0.05)


@pytest.mark.parametrize("n", [3, 5])
def test_intervals_over_few_seeds_cover_the_truth_as_often_as_they_say(n: int) -> None:
    rng = np.random.default_rng(1)
    drawn = rng.normal(5.0, 2.0, size=(800, n))
    found = [over_seeds(row.tolist()) for row in drawn]
    covered = np.mean([one.low <= 5.0 <= one.high for one in found])
    assert 0.95 - 3 * math.sqrt(0.95 * 0.05 / 800) <= covered <= 0.95 + 3 * math.sqrt(0.95 * 0.05 / 800)


def test_one_seed_has_no_interval_and_none_no_value() -> None:
    assert over_seeds([0.5])[0] == 0.5
    assert np.isnan(over_seeds([0.5])[1:3]).all()
    assert np.isnan(over_seeds([float("nan")])[0])
    assert over_seeds([float("nan"), 1.0, 2.0]).seeds == 2


def test_an_interval_stays_within_the_limits_of_its_quantity() -> None:
    found = over_seeds([0.0, 0.5, 1.0], (0.0, 1.0))
    assert (found.low, found.high) == (0.0, 1.0)


def test_seeds_that_agree_leave_the_rates_own_uncertainty() -> None:
    found = rate_over_seeds([0, 0, 0], [80, 80, 80])
    assert found.value == 0.0
    assert (found.low, found.high) == wilson(0, 240)


def test_seeds_that_disagree_are_less_certain_than_their_rows_would_be() -> None:
    found = rate_over_seeds([10, 40, 70], [80, 80, 80])
    assert found.low < wilson(120, 240)[0]
    assert found.high > wilson(120, 240)[1]


def test_a_rate_of_one_seed_has_no_interval_either() -> None:
    assert np.isnan(rate_over_seeds([3], [80])[1:3]).all()


def test_pairs_of_seeds_of_two_groups_are_resampled_on_both_sides() -> None:
    even = over_seed_pairs(np.full((3, 3), 0.4))
    assert even[:3] == pytest.approx((0.4, 0.4, 0.4))
    ours = over_seed_pairs(np.array([[0.1, 0.1, 0.1], [0.5, 0.5, 0.5], [0.9, 0.9, 0.9]]))
    assert (ours.value, ours.low, ours.high) == (pytest.approx(0.5), pytest.approx(-0.49, abs=0.06), 1.0)
    assert np.isnan(over_seed_pairs(np.array([[0.1, 0.9]]))[1:3]).all()


def test_pairs_within_a_group_have_the_jackknifes_interval() -> None:
    matrix = np.array([[1.0, 0.2, 0.4], [0.2, 1.0, 0.6], [0.4, 0.6, 1.0]])
    found = without_each_seed(matrix)
    error = math.sqrt(2 / 3 * (0.2**2 + 0.2**2))  # left out in turn: 0.6, 0.4, 0.2
    assert found.value == pytest.approx(0.4)
    assert found.low == pytest.approx(max(-1.0, 0.4 - student.ppf(0.975, 2) * error))
    assert np.isnan(without_each_seed(matrix[:2, :2])[1:3]).all()


def test_two_separate_groups_of_three_have_the_smallest_p_that_six_runs_allow() -> None:
    p = groups_differ([1, 2, 3, 7, 8, 9], list("aaabbb"))
    assert p == pytest.approx(2 / 20, abs=0.01)  # of 20 ways to split them this one and its mirror


def test_a_difference_within_every_seed_is_seen_through_the_differences_between_seeds() -> None:
    groups, seeds = list("aaaabbbb"), [0, 1, 2, 3] * 2
    values = [0.0, 100.0, 200.0, 300.0, 1.0, 101.0, 201.0, 301.0]
    assert groups_differ(values, groups, seeds) == pytest.approx(2 / 16, abs=0.01)
    assert groups_differ(values, groups) > 0.5


def test_runs_that_do_not_differ_are_called_different_as_seldom_as_said() -> None:
    rng = np.random.default_rng(2)
    groups, seeds = [name for name in "abcde" for _ in range(3)], [0, 1, 2] * 5
    # runs of one seed share something
    drawn = rng.normal(size=(300, 15)) + 2 * np.tile(rng.normal(size=(300, 3)), 5)
    p = [groups_differ(row.tolist(), groups, seeds, permutations=199) for row in drawn]
    assert np.mean(np.array(p) <= 0.05) <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 300)
    assert np.mean(p) == pytest.approx(0.5, abs=0.07)


def test_nothing_is_tested_where_only_one_group_has_several_runs() -> None:
    assert np.isnan(groups_differ([1, 2, 3], ["a", "a", "b"]))
