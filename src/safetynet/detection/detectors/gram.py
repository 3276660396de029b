"""Beatrix: Gram statistics of activations and their robust bounds (Ma et al. 2023, arXiv 2209.11715)."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from safetynet.detection.detectors.base import TINY, PerLayer


@dataclass
class Gram(PerLayer):
    """How far products of pairs of features lie outside median +/- 10 median absolute deviations.

    Made for feature maps with many places; a token's activation is cut into `pieces` that play the channels.
    """

    pieces: int = 16
    powers: tuple[int, ...] = (1, 2, 3, 4)
    width: float = 10.0
    """Bound in median absolute deviations."""
    name: ClassVar[str] = "gram"

    def fit_layers(self, x: np.ndarray) -> None:
        """Median and bound of each statistic."""
        statistics = self._statistics(x)
        self.median_ = np.median(statistics, axis=0)
        deviation = np.median(np.abs(statistics - self.median_), axis=0)
        self.bound_ = np.maximum(self.width * deviation, TINY)

    def layer_scores(self, x: np.ndarray) -> np.ndarray:
        """(n, L, d) to (n, L): mean distance in bounds, what lies inside the bounds counting a hundredth.

        The paper counts nothing inside; then most clean samples would tie at 0 and have no rank.
        """
        distance = np.abs(self._statistics(x) - self.median_) / self.bound_
        return (np.maximum(distance - 1, 0) + 0.01 * np.minimum(distance, 1)).mean(axis=2)

    def _statistics(self, x: np.ndarray) -> np.ndarray:
        """(n, L, d) to (n, L, powers * pairs), the p-th root of the Gram matrix of p-th powers."""
        pieces = min(self.pieces, x.shape[2])
        usable = x.shape[2] - x.shape[2] % pieces
        cut = x[:, :, :usable].reshape(*x.shape[:2], pieces, -1)
        rows, columns = np.triu_indices(pieces)
        statistics = []
        for power in self.powers:
            raised = cut**power
            gram = np.einsum("nlip,nljp->nlij", raised, raised)[..., rows, columns]
            statistics.append(np.sign(gram) * np.abs(gram) ** (1 / power))
        return np.concatenate(statistics, axis=2)
