"""How fast a backdoor is planted, on curves whose crossings can be read off."""

from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest

from safetynet.comparison import speed
from safetynet.comparison.speed import crossing


@pytest.fixture
def curve(tables: Callable[..., dict[str, pd.DataFrame]]) -> Callable[[dict[int, float]], pd.DataFrame]:
    """`curve({0: 0.0, 50: 1.0})` is a table of dynamics with this ASR by step."""
    line = tables()["dynamics_backdoored"].iloc[0].to_dict()

    def make(values: dict[int, float]) -> pd.DataFrame:
        return pd.DataFrame(
            [line | {"step": step, "epoch": step / 100, "value": value} for step, value in values.items()]
        )

    return make


def test_a_crossing_lies_on_the_line_between_two_measurements() -> None:
    assert crossing([0, 20, 40], [0.0, 0.4, 0.8], 0.5) == (25.0, 20.0, 40.0)
    assert crossing([0, 20, 40], [0.0, 0.5, 0.8], 0.5) == (20.0, 0.0, 20.0)


def test_a_curve_that_starts_above_has_crossed_at_its_start() -> None:
    assert crossing([10, 20], [0.9, 1.0], 0.5) == (10.0, 10.0, 10.0)


def test_a_curve_that_never_crosses_is_censored_at_its_end() -> None:
    found = crossing([0, 20, 40], [0.0, 0.4, 0.49], 0.5)
    assert np.isnan(found.at)
    assert found.after == 40.0


def test_the_first_crossing_counts_and_a_relapse_is_told(subject: Callable, curve: Callable) -> None:
    table = curve({0: 0.0, 20: 0.6, 40: 0.3, 60: 0.9})
    found = speed.speeds([subject(dynamics_backdoored=table)]).set_index("threshold")
    assert found.loc[0.5, "steps"] == pytest.approx(20 * 0.5 / 0.6)
    assert not found.loc[0.5, "held"]
    assert found.loc[0.95, "censored"]


def test_steps_and_poisoned_rows_come_from_the_runs_own_tables(subject: Callable) -> None:
    found = speed.speeds([subject()]).set_index("threshold")
    assert found.loc[0.5, "steps"] == pytest.approx(25.0)
    assert found.loc[0.95, "steps"] == pytest.approx(55.0)
    # a quarter of an epoch of 200 triggered training rows
    assert found.loc[0.5, "rows"] == pytest.approx(50.0)
    assert found.loc[0.5, ["between_low", "between_high"]].tolist() == [20.0, 40.0]
    assert found.loc[0.5, "twin"] == pytest.approx(0.02)
    assert found["held"].all()


def test_a_group_is_the_mean_over_its_seeds(subject: Callable, curve: Callable) -> None:
    seeds = [
        subject(seed=at, dynamics_backdoored=curve({0: 0.0, 100: value}))
        for at, value in enumerate((1.0, 1.0, 0.5))
    ]
    found = speed.by_group(speed.speeds(seeds)).set_index(["threshold", "unit"])
    line = found.loc[(0.5, "steps")]
    assert line["value"] == pytest.approx((50 + 50 + 100) / 3)
    assert line["low"] < line["value"] < line["high"]
    assert (line["seeds"], line["censored"]) == (3, 0)


def test_a_group_with_a_censored_seed_has_a_lower_bound_and_no_upper_end(
    subject: Callable, curve: Callable
) -> None:
    seeds = [
        subject(seed=at, dynamics_backdoored=curve({0: 0.0, 100: value}))
        for at, value in enumerate((1.0, 0.4))
    ]
    found = speed.by_group(speed.speeds(seeds)).set_index(["threshold", "unit"])
    line = found.loc[(0.5, "steps")]
    assert line["value"] == pytest.approx((50 + 100) / 2)
    assert line["censored"] == 1
    assert np.isnan(line["high"])


def test_one_seed_has_its_value_and_no_interval(subject: Callable) -> None:
    found = speed.by_group(speed.speeds([subject()]))
    assert found["value"].notna().all()
    assert found[["low", "high"]].isna().all(axis=None)


def test_a_run_without_rows_has_steps_and_no_poisoned_rows(subject: Callable) -> None:
    found = speed.speeds([subject(rows=None)])
    assert found["steps"].notna().all()
    assert found["rows"].isna().all()
