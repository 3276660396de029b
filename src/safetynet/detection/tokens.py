"""The part of a monitor that watches an answer token by token.

In: view `steps` (and `step_confidence`) of answers to clean prompts. Out: for each token, the p-value of the
answer so far. Tokens of an answer depend on each other, so no rate is claimed for a token: the largest
statistic of whole clean answers is what calibrates, and an answer raises a false alarm, anywhere, at the
named rate.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from safetynet.detection.calibration import PARTS, Calibration, Conformal, check_rate, split
from safetynet.detection.detector_set import WHOLE, DetectorSet, DetectorSpec
from safetynet.detection.features import GENERATED, Features
from safetynet.detection.files import below
from safetynet.errors import InputError


@dataclass(frozen=True)
class TokenMonitor:
    """Scores tokens; the p-value at a token is that of the largest statistic up to there."""

    detectors: DetectorSet
    single: Calibration
    """Weighs detectors against each other, on single tokens."""
    longest: Conformal
    """Largest statistics of whole clean answers."""
    horizon: int
    """Most tokens of an answer; nothing is claimed behind it."""

    @classmethod
    def fit(
        cls,
        clean: Features,
        readings: Sequence[DetectorSpec],
        groups: Sequence[str],
        kinds: np.ndarray,
        seed: int,
    ) -> Self:
        """Fit and calibrate on answers to clean prompts; arguments and disjoint parts as in `Monitor.fit`.

        Raises:
            InputError: if a reading is of a view that has no tokens, or prompts are too few.
        """
        wrong = [reading.name for reading in readings if reading.view not in GENERATED]
        if wrong:
            raise InputError(f"tokens: {wrong[0]} reads no tokens; use view steps or step_confidence.")
        part = split(groups, seed=seed)
        tokens = {name: _flat(clean.take(part == name)) for name in PARTS}
        fitted = DetectorSet.fit(readings, tokens["fit"])
        first, second = (fitted.scores(tokens[name]) for name in ("calibrate", "fuse"))
        single = Calibration.fit(first, second)
        last = part == "fuse"
        largest = np.nanmax(_spread(single.statistic(second), _present(clean.take(last))), axis=1)
        return cls(fitted, single, Conformal.fit(largest, kinds[last]), clean.spec.tokens)

    def check_rate(self, rate: float) -> None:
        """Refuse a rate that the clean answers cannot support.

        Raises:
            InputError: saying how many it needs.
        """
        check_rate(rate, self.longest.n)

    def statistic(self, arrays: dict[str, np.ndarray]) -> np.ndarray:
        """Of single tokens, one per row of the arrays, (n,)."""
        return self.single.statistic(self.detectors.scores(arrays))

    def latest(self, states: np.ndarray, confidences: np.ndarray) -> np.ndarray:
        """Statistic of the newest token of running answers.

        Args:
            states: (B, L, d) that chose it.
            confidences: (B, t, 2) of all tokens so far, this one the last.
        """
        present = np.zeros(confidences.shape[:2], dtype=bool)
        present[:, -1] = True
        arrays = {"steps": states, "step_confidence": confidences[:, -1]}
        return self.statistic(arrays | {WHOLE + "step_confidence": confidences, "present": present})

    def p_values(self, features: Features) -> np.ndarray:
        """(n, T): p-value of each answer up to each token; NaN after its end."""
        present = _present(features)
        statistics = _spread(self.statistic(_flat(features)), present)
        so_far = np.fmax.accumulate(statistics, axis=1)
        return np.where(present, self.longest.p_values(so_far), np.nan)

    def state(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """For a file."""
        panel, learned = self.detectors.state()
        arrays = {f"panel/{name}": array for name, array in learned.items()}
        arrays |= self.single.state() | self.longest.state("longest")
        return {"panel": panel, "horizon": self.horizon}, arrays

    @classmethod
    def restore(cls, about: dict[str, Any], arrays: dict[str, np.ndarray]) -> Self:
        """From a file."""
        fitted = DetectorSet.restore(about["panel"], below(arrays, "panel/"))
        single = Calibration.restore(fitted.fitted, arrays)
        return cls(fitted, single, Conformal(below(arrays, "longest/")), about["horizon"])


def _present(features: Features) -> np.ndarray:
    """(n, T): where an answer has a token."""
    first = next(features.arrays[view] for view in GENERATED if view in features.arrays)
    return ~np.isnan(first.reshape(*first.shape[:2], -1)[:, :, 0])


def _flat(features: Features) -> dict[str, np.ndarray]:
    """All tokens of all answers, one per row; and the whole answers, for sequential detectors."""
    present = _present(features)
    arrays = {str(view): features.arrays[view][present] for view in GENERATED if view in features.arrays}
    if "step_confidence" in arrays:
        arrays |= {WHOLE + "step_confidence": features.arrays["step_confidence"], "present": present}
    return arrays


def _spread(values: np.ndarray, present: np.ndarray) -> np.ndarray:
    """Back to (n, T), NaN where there is no token."""
    spread = np.full(present.shape, np.nan)
    spread[present] = values
    return spread
