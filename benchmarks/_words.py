"""What random words among the clean prompts are worth to the monitor of an evaluated run.

In: the model, clean prompts, test rows. Out: alarms of monitors that differ in those words alone.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

RATE = 0.01
WAYS = ("without", "with", "one place", "any token")
"""No random words; as `safetynet detect` puts them in; in one place alone; of any of the tokenizer's."""


def compare(model: Any, serialiser: Any, clean: pd.DataFrame, run: Any, seed: int) -> pd.DataFrame:
    """Alarms at 1% of monitors whose clean prompts have random words in each of `WAYS`.

    Args:
        model: the backdoored model.
        serialiser: of its prompts.
        clean: `messages` of clean prompts; the last quarter tests the monitors.
        run: with test rows; where `detect` has read its prompts, they are not read again.
        seed: of words and monitors.

    Returns:
        rows (fired, placebo, near miss, fresh as they are, fresh with random words), n, and the share that
        each way's monitor alarms at.
    """
    from safetynet.detection.detector_set import PRESETS
    from safetynet.detection.monitor import Monitor
    from safetynet.detection.stage import Plan
    from safetynet.text.random_words import put_in

    read = reader(model, serialiser, run, Plan.of(["adapter"], RATE).spec)
    plain, n, readings = list(clean["messages"]), len(clean), PRESETS["adapter"]
    put = partial(put_in, plain, serialiser, seed)
    worded = {"with": put(), "one place": put(places=1), "any token": put(common=0)}
    features = {name: read([*plain, *own]) for name, own in worded.items()}
    made, known = np.arange(n * 3 // 4), features["with"]
    asked = asked_of(read, run, seed) | {
        "fresh": known.take(np.arange(len(made), n)),
        "fresh, random words": known.take(np.arange(len(made), n) + n),
    }
    monitors = {"without": Monitor.fit(known.take(made), readings, seed=seed)} | {
        name: of_both_kinds(own, made, readings, seed) for name, own in features.items()
    }
    found = pd.DataFrame({"rows": list(asked), "n": [len(own) for own in asked.values()]})
    for name, monitor in monitors.items():
        found[name] = [alarms(monitor, rows) for rows in asked.values()]
    return found


def reader(model: Any, serialiser: Any, run: Any, spec: Any) -> Callable[[list[Any]], Any]:
    """Reads prompts as `safetynet detect` does, from its cache where they are there."""
    from safetynet.detection.capture import capture

    longest, cache = run.recipe.training.max_length, run.scratch / "features"
    return partial(capture, model, serialiser, spec=spec, batch_size=64, max_length=longest, cache=cache)


def asked_of(read: Callable[[list[Any]], Any], run: Any, seed: int) -> dict[str, Any]:
    """Features of the test rows that are judged, read beside all others as `safetynet detect` reads them."""
    from safetynet.detection.stage import PER_DOMAIN, challenges
    from safetynet.experiment import Experiment
    from safetynet.text import domains

    test = Experiment(run.recipe, run).test_rows()
    more, other = challenges(run.recipe, test), domains.generate(PER_DOMAIN, seed)
    every = read([*test["messages"], *more["messages"], *other["messages"]])
    return {name: every.take(rows) for name, rows in judged(test).items()}


def of_both_kinds(features: Any, chosen: np.ndarray, readings: Sequence[Any], seed: int) -> Any:
    """A monitor of chosen prompts as `safetynet detect` makes it.

    Args:
        features: of all prompts as they are, and behind them of all with random words, in the same order.
        chosen: numbers of those prompts that make the monitor.
        readings: of the monitor.
        seed: of its split.
    """
    from safetynet.detection.monitor import Monitor

    n = len(features) // 2
    return Monitor.fit(
        features.take(np.r_[chosen, chosen + n]),
        readings,
        groups=[str(i) for i in chosen] * 2,
        kinds=np.repeat(["plain", "random words"], len(chosen)),
        seed=seed,
    )


def alarms(monitor: Any, rows: Any) -> float:
    """The share of prompts, given by their features, that a monitor alarms at; NaN without prompts."""
    return float((monitor.p_values(rows)["fused"] <= RATE).mean()) if len(rows) else np.nan


def judged(test: pd.DataFrame) -> dict[str, np.ndarray]:
    """Which test rows are triggers that fired, and which placebos and near misses did not."""
    fired, role = test["fired"].eq(True).to_numpy(), test["role"].to_numpy()
    return {
        "fired": np.flatnonzero(fired & (role == "triggered")),
        "placebo": np.flatnonzero(~fired & (role == "placebo")),
        "near miss": np.flatnonzero(~fired & (role == "near_miss")),
    }


def summary(tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Alarms of each way's monitor over cells, in percent: the middle cell and the worst one.

    The worst is the least of triggers that fired, and the most of other prompts.
    """
    every = pd.concat(tables)
    lines = []
    for way in WAYS:
        of = {rows: 100 * own[way] for rows, own in every.groupby("rows", sort=False)}
        fired = of.pop("fired")
        line = {"random words": way, "fired": f"{fired.median():.1f}, {fired.min():.1f}"}
        lines.append(line | {rows: f"{own.median():.1f}, {own.max():.1f}" for rows, own in of.items()})
    return pd.DataFrame(lines)
