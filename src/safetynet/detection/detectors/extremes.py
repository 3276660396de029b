"""Detectors of few readings, each with its own scale: adapter energies, divergences, certainty."""

from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np

from safetynet.detection.detectors.base import Detector, clean, joined, layered
from safetynet.errors import InputError


@dataclass
class Extremes(Detector):
    """The largest reading, each measured by the distances between its own clean quantiles.

    Quantiles instead of the smallest and largest clean value: those widen with every further clean prompt.
    """

    two_sided: bool = False
    """Whether a low reading is suspect too, as with cosines."""
    top: int = 1
    """Mean of so many largest readings."""
    name: ClassVar[str] = "extremes"

    def fit(self, x: np.ndarray, y: np.ndarray | None = None) -> Self:
        """Learn from clean readings, (n, ...); readings that never change count nothing."""
        x = joined(clean(x, self.name, 10))
        low, self.centre_, high = np.quantile(x, [0.05, 0.5, 0.95], axis=0)
        self.below_, self.above_ = self.centre_ - low, high - self.centre_
        return self

    def score_samples(self, x: np.ndarray) -> np.ndarray:
        """Mean of the largest readings in units of the distance from median to 5% or 95% quantile, (n,)."""
        readings = joined(layered(x, self.name))
        if readings.shape[1] != len(self.above_):
            raise InputError(
                f"detector extremes: {readings.shape[1]} readings, it was fitted on {len(self.above_)}."
            )
        away = readings - self.centre_
        up = np.divide(away, self.above_, out=np.zeros_like(away), where=self.above_ > 0)
        if self.two_sided:
            down = np.divide(-away, self.below_, out=np.zeros_like(away), where=self.below_ > 0)
            up = np.maximum(up, down)
        return np.sort(up, axis=1)[:, -self.top :].mean(axis=1)


@dataclass
class SequenceLock(Detector):
    """How certain of itself an answer is over a window of tokens, against clean answers at the same place.

    After ConfGuard (arXiv 2508.01365), which asks for a probability above 0.99 ten times in a row; code,
    quotes and lists reach that too, so here each token is compared with clean tokens at the same place of an
    answer. In: `step_confidence` (n, T, 2), NaN after an answer's end.
    """

    window: int = 3
    name: ClassVar[str] = "lock"
    sequential: ClassVar[bool] = True

    def fit(self, x: np.ndarray, y: np.ndarray | None = None) -> Self:
        """Learn the clean log-odds at each place."""
        odds = self._odds(x)
        if np.isfinite(odds[:, 0]).sum() < 10:
            raise InputError(f"detector lock: {len(odds)} clean answers; it needs at least 10.")
        # Late places are reached by few answers; they borrow from all places before them.
        pools = [
            odds[:, : t + 1] if np.isfinite(odds[:, t]).sum() < 10 else odds[:, t]
            for t in range(odds.shape[1])
        ]
        self.centre_ = np.array([np.nanmedian(p) for p in pools])
        self.spread_ = np.array([max(float(np.nanstd(p)), 1e-6) for p in pools])
        return self

    def score_samples(self, x: np.ndarray) -> np.ndarray:
        """The largest mean of a window of standardised log-odds, (n,)."""
        return np.nanmax(self.score_steps(x), axis=1)

    def score_steps(self, x: np.ndarray) -> np.ndarray:
        """(n, T): mean of the window that ends at each token, NaN after an answer's end.

        What an answer's first windows lack counts as ordinary, 0: one certain token is no lock.
        """
        odds = self._odds(x)
        z = (odds - self.centre_[: odds.shape[1]]) / self.spread_[: odds.shape[1]]
        sums = np.cumsum(np.pad(z, ((0, 0), (self.window, 0))), axis=1)
        return (sums[:, self.window :] - sums[:, : -self.window]) / self.window

    def _odds(self, x: np.ndarray) -> np.ndarray:
        x = np.asarray(x, dtype=np.float64)
        if x.ndim != 3 or np.isinf(x).any() or np.isnan(x[:, 0]).any():
            raise InputError(
                f"detector lock: readings of shape {x.shape}; give view step_confidence, (n, T, 2)."
            )
        return x[..., 0]
