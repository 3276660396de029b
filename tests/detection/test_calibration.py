"""The promise: the rate that is named is the rate that is realised, and no more is named than is known."""

import numpy as np
import pandas as pd
import pytest
from scipy.stats import binom

from safetynet.detection.calibration import (
    Calibration,
    Conformal,
    check_rate,
    fpr_estimate,
    fuse,
    smallest_rate,
)
from safetynet.errors import InputError
from safetynet.statistics import clopper_pearson

DETECTORS = 8


def scores(n, seed, correlation):
    """Scores of eight detectors on clean samples, all pairs equally correlated."""
    rng = np.random.default_rng(seed)
    shared = rng.standard_normal((n, 1))
    own = rng.standard_normal((n, DETECTORS))
    values = np.sqrt(correlation) * shared + np.sqrt(1 - correlation) * own
    return {f"d{i}": values[:, i] for i in range(DETECTORS)}


@pytest.mark.parametrize("how", ["fisher", "cauchy", "max"])
@pytest.mark.parametrize("correlation", [0.0, 0.7])
@pytest.mark.parametrize("rate", [0.01, 0.05])
def test_the_fused_rate_is_kept_whatever_the_correlation(how, correlation, rate):
    # Mean over calibrations: conformal coverage is a statement about that mean.
    rates = []
    for seed in range(40):
        calibration = Calibration.fit(
            scores(600, 3 * seed, correlation), scores(600, 3 * seed + 1, correlation), how
        )
        p = calibration.p_values(scores(500, 3 * seed + 2, correlation))["fused"]
        rates.append((p <= rate).mean())
    spread = np.sqrt(rate * (1 - rate) / 600 + rate * (1 - rate) / 500) / np.sqrt(40)
    assert abs(np.mean(rates) - rate) < 4 * spread + 1 / 601


def test_plain_or_of_uncalibrated_detectors_breaks_the_rate_and_the_fused_one_does_not():
    calibration = Calibration.fit(scores(2000, 0, 0.0), scores(2000, 1, 0.0))
    p = calibration.p_values(scores(4000, 2, 0.0))
    plain = (p.drop(columns="fused").min(axis=1) <= 0.01).mean()
    assert plain > 0.06
    assert (p["fused"] <= 0.01).mean() < 0.02


def test_the_realised_rate_does_not_grow_with_the_number_of_tested_prompts():
    yardstick = Conformal.fit(np.random.default_rng(0).standard_normal(2000))
    realised = [
        (yardstick.p_values(np.random.default_rng(1).standard_normal(n)) <= 0.05).mean()
        for n in (1000, 100_000)
    ]
    assert realised == pytest.approx([0.05, 0.05], abs=0.02)


def test_conformal_p_values_are_the_formula_with_ties_counted_against_an_alarm():
    yardstick = Conformal.fit(np.array([1.0, 2.0, 2.0, 3.0]))
    np.testing.assert_allclose(yardstick.p_values(np.array([0.0, 2.0, 3.5])), [1.0, 0.8, 0.2])


def test_the_smoothed_tail_orders_what_lies_above_all_clean_scores():
    yardstick = Conformal.fit(np.random.default_rng(0).standard_normal(200))
    p = yardstick.smoothed(np.array([0.0, 2.0, 5.0, 10.0, 1e6]))
    assert (np.diff(p) < 0).all()
    assert p[-1] > 0
    assert p[0] == yardstick.p_values(np.array([0.0]))[0]
    assert Conformal.fit(np.zeros(50)).smoothed(np.array([1.0])) == pytest.approx(1 / 51)


def test_a_rate_is_kept_in_each_kind_and_met_in_the_most_suspect_one():
    realised = {"plain": [], "odd": []}
    for seed in range(40):
        rng = np.random.default_rng(seed)
        scores = np.r_[rng.standard_normal(1500), rng.standard_normal(500) + 1]
        yardstick = Conformal.fit(scores, ["plain"] * 1500 + ["odd"] * 500)
        assert yardstick.n == 500
        for kind, shift in (("plain", 0), ("odd", 1)):
            p = yardstick.p_values(rng.standard_normal(2000) + shift)
            realised[kind].append((p <= 0.05).mean())
        pooled = Conformal.fit(scores).p_values(rng.standard_normal(2000) + 1)
        assert (pooled <= 0.05).mean() > 0.08
    assert np.mean(realised["odd"]) == pytest.approx(0.05, abs=0.005)
    assert 0 < np.mean(realised["plain"]) < 0.02


