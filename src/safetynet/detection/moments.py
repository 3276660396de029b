"""What is kept of a stream: mean, covariance and Ledoit-Wolf shrinkage of all rows, and an even draw of some.

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
    scatter: np.ndarray
    """(d, d): sum of outer products of centred rows."""
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
        return cls(len(rows), mean, centred.T @ centred, lengths @ centred, float(lengths @ lengths))

    def merge(self, other: "Moments") -> "Moments":
        """Moments of both sets of rows (Chan, Golub and LeVeque 1983; the higher ones likewise)."""
        count = self.count + other.count
        mean = (self.count * self.mean + other.count * other.mean) / count
        a, b = self._about(mean), other._about(mean)
        return Moments(count, mean, a.scatter + b.scatter, a.cubic + b.cubic, a.quartic + b.quartic)

    @property
    def covariance(self) -> np.ndarray:
        """(d, d), divided by the count, as scikit-learn's estimators do."""
        return self.scatter / self.count

    @property
    def shrinkage(self) -> float:
        """Weight of the scaled identity after Ledoit and Wolf (2004), equal to scikit-learn's."""
        d = len(self.mean)
        squares = float((self.scatter**2).sum()) / self.count**2
        scale = float(np.trace(self.scatter)) / (self.count * d)
        beta = (self.quartic / self.count - squares) / (d * self.count)
        delta = (squares - 2 * scale * float(np.trace(self.scatter)) / self.count + d * scale**2) / d
        beta = min(beta, delta)
        return 0.0 if beta <= 0 else beta / delta

    @property
    def shrunk(self) -> np.ndarray:
        """(d, d): the covariance shrunk towards the identity times the mean variance, trace over d."""
        covariance, rho = self.covariance, self.shrinkage
        identity = np.eye(len(self.mean)) * (np.trace(covariance) / len(self.mean))
        return (1 - rho) * covariance + rho * identity

    def principal(self, most: int | None) -> tuple[np.ndarray, np.ndarray]:
        """Variances (k,) and orthonormal components (k, d), largest first; none that rounding made up."""
        values, vectors = np.linalg.eigh(self.covariance)
        values, vectors = values[::-1], vectors[:, ::-1]
        # Of n rows at most n - 1 directions vary; the others' variance is rounding.
        rank = min(int((values > max(values[0], 1e-300) * 1e-10).sum()), max(self.count - 1, 1))
        k = max(1, rank if most is None else min(most, rank))
        return values[:k], vectors[:, :k].T

    def _about(self, centre: np.ndarray) -> "Moments":
        """The same sums about another point; `mean` is then no mean, and only `merge` may see it."""
        move = centre - self.mean
        square, trace = float(move @ move), float(np.trace(self.scatter))
        pulled = self.scatter @ move
        cubic = self.cubic - trace * move - 2 * pulled - self.count * square * move
        quartic = (
            self.quartic
            - 4 * float(move @ self.cubic)
            + 4 * float(move @ pulled)
            + 2 * square * trace
            + self.count * square**2
        )
        scatter = self.scatter + self.count * np.outer(move, move)
        return Moments(self.count, centre, scatter, cubic, quartic)


class Reservoir:
    """An even draw of at most `size` samples from a stream, the same rows in every view."""

    def __init__(self, size: int, seed: int = 0) -> None:
        self.size, self.seen = size, 0
        self.rng = np.random.default_rng(seed)
        self.samples: dict[str, np.ndarray] = {}

    def add(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Offer some samples."""
        count = len(next(iter(arrays.values())))
        room = max(0, min(self.size - self.seen, count))
        if room:
            self.samples = {
                name: np.concatenate([self.samples[name], x[:room]]) if self.samples else x[:room].copy()
                for name, x in arrays.items()
            }
        # Sample number i (from 0) stays with chance size / (i + 1), in the place of a random one.
        places = [int(self.rng.integers(self.seen + row + 1)) for row in range(room, count)]
        for row, place in zip(range(room, count), places, strict=True):
            if place < self.size:
                for name, x in arrays.items():
                    self.samples[name][place] = x[row]
        self.seen += count
