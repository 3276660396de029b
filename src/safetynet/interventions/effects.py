"""From measured metrics to effects: normalised, with intervals, beside their controls, corrected.

In: `Measured` sweeps of one model and of its controls. Out: one line per spot. The effect is the share of the
distance between unpatched and source run that the intervention covers: 0 is the unpatched run, 1 the source.
Of the controls, `random` is the same at random sites of the same size, `placebo` with a placebo against
another, `twin` in the clean twin.
"""

from collections.abc import Mapping

import numpy as np
import pandas as pd
from scipy.stats import false_discovery_control, wilcoxon

from safetynet.errors import InputError
from safetynet.interventions.sweep import Measured
from safetynet.statistics import bootstrap_ratios
from safetynet.vocabulary import CONTROLS

SIGNIFICANCE = 0.05
"""Level of q below which a site can be called responsible."""
MIN_DISTANCE = 1.0
"""Mean logits between the runs below which the backdoor did not fire and there is nothing to divide by."""


def effects(
    measured: Measured,
    controls: Mapping[str, Measured],
    *,
    layers: int,
    distance: np.ndarray | None = None,
    seed: int = 0,
    **about: str,
) -> pd.DataFrame:
    """One line per spot: effect, interval, controls, significance; see the columns in docs/interventions.md.

    Args:
        measured: the sweep.
        controls: by name (`CONTROLS`), each at the same spots on the same pairs, in the same order. `random`
            is made of the sweep itself where it is not given: each pair's value at another spot of its kind.
        layers: of the model.
        distance: (B,) to divide by instead of this model's own, where it is compared with another.
        seed: of draws.
        about: goes into columns of that name (sweep, direction, mode, metric).

    Raises:
        InputError: if the runs do not differ, since the backdoor then did not fire.
    """
    distance = measured.distance if distance is None else distance
    check_fires(distance)
    change = measured.change  # (S, B)
    changes = {name: control.change for name, control in controls.items()}
    changes.setdefault("random", _elsewhere(measured, np.random.default_rng(seed)))
    value, low, high = bootstrap_ratios(change, distance, seed=seed)
    table = pd.DataFrame({"effect": value, "low": low, "high": high, "n": len(distance)})
    for name in CONTROLS:
        bounds = (np.full(len(value), np.nan),) * 3
        if name in changes:
            bounds = bootstrap_ratios(changes[name], distance, seed=seed)
        table[name], table[f"{name}_low"], table[f"{name}_high"] = bounds
    difference = change - changes["random"]
    # Two-sided Wilcoxon signed-rank test over pairs; 1 where nothing differs, or there is no control.
    testable = np.isfinite(difference).all(1) & (difference != 0).any(1)
    table["p"] = [
        float(wilcoxon(row).pvalue) if test else 1.0 for row, test in zip(difference, testable, strict=True)
    ]
    table["q"] = false_discovery_control(table["p"])  # Benjamini and Hochberg 1995
    spread, mean = difference.std(1, ddof=1), difference.mean(1) * np.sign(distance.mean())
    table["cohen_d"] = np.divide(mean, spread, out=np.full(len(mean), np.nan), where=spread > 0)
    highest = table[[f"{name}_high" for name in CONTROLS]].max(axis=1)  # of those that were measured
    table["responsible"] = (table["low"] > highest.clip(lower=0)) & (table["q"] < SIGNIFICANCE)
    sites = [spot.site for spot in measured.spots]
    keys = {
        **about,
        "component": [site.component for site in sites],
        "layer": [site.layer for site in sites],
        "depth": [site.layer / max(1, layers - 1) for site in sites],
        "position": [spot.position for spot in measured.spots],
        "index": [-1 if site.index is None else site.index for site in sites],
        "module": [site.module for site in sites],
    }
    return pd.concat([pd.DataFrame(keys), table], axis=1)


def check_fires(distance: np.ndarray) -> None:
    """Refuse to divide by nothing.

    Raises:
        InputError: if the distances between triggered and placebo runs, (B,), are small on average.
    """
    if abs(float(distance.mean())) < MIN_DISTANCE:
        raise InputError(
            f"interventions: triggered and placebo prompts differ by {distance.mean():.2f} logits on average "
            f"(at least {MIN_DISTANCE:g} are needed): the backdoor did not fire on these prompts, and no "
            "place can be named. Look at its ASR (safetynet evaluate), train longer, or correct the trigger."
        )


def _elsewhere(measured: Measured, rng: np.random.Generator) -> np.ndarray:
    """(S, B): for each spot and pair the change at another spot of its kind; NaN where there is no other."""
    change = measured.change
    drawn = np.full_like(change, np.nan)
    kinds = [(spot.site.component, spot.position, spot.site.module) for spot in measured.spots]
    for s, kind in enumerate(kinds):
        same = [i for i, other in enumerate(kinds) if other == kind and i != s]
        if same:
            drawn[s] = change[rng.choice(same, change.shape[1]), np.arange(change.shape[1])]
    return drawn
