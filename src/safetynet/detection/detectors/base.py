"""What every detector is: settings in the constructor, learned arrays that end in `_`, one score per sample.

A detector is a dataclass. Its fields are its settings; `fit` sets attributes that end in an underscore, each
a numpy array, and these alone are saved.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Self

import numpy as np

from safetynet.detection.moments import Moments
from safetynet.errors import InputError

TINY = 1e-12


@dataclass
class Detector(ABC):
    """Scores samples; a higher score is more suspect."""

    name: ClassVar[str]
    supervised: ClassVar[bool] = False
    """Whether `fit` needs triggered samples too: a skyline that no defender has."""
    sequential: ClassVar[bool] = False
    """Whether a sample is a whole answer, of which `score_steps` judges every beginning."""

    @abstractmethod
    def fit(self, x: np.ndarray, y: np.ndarray | None = None) -> Self:
        """Learn from clean samples, shape (n, d) or (n, L, d); `y` is for supervised detectors only."""

    @abstractmethod
    def score_samples(self, x: np.ndarray) -> np.ndarray:
        """One score per sample, (n,), which depends on no other sample of `x`."""

    def score_steps(self, x: np.ndarray) -> np.ndarray:
        """(n, T, ...) to (n, T), for sequential detectors: the score at each token, from what came before."""
        raise NotImplementedError(f"{self.name} judges single samples")

    def state(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Settings as JSON values, and learned arrays.

        Raises:
            InputError: if it is not fitted.
        """
        learned = {n: np.asarray(v) for n, v in vars(self).items() if n.endswith("_")}
        if not learned:
            raise InputError(f"detector {self.name}: it is not fitted yet. Call fit with clean samples.")
        settings = {field.name: getattr(self, field.name) for field in fields(self)}
        return {"name": self.name, "settings": settings}, learned

    def learn(self, arrays: dict[str, np.ndarray]) -> None:
        """Take learned arrays back."""
        for name, array in arrays.items():
            setattr(self, name, array)


def layered(x: np.ndarray, name: str) -> np.ndarray:
    """Samples as (n, L, d) in fp64; samples without layers get one.

    Raises:
        InputError: if the shape is another, or values are NaN or infinite.
    """
    x = np.ascontiguousarray(x, dtype=np.float64)
    if x.ndim not in (2, 3) or 0 in x.shape:
        raise InputError(f"detector {name}: samples have shape {x.shape}; give (n, d) or (n, layers, d).")
    if not np.isfinite(x).all():
        raise InputError(
            f"detector {name}: samples hold NaN or infinite values. Load the model in bf16 or fp32."
        )
    return x[:, None] if x.ndim == 2 else x


def joined(x: np.ndarray) -> np.ndarray:
    """(n, ...) to (n, d): all readings of a sample in one row."""
    return x.reshape(len(x), -1)


def clean(x: np.ndarray, name: str, least: int) -> np.ndarray:
    """Samples to fit on, as `layered` gives them.

    Raises:
        InputError: if they are fewer than `least`, or all the same.
    """
    x = layered(x, name)
    if len(x) < least:
        raise InputError(f"detector {name}: {len(x)} clean samples; it needs at least {least}.")
    if not (x != x[0]).any():
        raise InputError(
            f"detector {name}: all clean samples are the same, so there is nothing to compare with. Check "
            "the prompts and the layers."
        )
    return x


@dataclass
class PerLayer(Detector):
    """A detector that scores each layer alone.

    Layers' scores are standardised by their median and spread on the clean samples before the mean is taken:
    raw scores differ by orders of magnitude between layers, and the largest layer would decide alone.
    """

    least: ClassVar[int] = 10

    def fit(self, x: np.ndarray, y: np.ndarray | None = None) -> Self:
        """Learn each layer from clean samples, (n, d) or (n, L, d)."""
        x = clean(x, self.name, self.least)
        self.fit_layers(x)
        self.standardise(x)
        return self

    def standardise(self, x: np.ndarray) -> None:
        """Learn centre and spread of each layer's scores from clean samples, (n, L, d)."""
        scores = self.layer_scores(x)
        self.centre_ = np.median(scores, axis=0)
        # Median absolute deviation; the standard deviation where most values are the same.
        deviation = np.median(np.abs(scores - self.centre_), axis=0)
        self.spread_ = np.where(deviation > TINY, deviation, np.maximum(scores.std(axis=0), TINY))

    def score_samples(self, x: np.ndarray) -> np.ndarray:
        """Mean over layers of standardised scores, (n,)."""
        x = layered(x, self.name)
        if x.shape[1] != len(self.centre_):
            raise InputError(
                f"detector {self.name}: samples have {x.shape[1]} layers, it was fitted on "
                f"{len(self.centre_)}. Capture the same layers."
            )
        scores = self.layer_scores(x)
        return ((scores - self.centre_) / self.spread_).mean(axis=1)

    @abstractmethod
    def fit_layers(self, x: np.ndarray) -> None:
        """Learn from (n, L, d)."""

    @abstractmethod
    def layer_scores(self, x: np.ndarray) -> np.ndarray:
        """(n, L, d) to (n, L)."""


def principal(x: np.ndarray, most: int | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean (d,), variances (k,) and orthonormal components (k, d) of one layer, largest first.

    Directions in which clean samples do not vary at all are left out: dividing by them would make any sample
    infinitely suspect.
    """
    moments = Moments.of(x)
    return moments.mean, *moments.principal(most)
