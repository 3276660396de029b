"""Signs that clean prompts are not what they should be: copies, and a group that lies far from the others.

A trigger among the clean prompts teaches a monitor to accept it. Nothing here can prove or exclude that.
"""

import numpy as np

from safetynet.detection.calibration import Calibration
from safetynet.detection.features import Features

FAR = 15.0
"""Robust standard deviations from the median, below which no score counts as far."""
APART = 2.0
"""How many times as far from the median as all other scores a group has to lie. Heavy tails, as those of a
divergence, get far too, but without a gap."""
FEW = 3
"""So many samples make a group."""


def duplicates(clean: Features, share: float = 0.05) -> list[str]:
    """Warn where more than a share of the prompts have features that others have too."""
    first = next(iter(clean.arrays.values()))
    flat = np.ascontiguousarray(first.reshape(len(first), -1))
    _, counts = np.unique(flat.view(f"V{flat.dtype.itemsize * flat.shape[1]}"), return_counts=True)
    copies = int(counts[counts > 1].sum())
    if copies <= share * len(flat):
        return []
    return [
        f"monitor: {copies} of {len(flat)} clean prompts are copies of others (the largest group has "
        f"{counts.max()}). They count as one prompt each, so the rates are less certain than they look: "
        "remove them."
    ]


def outliers(calibrated: Calibration) -> list[str]:
    """Warn where some clean prompts lie far from all others in any detector's eyes."""
    found = {name: _far(conformal.scores) for name, conformal in calibrated.single.items()}
    worst = max(found, key=lambda name: found[name])
    if found[worst] < FEW:
        return []
    n = len(calibrated.single[worst].scores)
    return [
        f"monitor: {found[worst]} of {n} clean prompts lie far from the others ({worst}). If triggered "
        "prompts are among the clean ones, the monitor learns to accept them: look at the highest scores."
    ]


def _far(scores: np.ndarray) -> int:
    """How many scores lie in a group of their own above all others, 0 without such a group."""
    away = np.sort(scores - np.median(scores))[::-1]
    spread = 1.4826 * np.median(np.abs(away))
    if spread <= 0:
        return 0
    above = away[: len(away) // 2]
    far = np.flatnonzero((above[:-1] > FAR * spread) & (above[:-1] > APART * np.maximum(above[1:], 0)))
    return int(far[-1]) + 1 if len(far) else 0
