"""What figures of a monitor show: ROC curves, distributions by role, AUROC by layer.

In: rows as the protocol has them, scores and p-values, features. Out: tidy tables. Draws nothing.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from safetynet.detection import detectors
from safetynet.detection.detectors.base import PerLayer
from safetynet.detection.features import HIDDEN, Features
from safetynet.detection.monitor import Monitor
from safetynet.detection.protocol import RowSet, auroc_line, clean_rows, controls, sets

POINTS = 200
"""Points of a curve at most."""
POSITIVES = ("fired", "placebo")
"""Rows that are compared with clean ones: those to detect, and their control."""
TRAJECTORIES = ("layer_deltas", "ranks")
"""Detectors that compare a layer with the one before."""


def roc(rows: pd.DataFrame, scores: pd.DataFrame) -> pd.DataFrame:
    """ROC of every detector, against clean rows of the monitor's own domain.

    Returns:
        detector, rows (fired, and placebo as its control), fpr, tpr, positives, negatives.
    """
    from sklearn.metrics import roc_curve

    clean, parts = clean_rows(rows), _named(rows, POSITIVES)
    tables = []
    for name in scores:
        s = scores[name].to_numpy()
        for part in parts:
            labels = np.r_[np.ones(part.mask.sum()), np.zeros(clean.sum())]
            fpr, tpr, _ = roc_curve(labels, np.r_[s[part.mask], s[clean]])
            if len(fpr) > POINTS:  # thinned, but not at its low-FPR end
                first = int(np.searchsorted(fpr, 0.05))
                rest = np.linspace(first, len(fpr) - 1, POINTS).astype(int)
                points = np.unique(np.r_[np.arange(first), rest])
                fpr, tpr = fpr[points], tpr[points]
            tables.append(
                pd.DataFrame({"fpr": fpr, "tpr": tpr}).assign(
                    detector=name, rows=part.name, positives=int(part.mask.sum()), negatives=int(clean.sum())
                )
            )
    columns = ["detector", "rows", "fpr", "tpr", "positives", "negatives"]
    return pd.concat(tables, ignore_index=True)[columns] if tables else pd.DataFrame(columns=columns)


def distributions(rows: pd.DataFrame, surprise: pd.DataFrame, rate: float) -> pd.DataFrame:
    """How suspect the rows of each role are: share of them at or above each value.

    Args:
        rows: as for the protocol.
        surprise: minus log10 of smoothed p-values by detector, so that detectors share an axis.
        rate: nominal false-positive rate of the alarm.

    Returns:
        detector, rows, surprise, share, n, rate.
    """
    parts = _named(rows, ("fired", "clean", "placebo", "near_miss", "refused"))
    lines = []
    for name in surprise:
        for part in parts:
            s = np.sort(surprise[name].to_numpy()[part.mask])
            at = np.unique(np.r_[0.0, s[np.linspace(0, len(s) - 1, min(POINTS, len(s))).astype(int)]])
            share = 1 - np.searchsorted(s, at, side="left") / len(s)
            curve = pd.DataFrame({"surprise": at, "share": share})
            lines.append(curve.assign(detector=name, rows=part.name, n=len(s)))
    table = pd.concat(lines, ignore_index=True).assign(rate=rate)
    return table[["detector", "rows", "surprise", "share", "n", "rate"]]


def by_layer(monitor: Monitor, fit: Features, tested: Features, rows: pd.DataFrame) -> pd.DataFrame:
    """AUROC of each detector of hidden states at each layer alone.

    Detectors that compare layers are fitted to a layer and the one before it; those that score layers alone
    are taken apart; the others are fitted to each layer.

    Args:
        monitor: fitted.
        fit: features of the clean prompts that it was fitted to.
        tested: of the rows.
        rows: as for the protocol.

    Returns:
        detector, rows, layer (from 0), auroc, low, high, n.
    """
    clean, parts = clean_rows(rows), _named(rows, POSITIVES)
    layers = monitor.spec.layers
    lines = []
    for reading in monitor.detectors.readings:
        if reading.view not in HIDDEN:
            continue
        fitted, x = monitor.detectors.fitted[reading.name], tested[reading.view]  # (n, L, d)
        alone: list[tuple[int, np.ndarray]] = []  # layer, and scores (n,) from it alone
        if isinstance(fitted, PerLayer):
            alone += enumerate(fitted.layer_scores(np.asarray(x, dtype=np.float64)).T)
        else:
            width = 2 if reading.detector in TRAJECTORIES else 1
            for layer in range(width - 1, x.shape[1]):
                part_of = slice(layer - width + 1, layer + 1)
                detector = detectors.make(reading.detector, **reading.settings)
                detector.fit(fit[reading.view][:, part_of])
                alone.append((layer, detector.score_samples(x[:, part_of])))
        for layer, s in alone:
            for part in parts:
                line = auroc_line("auroc", part.name, s[part.mask], s[clean])
                line |= {"detector": reading.name, "layer": layer if layers is None else layers[layer]}
                lines.append(line | {"auroc": line["value"]})
    columns = ["detector", "rows", "layer", "auroc", "low", "high", "n"]
    return pd.DataFrame(lines, columns=columns)


def _named(rows: pd.DataFrame, names: Sequence[str]) -> list[RowSet]:
    return [part for part in [*sets(rows), *controls(rows, kinds=False)] if part.name in names]
