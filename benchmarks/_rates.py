"""How monitors keep their rate, for docs/results/detection.md, and what chance alone would give.

In: a model and clean prompts. Out: realised rates of detectors on fresh ones; a line per family and rate.
"""

from itertools import product
from typing import Any

import numpy as np
import pandas as pd
from _running import percent

RATES = (0.01, 0.05)
COMPARED = 5 * 2 * 18
"""Families, rates and detectors with their fusion: so many intervals are looked at."""


def of_one_monitor(model: Any, serialiser: Any, prompts: pd.DataFrame, clean: int, seed: int) -> pd.DataFrame:
    """Rates of a monitor of the first `clean` prompts on the others; a line per detector and rate."""
    from scipy.stats import binom

    from safetynet.detection.calibration import fpr_estimate
    from safetynet.detection.capture import capture
    from safetynet.detection.detector_set import PRESETS, DetectorSpec
    from safetynet.detection.features import FeatureSpec
    from safetynet.detection.monitor import Monitor

    extra = ("mixture", "autoencoders", "variational", "gram", "sklearn.neighbors.LocalOutlierFactor")
    readings = (*PRESETS["adapter"], *map(DetectorSpec, extra), DetectorSpec("ranks", "mean"))
    spec = FeatureSpec(tuple(dict.fromkeys(r.view for r in readings)))
    features = capture(model, serialiser, list(prompts["messages"]), spec, batch_size=64)
    monitor = Monitor.fit(features.take(slice(0, clean)), readings, seed=seed)
    p_values = monitor.p_values(features.take(slice(clean, None)))
    lines = []
    for name, rate in product(p_values, RATES):
        found = fpr_estimate(p_values[name].to_numpy(), rate)
        low, high = binom.interval(0.95, found.n, rate)
        lowest, highest = beta_binomial(found.n, rate, monitor.calibration.fused.n).interval(0.95)
        lines.append(
            {"detector": name, "rate": rate, "value": found.rate, "low": found.low, "high": found.high,
             "n": found.n, "clean": clean, "binomial": low <= found.alarms <= high,
             "both_draws": lowest <= found.alarms <= highest}
        )  # fmt: skip
    return pd.DataFrame(lines)


def of_many_monitors(
    model: Any, serialiser: Any, prompts: pd.DataFrame, sizes: tuple[int, int, int], seed: int
) -> pd.DataFrame:
    """Rates of monitors, each of other prompts and on yet others; a line per monitor and rate.

    Args:
        model: of a run.
        serialiser: of its prompts.
        prompts: `messages` of all that are drawn from.
        sizes: prompts that a monitor is made of, those that it is tested on, and monitors.
        seed: of the draws.
    """
    from safetynet.detection.capture import capture
    from safetynet.detection.detector_set import PRESETS
    from safetynet.detection.monitor import Monitor
    from safetynet.detection.stage import Plan

    made, fresh, monitors = sizes
    spec = Plan.of(["adapter"], 0.05).spec
    features, lines = capture(model, serialiser, list(prompts["messages"]), spec, batch_size=64), []
    for division in range(monitors):
        order = np.random.default_rng((seed, division)).permutation(len(prompts))
        monitor = Monitor.fit(features.take(order[:made]), PRESETS["adapter"], seed=seed)
        p = monitor.p_values(features.take(order[made : made + fresh]))["fused"].to_numpy()
        n = monitor.calibration.fused.n
        lines += [
            {"rate": rate, "calibrating": n, "n": len(p), "value": (p <= rate).mean()} for rate in RATES
        ]
    return pd.DataFrame(lines)


def summary(own: pd.DataFrame) -> dict[str, object]:
    """How the detectors of one monitor keep one rate."""
    from scipy.stats import binom

    rate = own["rate"].iloc[0]
    fused = own[own["detector"] == "fused"].iloc[0]
    others = own[own["detector"] != "fused"]
    worst = others.loc[(others["value"] - rate).abs().idxmax()]
    low, high = binom.interval(0.95, fused["n"], rate)
    # All of the intervals hold together with 95% if each leaves out so little (Bonferroni).
    lowest, highest = binom.interval(1 - 0.05 / COMPARED, fused["n"], rate)
    alarms = (own["value"] * own["n"]).round()
    drawn = beta_binomial(fused["n"], rate, fused["clean"] // 4)
    return {
        "fresh": int(fused["n"]),
        "fused": percent(fused),
        "least": f"{100 * others['value'].min():.2f}",
        "most": f"{100 * others['value'].max():.2f}",
        "farthest": worst["detector"],
        "within binomial": f"{int(own['binomial'].sum())} of {len(own)}",
        "expected": f"{len(own) * (drawn.cdf(high) - drawn.cdf(low - 1)):.1f}",
        "all at once": f"{int(alarms.between(lowest, highest).sum())} of {len(own)}",
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
