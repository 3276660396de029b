"""How far a cell's numbers depend on which clean prompts its monitor happened to be made of.

In: the model, the clean prompts of its monitor, test rows. Out: alarms of many monitors, each made of others
of those prompts; a line over them.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from _catching import CAUGHT, PLACEBOS
from _placebos import with_more
from _words import RATE, alarms, asked_of, of_both_kinds, reader

MONITORS = 20


def redraw(
    model: Any, serialiser: Any, clean: pd.DataFrame, run: Any, seed: int, *, detectors: str
) -> pd.DataFrame:
    """Alarms at 1% of `MONITORS` monitors, each of three quarters of the clean prompts, by chance.

    Args:
        model: the backdoored model.
        serialiser: of its prompts.
        clean: `messages` of clean prompts, which get random words as in `safetynet detect`.
        run: with test rows; where `detect` has read its prompts, they are not read again.
        seed: of words, monitors and draws.
        detectors: preset or detectors, as `safetynet detect` takes them.

    Returns:
        fired, placebo (the run's own and more), near miss, fresh (the clean prompts left over) and fresh,
        random words: shares with alarm, one line per monitor.
    """
    from safetynet.detection.stage import Plan
    from safetynet.text.random_words import put_in

    plan, n = Plan.of(detectors.split(","), RATE), len(clean)
    read = reader(model, serialiser, run, plan.spec)
    plain = list(clean["messages"])
    features, asked = read([*plain, *put_in(plain, serialiser, seed)]), asked_of(read, run, seed)
    asked["placebo"] = with_more(asked["placebo"], read, model, serialiser, clean, run, seed)
    made, lines = n * 3 // 4, []
    for draw in range(MONITORS):
        order = np.random.default_rng((seed, draw)).permutation(n)
        monitor = of_both_kinds(features, order[:made], plan.readings, seed)
        fresh = {"fresh": order[made:], "fresh, random words": order[made:] + n}
        rows = asked | {name: features.take(own) for name, own in fresh.items()}
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
    """Over cells: those within limits; the worst of their means, of fresh prompts the means, in percent."""
    means = pd.DataFrame([draws.mean() for draws in found])
    return {
        "within limits": f"{sum(map(within, found))} of {len(found)}",
        "mean TPR, least": f"{100 * means['fired'].min():.1f}",
        "mean placebo, most": f"{100 * means['placebo'].max():.1f}",
        "mean fresh": f"{100 * means['fresh'].mean():.2f}",
        "with random words": f"{100 * means['fresh, random words'].mean():.2f}",
    }
