"""Detectors for clean prompts of many kinds: distance to the nearest neighbours, or to a cluster."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from safetynet.detection.detectors.base import PerLayer, principal
from safetynet.detection.moments import Moments
from safetynet.extras import need


@dataclass
class _Whitened(PerLayer):
    """What both share: each layer is whitened in its top components first."""

    components: int = 64

    def _whiten(self, x: np.ndarray) -> list[np.ndarray]:
        parts = [principal(x[:, layer], self.components) for layer in range(x.shape[1])]
        k = min(len(variances) for _, variances, _ in parts)
        self.mean_ = np.stack([mean for mean, _, _ in parts])
        self.variances_ = np.stack([variances[:k] for _, variances, _ in parts])
        self.components_ = np.stack([components[:k] for _, _, components in parts])
        return [self._inside(x, layer) for layer in range(x.shape[1])]

    def _inside(self, x: np.ndarray, layer: int) -> np.ndarray:
        """(n, L, d) to (n, k): unit variance along each of the layer's components."""
        turned = (x[:, layer] - self.mean_[layer]) @ self.components_[layer].T
        return turned / np.sqrt(self.variances_[layer])


@dataclass
class Neighbours(_Whitened):
    """Distance to the k-th nearest clean sample in whitened top components (Sun et al. 2022)."""

    neighbours: int = 10
    most: int = 2000
    """Most clean samples that are kept."""
    seed: int = 0
    name: ClassVar[str] = "neighbours"

    def fit_layers(self, x: np.ndarray) -> None:
        """Keep clean samples of each layer."""
        bank = np.stack(self._whiten(x), axis=1)
        rows = np.random.default_rng(self.seed).permutation(len(bank))[: self.most]
        self.bank_ = bank[rows]

    def layer_scores(self, x: np.ndarray) -> np.ndarray:
        """(n, L, d) to (n, L) distances."""
        k = min(self.neighbours, len(self.bank_)) - 1
        columns = []
        for layer in range(x.shape[1]):
            z, bank = self._inside(x, layer), self.bank_[:, layer]
            squared = (z**2).sum(axis=1)[:, None] + (bank**2).sum(axis=1) - 2 * z @ bank.T
            columns.append(np.sqrt(np.maximum(np.partition(squared, k, axis=1)[:, k], 0)))
        return np.stack(columns, axis=1)


@dataclass
class Mixture(_Whitened):
    """Smallest Mahalanobis distance to a cluster, with one covariance (Lee et al. 2018, without labels).

    The number of clusters is chosen by BIC; the covariance within clusters is shrunk after Ledoit and Wolf.
    """

    most_clusters: int = 8
    seed: int = 0
    name: ClassVar[str] = "mixture"

    def fit_layers(self, x: np.ndarray) -> None:
        """Clusters of each layer, the first repeated where another layer has more."""
        need(f"detector {self.name}", "sklearn")
        from sklearn.mixture import GaussianMixture

        clusters = []
        for z in self._whiten(x):  # (n, components)
            sizes = [k for k in (1, 2, 4, 8, 16) if k <= min(self.most_clusters, len(z) // 10)] or [1]
            fitted = [
                GaussianMixture(k, covariance_type="tied", random_state=self.seed, reg_covar=1e-4).fit(z)
                for k in sizes
            ]
            best = min(fitted, key=lambda mixture: mixture.bic(z))  # called at once
            inside = Moments.of(z - best.means_[best.predict(z)])
            clusters.append((best.means_, np.linalg.pinv(inside.shrunk, hermitian=True)))
        k = max(len(means) for means, _ in clusters)
        self.centres_ = np.stack([np.concatenate([m, m[:1].repeat(k - len(m), axis=0)]) for m, _ in clusters])
        self.precision_ = np.stack([precision for _, precision in clusters])

    def layer_scores(self, x: np.ndarray) -> np.ndarray:
        """(n, L, d) to (n, L) squared distances."""
        columns = []
        for layer in range(x.shape[1]):
            away = self._inside(x, layer)[:, None] - self.centres_[layer]
            columns.append(np.einsum("nci,ij,ncj->nc", away, self.precision_[layer], away).min(axis=1))
        return np.stack(columns, axis=1)
