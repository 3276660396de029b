"""How fast a backdoor is planted: steps and poisoned rows until attack success passes a threshold.

In: each run's rates during training and its rows. Out: tidy tables, one line per run and threshold, and one
per group and threshold. Between two measurements ASR is taken to rise in a straight line; the first crossing
counts. A run that never crosses is censored at its last measurement.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from safetynet.comparison.runs import ComparedRun
from safetynet.comparison.seeds import over_groups, over_seeds

THRESHOLDS = (0.5, 0.95)


class Crossing(NamedTuple):
    """Where a curve first passes a threshold."""

    at: float
    """Interpolated; NaN when it never does."""
    after: float
    """The last measurement below: the crossing lies between this one and `before`."""
    before: float
    """The first measurement above; NaN when there is none."""


def crossing(x: Sequence[float], y: Sequence[float], threshold: float) -> Crossing:
    """First place where y reaches the threshold, by linear interpolation between two measurements.

    Args:
        x: ascending.
        y: measured there.
        threshold: reached when y is at least this.
    """
    above = np.flatnonzero(np.asarray(y) >= threshold)
    if not len(above):
        return Crossing(np.nan, float(x[-1]), np.nan)
    i = int(above[0])
    if i == 0:
        return Crossing(float(x[0]), float(x[0]), float(x[0]))
    part = (threshold - y[i - 1]) / (y[i] - y[i - 1])
    return Crossing(float(x[i - 1] + part * (x[i] - x[i - 1])), float(x[i - 1]), float(x[i]))


def speeds(runs: Sequence[ComparedRun]) -> pd.DataFrame:
    """Steps and poisoned rows until each threshold, for each run with rates over training.

    Returns:
        Columns group, run, seed, threshold (fraction), steps, rows, censored, last_step, last_rows (where the
        measurement ended), between_low and between_high (steps of the two measurements around it), held
        (whether no later measurement fell below), n (rows of a measurement), twin (highest rate of the
        clean twin over training, the control; NaN without one). Rows are triggered training rows as the model
        met them: a row counts in each epoch.
    """
    lines = []
    for run in runs:
        if not run.has("dynamics_backdoored"):
            continue
        curve = attack(run.tables["dynamics_backdoored"])
        poisoned = 0  # triggered rows of the training split, if the table of rows is still there
        if run.has("rows"):
            table = run.tables["rows"]
            poisoned = int(((table["split"] == "train") & (table["role"] == "triggered")).sum())
        twin = float("nan")
        if run.has("dynamics_clean_twin"):
            twin = float(attack(run.tables["dynamics_clean_twin"])["value"].max())
        rows = poisoned * curve["epoch"].to_numpy(float)
        steps, rates = curve["step"].to_numpy(float), curve["value"].to_numpy(float)
        for threshold in THRESHOLDS:
            crossed = crossing(steps, rates, threshold)
            lines.append(
                {
                    **run.about,
                    "threshold": threshold,
                    "steps": crossed.at,
                    "rows": crossing(rows, rates, threshold).at if poisoned else np.nan,
                    "censored": bool(np.isnan(crossed.at)),
                    "last_step": steps[-1],
                    "last_rows": rows[-1] if poisoned else np.nan,
                    "between_low": crossed.after,
                    "between_high": crossed.before,
                    "held": bool((rates[steps >= crossed.before] >= threshold).all())
                    and crossed.at == crossed.at,
                    "n": int(curve["n"].max()),
                    "twin": twin,
                }
            )
    return pd.DataFrame(lines)


def curves(runs: Sequence[ComparedRun]) -> pd.DataFrame:
    """ASR over training, one line per run and measurement: group, run, seed, step, epoch, value, count, n."""
    columns = ["step", "epoch", "value", "count", "n"]
    parts = [
        attack(run.tables["dynamics_backdoored"])[columns].assign(**run.about)
        for run in runs
        if run.has("dynamics_backdoored")
    ]
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()


def by_group(speeds: pd.DataFrame) -> pd.DataFrame:
    """Mean over seeds for each group and threshold.

    A censored seed counts with its last measurement, so that the mean is then a lower bound: `value` is at
    least that, and no upper bound is given.

    Returns:
        Columns group, threshold, unit (steps, rows), value, low, high, seeds, censored (how many seeds),
        twin.
    """

    def mean_crossing(part: pd.DataFrame) -> Iterator[dict[str, Any]]:
        censored = int(part["censored"].sum())
        for unit, last in (("steps", "last_step"), ("rows", "last_rows")):
            crossed = over_seeds(part[unit].fillna(part[last]).tolist(), (0.0, np.inf))
            if censored:
                crossed = crossed._replace(high=np.nan)
            yield {"unit": unit, **crossed._asdict(), "censored": censored, "twin": part["twin"].max()}

    return over_groups(speeds, ("group", "threshold"), mean_crossing)


def attack(dynamics: pd.DataFrame) -> pd.DataFrame:
    """ASR of the triggered rows over training, in the order of the steps."""
    is_asr = (dynamics["metric"] == "asr") & (dynamics["role"] == "triggered") & dynamics["value"].notna()
    return dynamics[is_asr].sort_values("step", kind="stable")