def test_the_smoothed_tail_of_several_kinds_is_that_of_the_least_suspect_p_value():
    rng = np.random.default_rng(0)
    low, high = rng.standard_normal(400), rng.standard_normal(300) + 1
    both = Conformal.fit(np.r_[low, high], ["a"] * 400 + ["b"] * 300)
    at = np.array([-1.0, 0.5, 2.5, 6.0])
    alone = [Conformal.fit(own).smoothed(at) for own in (low, high)]
    np.testing.assert_array_equal(both.smoothed(at), np.maximum(*alone))


@pytest.mark.parametrize("method", ["split", "cross"])
def test_the_fused_statistic_is_calibrated_kind_by_kind(method):
    rates = {"plain": [], "odd": []}
    for seed in range(20):
        rng = np.random.default_rng(seed)
        kinds = np.array(["plain", "odd"] * 500)
        shift = np.where(kinds == "odd", 1.0, 0.0)

        def drawn(rng=rng, shift=shift):
            return {name: rng.standard_normal(1000) + shift for name in ("a:x", "b:y")}

        if method == "split":
            calibrated = Calibration.fit(drawn(), drawn(), kinds=(kinds, kinds))
        else:
            calibrated = Calibration.cross_fitted(drawn(), rng.integers(0, 5, 1000), kinds=kinds)
        alarm = calibrated.p_values(drawn())["fused"].to_numpy() <= 0.05
        for kind, own in rates.items():
            own.append(alarm[kinds == kind].mean())
    assert np.mean(rates["odd"]) == pytest.approx(0.05, abs=0.012)
    assert np.mean(rates["plain"]) < 0.02


def test_each_kind_weighs_the_detectors_by_itself_and_the_larger_p_value_counts():
    rng = np.random.default_rng(0)
    kinds = np.array(["plain", "odd"] * 600)

    def drawn(shift=0.0):
        odd = np.where(kinds == "odd", 3.0, 1.0)
        return {"a:x": rng.standard_normal(1200) * odd + shift, "b:y": rng.standard_normal(1200)}

    first, second, fresh = drawn(), drawn(), drawn(4.0)
    both = Calibration.fit(first, second, kinds=(kinds, kinds)).p_values(fresh)

    def alone(kind):
        parts = ({name: own[kinds == kind] for name, own in part.items()} for part in (first, second))
        return Calibration.fit(*parts).p_values(fresh)

    pd.testing.assert_frame_equal(both, np.maximum(alone("plain"), alone("odd")))


def test_a_kind_that_one_part_of_the_split_lacks_is_refused_by_name():
    some = {"a:x": np.arange(9.0), "b:y": np.arange(9.0)}
    for kinds in (("p" * 9, "p" * 8 + "q"), ("p" * 8 + "q", "p" * 9)):
        with pytest.raises(InputError, match="'q'"):
            Calibration.fit(some, some, kinds=tuple(np.array(list(own)) for own in kinds))


def test_one_detector_is_calibrated_on_both_parts_and_keeps_its_rate():
    rates = []
    for seed in range(200):
        rng = np.random.default_rng(seed)
        first, second, fresh = ({"a:x": rng.standard_normal(n)} for n in (100, 60, 500))
        calibrated = Calibration.fit(first, second)
        assert calibrated.fused.n == 160
        rates.append((calibrated.p_values(fresh)["fused"] <= 0.05).mean())
        scores = np.r_[first["a:x"], second["a:x"]]
        direct = (1 + (scores[None] >= fresh["a:x"][:, None]).sum(1)) / 161
        tail = direct <= 0.05
        np.testing.assert_allclose(calibrated.p_values(fresh)["fused"][tail], direct[tail])
    # 8 of 161: the largest rank that does not exceed 5%. Three standard errors over 200 draws.
    assert np.mean(rates) == pytest.approx(8 / 161, abs=3 * np.std(rates) / np.sqrt(200))
    two = Calibration.fit({"a:x": np.ones(9), "b:y": np.ones(9)}, {"a:x": np.ones(7), "b:y": np.ones(7)})
    assert two.fused.n == 7


