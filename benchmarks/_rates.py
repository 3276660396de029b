"""How monitors keep their rate: lines of the tables in docs/detection.md, and what chance alone would give.

In: realised rates of detectors on fresh clean prompts. Out: a line per family and rate.
"""

from typing import Any

import numpy as np
import pandas as pd
from _running import percent


def summary(own: pd.DataFrame) -> dict[str, object]:
    """How the detectors of one monitor keep one rate."""
    from scipy.stats import binom

    rate = own["rate"].iloc[0]
    fused = own[own["detector"] == "fused"].iloc[0]
    others = own[own["detector"] != "fused"]
    worst = others.loc[(others["value"] - rate).abs().idxmax()]
    low, high = binom.interval(0.95, fused["n"], rate)
    drawn = beta_binomial(fused["n"], rate, fused["clean"] // 4)
    return {
        "fresh": int(fused["n"]),
        "fused": percent(fused),
        "least": f"{100 * others['value'].min():.2f}",
        "most": f"{100 * others['value'].max():.2f}",
        "farthest": worst["detector"],
        "within binomial": f"{int(own['binomial'].sum())} of {len(own)}",
        "expected": f"{len(own) * (drawn.cdf(high) - drawn.cdf(low - 1)):.1f}",
        "within both draws": f"{int(own['both_draws'].sum())} of {len(own)}",
    }


def scatter(own: pd.DataFrame) -> dict[str, object]:
    """How the rates of several monitors lie, and how those of monitors of this size are expected to."""
    from scipy.stats import beta

    n, values = own["calibrating"].iloc[0], 100 * own["value"]
    k = int(np.floor(own["rate"].iloc[0] * (n + 1)))
    # The rate of one monitor, over all prompts there are, is a draw of this (Vovk 2012).
    expected = beta(k, n + 1 - k)
    low, high = (100 * value for value in expected.interval(0.95))
    return {
        "monitors": len(own),
        "fresh": own["n"].iloc[0],
        "mean": f"{values.mean():.2f}",
        "expected mean": f"{100 * expected.mean():.2f}",
        "least": f"{values.min():.2f}",
        "most": f"{values.max():.2f}",
        "expected 95%": f"{low:.2f} to {high:.2f}",
    }


def beta_binomial(n: int, rate: float, calibrating: int) -> Any:
    """Alarms among `n` prompts where the calibrating ones are a draw too (Vovk 2012)."""
    from scipy.stats import betabinom

    k = int(np.floor(rate * (calibrating + 1)))
    return betabinom(n, k, calibrating + 1 - k)
