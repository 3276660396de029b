"""What remains of a stream: mean, covariance and Ledoit-Wolf shrinkage of all rows, and an even draw of some.

In: arrays of shape (rows, dimensions), in any number of parts. Out: the same numbers as from all rows at
once, in memory that does not grow with them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import numpy as np


@dataclass(frozen=True)
class Moments:
    """Central moments of rows; `merge` is associative, so that parts may come from anywhere."""

    count: int
    mean: np.ndarray
    """(d,)"""
    factor: np.ndarray
    """(k, d): its rows have the same sum of outer products as the centred rows, k at most 2 d. A model is
    often wider than there are samples; a matrix (d, d) would then be the larger one."""
    cubic: np.ndarray
    """(d,): sum of centred rows, each times its squared length. Needed to move `quartic` to another mean."""
    quartic: float
    """Sum of squared squared lengths of centred rows: what Ledoit-Wolf's shrinkage needs of single rows."""

    @classmethod
    def of(cls, rows: np.ndarray) -> Self:
        """Moments of an array of shape (rows, d)."""
        rows = np.asarray(rows, dtype=np.float64)
        mean = rows.mean(axis=0)
        centred = rows - mean
        lengths = (centred**2).sum(axis=1)
        return cls(len(rows), mean, _short(centred), lengths @ centred, float(lengths @ lengths))

    def merge(self, other: "Moments") -> "Moments":
        """Moments of both sets of rows (Chan, Golub and LeVeque 1983; the higher ones likewise)."""
        count = self.count + other.count
        mean = (self.count * self.mean + other.count * other.mean) / count
        between = np.sqrt(self.count * other.count / count) * (self.mean - other.mean)
        factor = _short(np.concatenate([self.factor, other.factor, between[None]]))
        (cubic, quartic), (more_cubic, more_quartic) = self._about(mean), other._about(mean)
        return Moments(count, mean, factor, cubic + more_cubic, quartic + more_quartic)

    @property
    def covariance(self) -> np.ndarray:
        """(d, d), divided by the count, as scikit-learn's estimators do."""
        return self.factor.T @ self.factor / self.count

    @property
    def scale(self) -> float:
        """Mean variance of a coordinate."""
        return float((self.factor**2).sum()) / (len(self.mean) * self.count)

    @property
    def shrinkage(self) -> float:
        """Weight of the scaled identity after Ledoit and Wolf (2004), equal to scikit-learn's."""
        d = len(self.mean)
        squares = float((_gram(self.factor) ** 2).sum()) / self.count**2
        beta = (self.quartic / self.count - squares) / (d * self.count)
        delta = squares / d - self.scale**2
        beta = min(beta, delta)
        return 0.0 if beta <= 0 else beta / delta

    @property
    def shrunk(self) -> np.ndarray:
        """(d, d): the covariance shrunk towards the identity times the mean variance, trace over d."""
        rho = self.shrinkage
        return (1 - rho) * self.covariance + rho * self.scale * np.eye(len(self.mean))

    def principal(self, most: int | None) -> tuple[np.ndarray, np.ndarray]:
        """Variances (k,) and orthonormal components (k, d), largest first; none that rounding made up."""
        values, vectors = np.linalg.eigh(_gram(self.factor))
        values, vectors = values[::-1].copy(), vectors.T[::-1].copy()
        # Of n rows at most n - 1 directions vary; the others' variance is rounding.
        rank = min(int((values > max(values[0], 1e-300) * 1e-10).sum()), max(self.count - 1, 1))
        k = max(1, rank if most is None else min(most, rank))
        components = vectors[:k]
        if len(self.factor) < len(self.mean):  # they weigh the factor's rows so far
            components = components @ self.factor / np.sqrt(np.maximum(values[:k], 1e-300))[:, None]
        # Either sign is right, and which one comes depends on the machine; networks start from them.
        largest = np.take_along_axis(components, np.abs(components).argmax(1)[:, None], axis=1)
        return values[:k] / self.count, components * np.where(largest < 0, -1.0, 1.0)

    def _about(self, centre: np.ndarray) -> tuple[np.ndarray, float]:
        """`cubic` and `quartic` about another point."""
        move = centre - self.mean
        square, trace = float(move @ move), float((self.factor**2).sum())
        pulled = self.factor.T @ (self.factor @ move)
        cubic = self.cubic - trace * move - 2 * pulled - self.count * square * move
        quartic = (
            self.quartic
            - 4 * float(move @ self.cubic)
            + 4 * float(move @ pulled)
            + 2 * square * trace
            + self.count * square**2
        )
        return cubic, quartic


def _gram(factor: np.ndarray) -> np.ndarray:
    """Of rows or of columns, whichever are fewer; both have the same values other than 0."""
    return factor @ factor.T if len(factor) < factor.shape[1] else factor.T @ factor


def _short(factor: np.ndarray) -> np.ndarray:
    """The same in at most 2 d rows; not in d at once, so that a stream seldom pays for it."""
    return factor if len(factor) <= 2 * factor.shape[1] else np.asarray(np.linalg.qr(factor, mode="r"))


class Reservoir:
    """An even draw of at most `size` samples from a stream, the same rows in every view."""

    def __init__(self, size: int, seed: int = 0) -> None:
        self.size, self.count = size, 0
        self.rng = np.random.default_rng(seed)
        self.samples: dict[str, np.ndarray] = {}

    def add(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Offer some samples."""
        new = len(next(iter(arrays.values())))
        room = max(0, min(self.size - self.count, new))
        if room:
            self.samples = {
                name: np.concatenate([self.samples[name], x[:room]]) if self.samples else x[:room].copy()
                for name, x in arrays.items()
            }
        # Sample number i (from 0) stays with chance size / (i + 1), in the place of a random one.
        for row in range(room, new):
            place = int(self.rng.integers(self.count + row + 1))
            if place < self.size:
                for name, x in arrays.items():
                    self.samples[name][place] = x[row]
        self.count += new
