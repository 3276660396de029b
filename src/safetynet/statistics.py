"""Intervals and areas under curves that several stages report.

In: counts or arrays. Out: numbers; nothing here reads or draws. scipy's `binomtest(k, n).proportion_ci` and
scikit-learn's `roc_auc_score` give the same numbers (the tests compare them) and take ten times as long: the
one makes a p-value first, the other checks its input, and detection's tables hold a thousand of each.
"""

from collections.abc import Callable

import numpy as np
from scipy.stats import beta, bootstrap, norm, rankdata, t


def wilson(successes: float, n: float, confidence: float = 0.95) -> tuple[float, float]:
    """Interval of a rate after Wilson (1927), which stays inside [0, 1] and works for 0 of n.

    Args:
        successes: how many of the `n` rows count, 0 <= successes <= n.
        n: fixed denominator; empty answers are rows too. An effective number need not be whole.
        confidence: coverage, 0.95 unless a document says otherwise.

    Returns:
        Lower and upper bound, both in [0, 1]; (0, 1) when n is 0, since nothing is known then.

    Raises:
        ValueError: if successes lies outside 0..n.
    """
    if not 0 <= successes <= n:
        raise ValueError(f"successes is {successes}, outside 0..{n}")
    if n == 0:
        return 0.0, 1.0
    z = float(norm.ppf(0.5 + confidence / 2))
    rate = successes / n
    centre = rate + z * z / (2 * n)
    margin = z * ((rate * (1 - rate) + z * z / (4 * n)) / n) ** 0.5
    scale = 1 + z * z / n
    # At the ends the formula gives 0 and 1, but for rounding.
    low = 0.0 if successes == 0 else max(0.0, (centre - margin) / scale)
    return low, 1.0 if successes == n else min(1.0, (centre + margin) / scale)


def clustered_wilson(shares: np.ndarray, size: int, confidence: float = 0.95) -> tuple[float, float]:
    """Interval of a rate over clusters of several trials each, such as samples of one prompt.

    Trials of one cluster resemble each other, so that they are worth fewer independent ones: as many as give
    the variance of the mean over clusters, less what the variance's own error takes (Korn and Graubard 1998).
    Wilson's interval of that many follows, as Dean and Pagano (2015) recommend for clustered surveys. Where
    all clusters have the rate 0, or all 1, each of them counts as one trial, since nothing is known then of
    how they differ. Simulated with 10 trials each, it covers 94 to 95% over 200 clusters, and 90% over 30 at
    rates of 2 to 5%.

    Args:
        shares: (clusters,) each one's share of successes, 0 to 1.
        size: trials in each cluster.
        confidence: coverage over clusters.

    Returns:
        Lower and upper bound, both in [0, 1]; (0, 1) without clusters.
    """
    clusters = len(shares)
    if clusters == 0:
        return 0.0, 1.0
    rate = float(np.mean(shares))
    effective = float(clusters)
    if 0 < rate < 1 and clusters > 1:
        variance = float(np.var(shares, ddof=1)) / clusters
        tail = 0.5 + confidence / 2
        certainty = float(norm.ppf(tail) / t.ppf(tail, clusters - 1)) ** 2
        effective = clusters * size
        if variance:
            effective = min(effective, certainty * rate * (1 - rate) / variance)
    return wilson(rate * effective, effective, confidence)


def clopper_pearson(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Exact interval of a rate (Clopper and Pearson 1934), which covers at least as often as it says.

    Args:
        successes: how many of the `n` rows count, 0 <= successes <= n.
        n: fixed denominator.
        confidence: coverage.

    Returns:
        Lower and upper bound, both in [0, 1]; (0, 1) when n is 0.

    Raises:
        ValueError: if successes lies outside 0..n.
    """
    if not 0 <= successes <= n:
        raise ValueError(f"successes is {successes}, outside 0..{n}")
    tail = (1 - confidence) / 2
    low = 0.0 if successes == 0 else float(beta.ppf(tail, successes, n - successes + 1))
    high = 1.0 if successes == n else float(beta.ppf(1 - tail, successes + 1, n - successes))
    return low, high


def auroc(positive: np.ndarray, negative: np.ndarray) -> float:
    """Chance that a positive scores above a negative, ties counting half (Mann and Whitney 1947).

    Args:
        positive: (P,) scores.
        negative: (N,) scores.
    """
    ranks = rankdata(np.r_[positive, negative])
    n, m = len(positive), len(negative)
    return float((ranks[:n].sum() - n * (n + 1) / 2) / (n * m))


def resampled_auroc(scores: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """`auroc` of weighted rows, for many weights at once.

    Args:
        scores: (N,), higher for True.
        labels: (N,) bool.
        weights: (R, N) weights of the rows, R times, such as how often a resample drew them.

    Returns:
        (R,) in [0, 1]; 0.5 where the weights leave one class alone, which says nothing.
    """
    high, low = scores[labels], scores[~labels]
    above = (high[:, None] > low) + 0.5 * (high[:, None] == low)
    positive, negative = weights[:, labels].astype(float), weights[:, ~labels].astype(float)
    pairs = positive.sum(1) * negative.sum(1)
    won = (positive @ above * negative).sum(1)
    return np.where(pairs > 0, won / np.maximum(pairs, 1), 0.5)


def bootstrap_interval(
    statistic: Callable[..., np.ndarray],
    *columns: np.ndarray,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile interval of a statistic over rows drawn with replacement (Efron 1979).

    Args:
        statistic: takes the columns and `axis`, as numpy reductions do, and returns one number per resample.
        columns: arrays of shape (rows,); a row's values stay together.
        confidence: coverage.
        resamples: how often rows are drawn.
        seed: of the draws, so that the same table gives the same interval.

    Returns:
        Lower and upper bound; (nan, nan) below 2 rows, where drawing again tells nothing, and for values that
        are not finite.
    """
    if len(columns[0]) < 2 or not all(np.isfinite(column).all() for column in columns):
        return float("nan"), float("nan")
    result = bootstrap(
        columns,
        statistic,
        paired=True,
        vectorized=True,
        method="percentile",
        confidence_level=confidence,
        n_resamples=resamples,
        batch=max(1, 10_000_000 // len(columns[0])),  # bounds memory on long tables
        rng=np.random.default_rng(seed),
    )
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


def bootstrap_ratios(
    tops: np.ndarray, bottom: np.ndarray, confidence: float = 0.95, resamples: int = 2000, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ratios of means with percentile intervals, all from the same draws of rows (Efron 1979).

    Args:
        tops: (S, rows), one line per ratio.
        bottom: (rows,), shared by all; its mean is what is divided by.
        confidence: coverage.
        resamples: how often rows are drawn.
        seed: of the draws.

    Returns:
        Value, lower and upper bound, each (S,); bounds are NaN below 2 rows.
    """
    rows = len(bottom)
    value = tops.mean(1) / bottom.mean()
    if rows < 2:
        return value, np.full(len(tops), np.nan), np.full(len(tops), np.nan)
    drawn = draw_counts(rows, resamples, seed)
    ratios = (drawn @ tops.T) / (drawn @ bottom)[:, None]
    tail = (1 - confidence) / 2
    low, high = np.quantile(ratios, [tail, 1 - tail], axis=0)
    return value, low, high


def draw_counts(rows: int, resamples: int = 2000, seed: int = 0) -> np.ndarray:
    """How often each row is drawn in each bootstrap resample: weights for statistics of weighted rows.

    Returns:
        (resamples, rows) int64; each line adds up to `rows`.
    """
    return np.random.default_rng(seed).multinomial(rows, np.full(rows, 1 / rows), size=resamples)