def test_cross_fitting_keeps_the_rate_with_few_samples():
    rates = []
    for seed in range(60):
        folds = np.arange(200) % 5
        calibration = Calibration.cross_fitted(scores(200, 2 * seed, 0.3), folds)
        rates.append((calibration.p_values(scores(300, 2 * seed + 1, 0.3))["fused"] <= 0.05).mean())
    assert np.mean(rates) == pytest.approx(0.05, abs=0.012)


def test_no_rate_is_claimed_that_the_samples_cannot_carry():
    assert smallest_rate(499) == pytest.approx(0.01)
    check_rate(0.01, 499)
    with pytest.raises(InputError, match=r"0\.01 needs 499 clean calibration samples, and there are 498"):
        check_rate(0.01, 498)
    with pytest.raises(InputError, match=r"claim 0\.05 or more"):
        check_rate(0.001, 99)
    with pytest.raises(InputError, match="is no rate"):
        check_rate(1.5, 1000)


def test_the_estimate_carries_its_exact_interval():
    p = np.r_[np.full(12, 0.001), np.full(988, 0.5)]
    found = fpr_estimate(p, 0.01)
    assert (found.alarms, found.n, found.rate) == (12, 1000, 0.012)
    assert binom.sf(11, 1000, found.low) == pytest.approx(0.025)
    assert binom.cdf(12, 1000, found.high) == pytest.approx(0.025)
    assert "1.20% of 1000 fresh clean prompts" in str(found)
    assert clopper_pearson(0, 100)[0] == 0
    assert clopper_pearson(100, 100)[1] == 1
    with pytest.raises(InputError, match="no fresh clean samples"):
        fpr_estimate(np.array([]), 0.01)


def test_one_detector_that_sees_is_enough_among_many_that_see_nothing():
    def seen_by_one(n: int, seed: int) -> dict[str, np.ndarray]:
        found = scores(n, seed, 0.7)
        return found | {"d0": found["d0"] + 6}

    clean = scores(2000, 0, 0.7), scores(2000, 1, 0.7)
    caught = {
        how: (Calibration.fit(*clean, how).p_values(seen_by_one(500, 2))["fused"] <= 0.01).mean()
        for how in ("max", "fisher")
    }
    assert caught["max"] > 0.95
    assert caught["fisher"] < 0.5
    assert Calibration.fit(*clean).how == "max"


def test_many_detectors_of_one_view_leave_another_view_its_share_of_the_rate():
    def named(found, view):
        return {f"{name}:{view if name == 'd0' else 'last'}": values for name, values in found.items()}

    def seen_by_one(n, seed):
        found = scores(n, seed, 0.3)
        return found | {"d0": found["d0"] + 3}

    caught, rates = {}, {}
    for view in ("last", "divergence"):
        clean = [named(scores(4000, seed, 0.3), view) for seed in range(3)]
        calibration = Calibration.fit(*clean[:2])
        caught[view] = (calibration.p_values(named(seen_by_one(2000, 3), view))["fused"] <= 0.01).mean()
        rates[view] = (calibration.p_values(clean[2])["fused"] <= 0.01).mean()
    assert caught["divergence"] > caught["last"] + 0.05
    assert max(rates.values()) < 0.02


def test_fusions_grow_with_evidence_and_stay_finite():
    p = np.array([[0.5, 0.5], [0.5, 0.01], [1e-300, 0.5]])
    for how in ("fisher", "cauchy", "max"):
        statistic = fuse(p, how, np.array([0.5, 0.5]))
        assert np.isfinite(statistic).all()
        assert (np.diff(statistic) > 0).all()


def test_scores_that_are_no_numbers_calibrate_nothing():
    for bad in ([], [1.0, float("nan")]):
        with pytest.raises(InputError, match="clean scores that are numbers"):
            Conformal.fit(np.array(bad))
