"""Detectors that describe each layer by mean and covariance: Mahalanobis, Euclidean in the top, residual."""

from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np

from safetynet.detection.detectors.base import PerLayer, layered, principal
from safetynet.detection.moments import Moments
from safetynet.errors import InputError


@dataclass
class Mahalanobis(PerLayer):
    """Squared Mahalanobis distance with Ledoit-Wolf shrinkage (Lee et al. 2018; Ledoit and Wolf 2004).

    Equal to scikit-learn's `LedoitWolf().fit(x).mahalanobis(x)` for one layer. Also fits from a stream.
    """

    components: int | None = None
    """Count only the top so many principal components; None for all."""
    name: ClassVar[str] = "mahalanobis"

    def fit_layers(self, x: np.ndarray) -> None:
        """Moments of each layer, then its directions."""
        self._set([Moments.of(x[:, layer]) for layer in range(x.shape[1])])

    def partial_fit(self, x: np.ndarray) -> Self:
        """Add clean samples, (n, d) or (n, L, d); `finish` ends it. Memory does not grow with the samples."""
        x = layered(x, self.name)
        new = [Moments.of(x[:, layer]) for layer in range(x.shape[1])]
        old = getattr(self, "_moments", None)
        self._moments = new if old is None else [a.merge(b) for a, b in zip(old, new, strict=True)]
        return self

    def finish(self) -> Self:
        """Make the detector of all samples that `partial_fit` has seen.

        Raises:
            InputError: if these are too few.
        """
        moments: list[Moments] = getattr(self, "_moments", [])
        if not moments or moments[0].count < self.least:
            seen = moments[0].count if moments else 0
            raise InputError(f"detector mahalanobis: {seen} clean samples; it needs at least {self.least}.")
        self._set(moments)
        # A squared distance has mean k and variance 2k where activations are Gaussian.
        k = (self.scales_ > 0).sum(axis=1)
        self.centre_, self.spread_ = k.astype(float), np.sqrt(2.0 * k)
        return self

    def layer_scores(self, x: np.ndarray) -> np.ndarray:
        """(n, L, d) to (n, L) squared distances."""
        turned = np.einsum("nld,lkd->nlk", x - self.mean_, self.directions_)
        return (turned**2 * self.scales_).sum(axis=2)

    def _set(self, moments: list[Moments]) -> None:
        self.mean_ = np.stack([m.mean for m in moments])
        pairs = [np.linalg.eigh(m.shrunk) for m in moments]
        kept = slice(None) if self.components is None else slice(-self.components, None)
        values = np.stack([values[kept] for values, _ in pairs])
        self.directions_ = np.stack([vectors[:, kept].T for _, vectors in pairs])
        # Without any shrinkage a direction may have no variance; it cannot be judged and counts nothing.
        judged = values > values.max(axis=1, keepdims=True) * 1e-12
        self.scales_ = np.where(judged, 1 / np.where(judged, values, 1.0), 0.0)


@dataclass
class TopComponents(PerLayer):
    """Squared Euclidean distance from the clean mean inside the top principal components.

    Mahalanobis divides these components' shifts by their large variance and hardly sees them.
    """

    components: int = 8
    name: ClassVar[str] = "top_components"

    def fit_layers(self, x: np.ndarray) -> None:
        """Mean and top components of each layer."""
        parts = [principal(x[:, layer], self.components) for layer in range(x.shape[1])]
        k = min(len(variances) for _, variances, _ in parts)
        self.mean_ = np.stack([mean for mean, _, _ in parts])
        self.components_ = np.stack([components[:k] for _, _, components in parts])

    def layer_scores(self, x: np.ndarray) -> np.ndarray:
        """(n, L, d) to (n, L) squared distances."""
        return (np.einsum("nld,lkd->nlk", x - self.mean_, self.components_) ** 2).sum(axis=2)


@dataclass
class Residual(PerLayer):
    """Squared distance from the clean principal subspace (Q statistic, Jackson and Mudholkar 1979)."""

    energy: float = 0.95
    """Share of the variance that the subspace holds."""
    name: ClassVar[str] = "pca_residual"

    def fit_layers(self, x: np.ndarray) -> None:
        """Components of each layer, zero rows where a layer needs fewer than another."""
        parts = [self._subspace(x[:, layer]) for layer in range(x.shape[1])]
        k = max(len(components) for _, components in parts)
        self.mean_ = np.stack([mean for mean, _ in parts])
        self.components_ = np.stack([np.pad(c, ((0, k - len(c)), (0, 0))) for _, c in parts])

    def layer_scores(self, x: np.ndarray) -> np.ndarray:
        """(n, L, d) to (n, L) squared residuals."""
        centred = x - self.mean_
        inside = np.einsum("nld,lkd->nlk", centred, self.components_)
        return ((centred - np.einsum("nlk,lkd->nld", inside, self.components_)) ** 2).sum(axis=2)

    def _subspace(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        mean, variances, components = principal(x, None)
        k = int(np.searchsorted(np.cumsum(variances) / variances.sum(), self.energy)) + 1
        return mean, components[:k]
