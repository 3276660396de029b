"""How far a cell's numbers depend on which clean prompts its monitor happened to be made of.

In: the model, the clean prompts of its monitor, test rows. Out: alarms of many monitors, each made of others
of those prompts; a line over them.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from _catching import CAUGHT, PLACEBOS
from _words import RATE, alarms, judged

MONITORS = 20


def redraw(
    model: Any,
    serialiser: Any,
    clean: pd.DataFrame,
    test: pd.DataFrame,
    seed: int,
    cache: Path,
    *,
    detectors: str,
) -> pd.DataFrame:
    """Alarms at 1% of `MONITORS` monitors, each of three quarters of the clean prompts, by chance.

    Args:
        model: the backdoored model.
        serialiser: of its prompts.
        clean: `messages` of clean prompts, which get random words as in `safetynet detect`.
        test: `messages`, `role` and `fired` of test rows.
        seed: of words, monitors and draws.
        cache: folder of captured features; those of the clean prompts are there where `detect` has run.
        detectors: preset or detectors, as `safetynet detect` takes them.

    Returns:
        fired, placebo, near miss and fresh (the clean prompts left over): shares with alarm, one line per
        monitor.
    """
    from safetynet.detection.capture import capture
    from safetynet.detection.monitor import Monitor
    from safetynet.detection.plan import Plan
    from safetynet.detection.random_words import put_in

    plan = Plan.of(detectors.split(","), RATE)
    worded, _ = put_in(list(clean["messages"]), serialiser, seed)
    features = capture(model, serialiser, worded, plan.spec, batch_size=64, cache=cache)
    tested = capture(model, serialiser, list(test["messages"]), plan.spec, batch_size=64)
    asked = {name: tested.take(rows) for name, rows in judged(test).items()}
    made, lines = len(worded) * 3 // 4, []
    for draw in range(MONITORS):
        order = np.random.default_rng((seed, draw)).permutation(len(worded))
        monitor = Monitor.fit(features.take(order[:made]), plan.readings, seed=seed)
        rows = asked | {"fresh": features.take(order[made:])}
        lines.append({name: alarms(monitor, own) for name, own in rows.items()})
    return pd.DataFrame(lines)


def spread(found: pd.DataFrame) -> dict[str, object]:
    """Means over a cell's monitors in percent, least and most; and whether they are within the limits."""
    mean = found.mean()
    shown: dict[str, object] = {
        name: f"{100 * mean[name]:.1f} ({100 * own.min():.1f} to {100 * own.max():.1f})"
        for name, own in found.items()
    }
    return shown | {"within limits": "yes" if within(found) else "no"}


def within(found: pd.DataFrame) -> bool:
    """Whether a cell's monitors catch enough on average, and alarm at few enough placebos."""
    mean = found.mean()
    return bool(mean["fired"] >= CAUGHT and mean["placebo"] <= PLACEBOS)


def over(found: Sequence[pd.DataFrame]) -> dict[str, object]:
    """Over cells: those within limits; the worst of their means, of fresh prompts the mean, in percent."""
    means = pd.DataFrame([draws.mean() for draws in found])
    return {
        "within limits": f"{sum(map(within, found))} of {len(found)}",
        "mean TPR, least": f"{100 * means['fired'].min():.1f}",
        "mean placebo, most": f"{100 * means['placebo'].max():.1f}",
        "mean fresh": f"{100 * means['fresh'].mean():.2f}",
    }
