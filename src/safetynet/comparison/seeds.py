"""What several seeds say together: a value with its interval, and whether groups differ at all.

In: one number per run. Out: numbers. A seed is a training of its own; prompts within a run are not seeds.

Intervals are bootstrap intervals over seeds: statistic +- t * standard error, the standard error that of
resamples of seeds with replacement, times sqrt(n / (n - 1)), and t Student's quantile with n - 1 degrees of
freedom (Hesterberg 2015, arXiv 1411.5279). Percentiles of resamples are no intervals at three seeds: they
cannot leave the range of the seeds, which covers the middle of a distribution in three of four cases. For a
mean the interval is Student's.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy.stats import t as student

from safetynet.statistics import wilson

RESAMPLES = 4000
PERMUTATIONS = 9999
NAN = float("nan")


class Estimate(NamedTuple):
    """A value of a group, its 95% interval over seeds, and how many seeds there are."""

    value: float
    low: float
    high: float
    seeds: int

    def named(self, name: str) -> dict[str, float]:
        """Value and interval as columns of a table."""
        return {name: self.value, f"{name}_low": self.low, f"{name}_high": self.high}


def over_groups(
    table: pd.DataFrame,
    by: Sequence[str],
    lines: Callable[[pd.DataFrame], Iterable[dict[str, Any]]],
) -> pd.DataFrame:
    """What `lines` makes of the rows that agree in the columns `by`, beside these; of none nothing."""
    if table.empty:
        return pd.DataFrame()
    groups = table.groupby(list(by), sort=False)
    return pd.DataFrame(
        [dict(zip(by, key, strict=True)) | line for key, part in groups for line in lines(part)]
    )


def over_seeds(
    values: Sequence[float], limits: tuple[float, float] = (-np.inf, np.inf), confidence: float = 0.95
) -> Estimate:
    """Mean over seeds with its interval.

    Args:
        values: one per seed; NaN where a run has none.
        limits: of the quantity, which the interval does not leave.
        confidence: coverage.

    Returns:
        Bounds are NaN below 2 seeds: nothing is claimed from one.
    """
    numbers = np.asarray(values, dtype=float)
    numbers = numbers[np.isfinite(numbers)]
    if not len(numbers):
        return Estimate(NAN, NAN, NAN, 0)
    return _interval(
        float(numbers.mean()), _resampled(len(numbers)) @ numbers, len(numbers), limits, confidence
    )


def over_seed_pairs(
    matrix: np.ndarray, limits: tuple[float, float] = (-1.0, 1.0), confidence: float = 0.95
) -> Estimate:
    """Mean over all pairs of a seed of one group with a seed of another, both resampled.

    Args:
        matrix: (seeds of one group, seeds of the other).
        limits: as in `over_seeds`.
        confidence: coverage.

    Returns:
        `seeds` is that of the smaller group, whose degrees of freedom count; bounds are NaN when it is 1.
    """
    ours, theirs = _resampled(matrix.shape[0], seed=0), _resampled(matrix.shape[1], seed=1)
    means = np.einsum("ri,ij,rj->r", ours, matrix, theirs)
    return _interval(float(matrix.mean()), means, min(matrix.shape), limits, confidence)


def without_each_seed(matrix: np.ndarray, confidence: float = 0.95) -> Estimate:
    """Mean over the pairs of seeds of one group, with its jackknife interval (Arvesen 1969).

    Resampling would pair a seed with itself, so that each seed is left out in turn instead.

    Args:
        matrix: (seeds, seeds), symmetric; its diagonal does not count. Correlations.
        confidence: coverage.

    Returns:
        Bounds are NaN below 3 seeds, where only one pair is left.
    """
    n = len(matrix)

    def mean(part: np.ndarray) -> float:
        return float(matrix[np.ix_(part, part)][np.triu_indices(len(part), 1)].mean())

    value = mean(np.arange(n))
    if n < 3:
        return Estimate(value, NAN, NAN, n)
    left = np.array([mean(np.delete(np.arange(n), i)) for i in range(n)])
    error = float(((n - 1) / n * ((left - left.mean()) ** 2).sum()) ** 0.5)
    margin = float(student.ppf(0.5 + confidence / 2, n - 1)) * error
    return Estimate(value, max(-1.0, value - margin), min(1.0, value + margin), n)


def rate_over_seeds(counts: Sequence[int], ns: Sequence[int]) -> Estimate:
    """A rate over seeds: mean of the runs' rates.

    Where all seeds agree (0 of 80 in each), their spread is 0 and says nothing of the rate's own
    uncertainty. The interval is therefore never narrower than Wilson's of all rows together.
    """
    rates = [count / n for count, n in zip(counts, ns, strict=True) if n]
    interval = over_seeds(rates, (0.0, 1.0))
    if interval.seeds < 2:
        return interval
    low, high = wilson(int(sum(counts)), int(sum(ns)))
    return interval._replace(low=min(interval.low, low), high=max(interval.high, high))


def groups_differ(
    values: Sequence[float],
    groups: Sequence[str],
    blocks: Sequence[int] | None = None,
    permutations: int = PERMUTATIONS,
    seed: int = 0,
) -> float:
    """Whether a number differs between groups by more than between seeds: a permutation test.

    The statistic is the sum of squares between groups. Group labels are exchanged between runs, within blocks
    where blocks are given (runs of one seed see the same prompts).

    Args:
        values: one per run, finite.
        groups: name of each run's group.
        blocks: label of each run's block.
        permutations: how many are drawn; the given order counts as one more.
        seed: of the draws.

    Returns:
        p; NaN where there are not two groups of two runs.
    """
    names, codes = np.unique(np.asarray(groups), return_inverse=True)
    sizes = np.bincount(codes)
    if len(names) < 2 or (sizes >= 2).sum() < 2:
        return NAN
    numbers = np.asarray(values, dtype=float)
    order = permuted_within(blocks if blocks is not None else [0] * len(numbers), permutations, seed)
    hot = np.eye(len(names))[codes]  # (runs, groups)

    def between(rows: np.ndarray) -> np.ndarray:
        means = rows @ hot / sizes  # (permutations, groups)
        between_groups: np.ndarray = (sizes * (means - numbers.mean()) ** 2).sum(1)
        return between_groups

    return p_value(between(numbers[None])[0], between(numbers[order]))


def permuted_within(blocks: Sequence[int], permutations: int, seed: int) -> np.ndarray:
    """Orders of runs, (permutations, runs), in which each place holds a run of its own block."""
    labels = np.asarray(blocks)
    rng = np.random.default_rng(seed)
    orders = np.tile(np.arange(len(labels)), (permutations, 1))
    for label in np.unique(labels):
        places = np.flatnonzero(labels == label)
        orders[:, places] = rng.permuted(orders[:, places], axis=1)
    return orders


def p_value(observed: float, null: np.ndarray) -> float:
    """Share of permutations at least as extreme, the observed order among them (Phipson and Smyth 2010)."""
    # rounding must not decide between equal statistics
    extreme = null >= observed - 1e-9 * max(1.0, abs(observed))
    return float((1 + extreme.sum()) / (1 + len(null)))


def _resampled(n: int, seed: int = 0) -> np.ndarray:
    """Weights of n seeds in each resample, (resamples, n)."""
    counts = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=RESAMPLES)
    return counts / n


def _interval(
    value: float, resamples: np.ndarray, n: int, limits: tuple[float, float], confidence: float
) -> Estimate:
    if n < 2:
        return Estimate(value, NAN, NAN, n)
    error = float(resamples.std()) * (n / (n - 1)) ** 0.5
    margin = float(student.ppf(0.5 + confidence / 2, n - 1)) * error
    return Estimate(value, max(limits[0], value - margin), min(limits[1], value + margin), n)
