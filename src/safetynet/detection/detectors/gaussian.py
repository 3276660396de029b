"""Detectors that describe each layer by mean and covariance: Mahalanobis, Euclidean in the top, residual."""

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np

from safetynet.detection.detectors.base import PerLayer, clean, layered
from safetynet.detection.moments import Moments, Reservoir
from safetynet.errors import InputError

REMEMBERED = 2000
"""Samples of a stream from which the spread of clean scores is estimated."""


@dataclass
class MomentDetector(PerLayer):
    """A detector that needs of each layer its moments alone, and so can be fitted from a stream."""

    def fit_layers(self, x: np.ndarray) -> None:
        """Moments of each layer, then what is made of them."""
        self.set_moments([Moments.of(x[:, layer]) for layer in range(x.shape[1])])

    @abstractmethod
    def set_moments(self, moments: list[Moments]) -> None:
        """Learn from the moments of each layer."""

    def partial_fit(self, x: np.ndarray) -> Self:
        """Add clean samples, (n, d) or (n, L, d); `finish` ends it. Memory does not grow with the samples."""
        x = layered(x, self.name)
        new = [Moments.of(x[:, layer]) for layer in range(x.shape[1])]
        old = getattr(self, "_moments", None)
        self._moments = new if old is None else [a.merge(b) for a, b in zip(old, new, strict=True)]
        if old is None:
            self._seen = Reservoir(REMEMBERED)
        self._seen.add({"x": x})
        return self

    def finish(self) -> Self:
        """Make the detector of all samples that `partial_fit` has seen.

        Raises:
            InputError: if these are too few, or all the same.
        """
        moments: list[Moments] = getattr(self, "_moments", [])
        count = moments[0].count if moments else 0
        if count < self.least:
            raise InputError(f"detector {self.name}: {count} clean samples; it needs at least {self.least}.")
        samples = clean(self._seen.samples["x"], self.name, self.least)
        self.set_moments(moments)
        self.standardise(samples)
        return self


@dataclass
class Mahalanobis(MomentDetector):
    """Squared Mahalanobis distance with Ledoit-Wolf shrinkage (Lee et al. 2018; Ledoit and Wolf 2004).

    Equal to scikit-learn's `LedoitWolf().fit(x).mahalanobis(x)` for one layer.
    """

    components: int | None = None
    """Count only the top so many principal components; None for all."""
    name: ClassVar[str] = "mahalanobis"

    def layer_scores(self, x: np.ndarray) -> np.ndarray:
        """(n, L, d) to (n, L) squared distances."""
        centred = x - self.mean_
        inside = (_along(centred, self.directions_) ** 2 * self.scales_).sum(axis=2)
        return inside + self.rest_ * (centred**2).sum(axis=2)

    def set_moments(self, moments: list[Moments]) -> None:
        """Mean and scaled directions of each layer.

        Where samples are fewer than dimensions, the directions in which none varies share one variance, the
        shrinkage's, and are not kept: a model of 80 layers of 8192 would need 43 GB of them.
        """
        self.mean_ = np.stack([m.mean for m in moments])
        parts = [m.principal(self.components) for m in moments]
        # Ledoit and Wolf: (1 - rho) covariance + rho mu I, so that v becomes (1 - rho) v + rho mu along a
        # component, and rho mu, the floor, where no sample varies.
        floors = np.array([m.shrinkage * m.scale for m in moments])
        weights = [1 - m.shrinkage for m in moments]
        shrunk = [w * v + floor for w, (v, _), floor in zip(weights, parts, floors, strict=True)]
        largest = np.array([v.max() for v in shrunk])
        self.rest_ = np.zeros(len(moments)) if self.components else _inverse(floors, largest)
        # The whole distance counts at 1 / floor; along a component what it weighs beyond that is added.
        scales = [_inverse(v, most) - r for v, most, r in zip(shrunk, largest, self.rest_, strict=True)]
        self.scales_ = _stacked(scales)
        self.directions_ = _stacked([directions for _, directions in parts])


@dataclass
class TopComponents(MomentDetector):
    """Squared Euclidean distance from the clean mean inside the top principal components.

    Mahalanobis divides these components' shifts by their large variance and hardly sees them.
    """

    components: int = 8
    name: ClassVar[str] = "top_components"

    def set_moments(self, moments: list[Moments]) -> None:
        """Mean and top components of each layer."""
        parts = [m.principal(self.components) for m in moments]
        k = min(len(variances) for variances, _ in parts)
        self.mean_ = np.stack([m.mean for m in moments])
        self.components_ = np.stack([components[:k] for _, components in parts])

    def layer_scores(self, x: np.ndarray) -> np.ndarray:
        """(n, L, d) to (n, L) squared distances."""
        return (_along(x - self.mean_, self.components_) ** 2).sum(axis=2)


@dataclass
class Residual(MomentDetector):
    """Squared distance from the clean principal subspace (Q statistic, Jackson and Mudholkar 1979)."""

    energy: float = 0.95
    """Share of the variance that the subspace holds."""
    name: ClassVar[str] = "pca_residual"

    def set_moments(self, moments: list[Moments]) -> None:
        """Components of each layer, zero rows where a layer needs fewer than another."""
        self.mean_ = np.stack([m.mean for m in moments])
        subspaces = []
        for variances, components in (m.principal(None) for m in moments):
            share = np.cumsum(variances) / variances.sum()
            subspaces.append(components[: int(np.searchsorted(share, self.energy)) + 1])
        self.components_ = _stacked(subspaces)

    def layer_scores(self, x: np.ndarray) -> np.ndarray:
        """(n, L, d) to (n, L) squared residuals."""
        centred = x - self.mean_
        inside = _along(centred, self.components_)
        return ((centred - _along(inside, self.components_.transpose(0, 2, 1))) ** 2).sum(axis=2)


def _inverse(variances: np.ndarray, largest: np.ndarray) -> np.ndarray:
    """1 over each. A direction that has none, for lack of shrinkage, cannot be judged and counts nothing."""
    judged = variances > largest * 1e-12
    return np.where(judged, 1 / np.where(judged, variances, 1.0), 0.0)


def _stacked(parts: list[np.ndarray]) -> np.ndarray:
    """Arrays of k entries as one, with zeros where a layer has fewer than another."""
    most = max(map(len, parts))
    return np.stack([np.pad(p, [(0, most - len(p)), *[(0, 0)] * (p.ndim - 1)]) for p in parts])


def _along(x: np.ndarray, directions: np.ndarray) -> np.ndarray:
    """Coordinates of (n, L, d) along each layer's (L, k, d), (n, L, k). einsum is several times slower."""
    return np.matmul(x.transpose(1, 0, 2), directions.transpose(0, 2, 1)).transpose(1, 0, 2)
