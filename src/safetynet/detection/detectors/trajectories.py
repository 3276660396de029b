"""Detectors of how a sample moves from layer to layer: distances of its steps, ranks of its neighbours."""

from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np

from safetynet.detection.detectors.base import TINY, Detector, clean, layered
from safetynet.detection.moments import Moments
from safetynet.errors import InputError


@dataclass
class LayerDeltas(Detector):
    """Distances of the steps between layers, judged together (LCF, arXiv 2604.24542).

    Each step's diagonal distance is measured; the vector of distances is then scored by Ledoit-Wolf
    Mahalanobis. Both stages are cross-fitted: distances of a fold come from means of the others, since
    distances from one's own mean are too small and the second stage would expect too little.
    """

    folds: int = 5
    seed: int = 0
    name: ClassVar[str] = "layer_deltas"

    def fit(self, x: np.ndarray, y: np.ndarray | None = None) -> Self:
        """Learn from clean samples, (n, L, d) with at least two layers."""
        deltas = _deltas(clean(x, self.name, 4 * self.folds), self.name)
        fold = np.random.default_rng(self.seed).permutation(len(deltas)) % self.folds
        distances = np.concatenate(
            [_diagonal(deltas[fold == f], *_spreads(deltas[fold != f])) for f in range(self.folds)]
        )
        self.mean_, self.spread_ = _spreads(deltas)
        self.centre_, self.precision_ = _gaussian(distances)
        return self

    def score_samples(self, x: np.ndarray) -> np.ndarray:
        """Squared Mahalanobis distance of log distances, (n,)."""
        deltas = _deltas(layered(x, self.name), self.name)
        return _squared(_diagonal(deltas, self.mean_, self.spread_) - self.centre_, self.precision_)


@dataclass
class Ranks(Detector):
    """Ranks at which a sample's nearest clean neighbours reappear in the next layer (TED without labels).

    After Mo et al. (2024, arXiv 2312.02673), which follows the nearest sample of the same class; a language
    model has no classes, so each layer's own nearest neighbours are followed. Nothing here has a gradient.
    """

    neighbours: int = 10
    projected: int = 64
    """Dimensions of a secret random projection before distances are taken."""
    most: int = 2000
    """Most clean samples that are kept."""
    folds: int = 5
    seed: int = 0
    name: ClassVar[str] = "ranks"

    def fit(self, x: np.ndarray, y: np.ndarray | None = None) -> Self:
        """Learn from clean samples, (n, L, d) with at least two layers."""
        x = clean(x, self.name, 4 * self.neighbours)
        _deltas(x[:1], self.name)
        rng = np.random.default_rng(self.seed)
        x = x[rng.permutation(len(x))[: self.most]]
        d, k = x.shape[2], self.projected
        # A Gaussian projection keeps distances (Johnson and Lindenstrauss 1984); small d need none.
        self.projection_ = np.eye(d) if d <= k else rng.standard_normal((d, k)) / np.sqrt(k)
        self.bank_ = (x @ self.projection_).astype(np.float32)
        fold = np.arange(len(x)) % self.folds
        ranks = np.concatenate(
            [_ranks(self.bank_[fold == f], self.bank_[fold != f], self.neighbours) for f in range(self.folds)]
        )
        self.centre_, self.precision_ = _gaussian(ranks)
        return self

    def score_samples(self, x: np.ndarray) -> np.ndarray:
        """Squared Mahalanobis distance of log ranks, (n,)."""
        points = (layered(x, self.name) @ self.projection_).astype(np.float32)
        return _squared(_ranks(points, self.bank_, self.neighbours) - self.centre_, self.precision_)


def _deltas(x: np.ndarray, name: str) -> np.ndarray:
    if x.shape[1] < 2:
        raise InputError(
            f"detector {name}: it compares layers, and the samples have one. Capture at least two."
        )
    return np.diff(x, axis=1)


def _spreads(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    spread = x.std(axis=0)
    # A coordinate that hardly ever moves must not decide alone, so it gets a hundredth of the layer's mean
    # spread.
    return x.mean(axis=0), np.maximum(spread, np.maximum(0.01 * spread.mean(axis=-1, keepdims=True), TINY))


def _diagonal(x: np.ndarray, mean: np.ndarray, spread: np.ndarray) -> np.ndarray:
    """(n, L, d) to (n, L): log of the root mean square of standardised coordinates."""
    return np.log(np.sqrt((((x - mean) / spread) ** 2).mean(axis=2)) + TINY)


def _gaussian(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    moments = Moments.of(rows)
    return moments.mean, np.linalg.pinv(moments.shrunk, hermitian=True)


def _squared(centred: np.ndarray, precision: np.ndarray) -> np.ndarray:
    return np.einsum("ni,ij,nj->n", centred, precision, centred)


def _ranks(points: np.ndarray, bank: np.ndarray, k: int) -> np.ndarray:
    """(n, L, p) and (m, L, p) to (n, L - 1): log of the mean rank in layer l + 1 of the k nearest of layer l.

    One sample at a time is compared with the bank, so that a sample's score does not depend on its batch.
    """
    layers = np.ascontiguousarray(bank.transpose(1, 0, 2))
    lengths = (layers**2).sum(axis=2)
    k, rows = min(k, len(bank)), []
    for point in points:
        # The sample's own squared length is the same for all of the bank and changes no order.
        distances = lengths - 2 * np.einsum("lmp,lp->lm", layers, point)
        nearest = np.argpartition(distances, k - 1, axis=1)[:, :k]
        rows.append(
            [
                np.count_nonzero(after < after[near][:, None]) / k
                for near, after in zip(nearest[:-1], distances[1:], strict=True)
            ]
        )
    # In thousandths of the bank, so that banks of other sizes compare; logs, since ranks are skewed.
    return np.log1p(np.array(rows) / len(bank) * 1000)
