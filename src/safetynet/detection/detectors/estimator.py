"""Any outlier detector of scikit-learn or PyOD by its full name, behind the detectors' interface.

Estimators are not pickled: the samples they were fitted on are saved, they are fitted again when loaded, and
a few remembered scores tell whether that gave the same estimator (another library version may not).
"""

import inspect
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, ClassVar, Self

import numpy as np

from safetynet.detection.detectors.base import Detector, clean, layered
from safetynet.errors import InputError

LIBRARIES = ("sklearn", "pyod")
"""A name may come from a recipe: nothing else is imported."""
REMEMBERED = 20


@dataclass
class Estimator(Detector):
    """Wraps an estimator; layers are joined into one vector per sample."""

    estimator: str
    """Such as sklearn.neighbors.LocalOutlierFactor or pyod.models.ecod.ECOD."""
    options: dict[str, Any] = field(default_factory=dict)
    """The estimator's own arguments. `novelty` and `random_state` are set where it has them."""
    name: ClassVar[str] = "estimator"

    def __post_init__(self) -> None:
        self._kind = _import(self.estimator)
        parameters = inspect.signature(self._kind).parameters
        unknown = sorted(set(self.options) - set(parameters))
        if unknown:
            raise InputError(
                f"{self.estimator}: there is no argument {unknown[0]!r}. It takes: {', '.join(parameters)}."
            )
        wanted = {"novelty": True, "random_state": 0}
        self._arguments = {k: v for k, v in wanted.items() if k in parameters} | self.options

    def fit(self, x: np.ndarray, y: np.ndarray | None = None) -> Self:
        """Fit the estimator to clean samples."""
        self.samples_ = _joined(clean(x, self.estimator, 10))
        self._fitted = self._kind(**self._arguments).fit(self.samples_)
        self.remembered_ = self.score_samples(self.samples_[:REMEMBERED])
        return self

    def score_samples(self, x: np.ndarray) -> np.ndarray:
        """The estimator's own score, turned so that higher is more suspect, (n,)."""
        flat = _joined(layered(x, self.estimator))
        if self.estimator.startswith("pyod."):
            return np.asarray(self._fitted.decision_function(flat), dtype=np.float64)
        return -np.asarray(self._fitted.score_samples(flat), dtype=np.float64)

    def state(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """As for any detector, under the estimator's own name."""
        about, arrays = super().state()
        return about | {"name": self.estimator, "settings": self.options}, arrays

    def learn(self, arrays: dict[str, np.ndarray]) -> None:
        """Fit again to the saved samples.

        Raises:
            InputError: if the scores are not what they were.
        """
        super().learn(arrays)
        remembered = arrays["remembered_"]
        self._fitted = self._kind(**self._arguments).fit(self.samples_)
        if not np.allclose(self.score_samples(self.samples_[:REMEMBERED]), remembered, rtol=1e-6, atol=1e-9):
            raise InputError(
                f"{self.estimator}: fitted again to the same samples, it scores otherwise than when it was "
                "saved. The library's version is another: fit the monitor again."
            )


def _import(name: str) -> Any:
    module, _, kind = name.rpartition(".")
    if name.partition(".")[0] not in LIBRARIES:
        raise InputError(
            f"detector {name!r}: estimators come from {' or '.join(LIBRARIES)}. Give a name from there."
        )
    try:
        found = getattr(import_module(module), kind)
    except ImportError as error:
        raise InputError(f"detector {name!r} cannot be imported ({error}). Install its library.") from None
    except AttributeError:
        raise InputError(f"detector {name!r}: {module} holds no {kind}. Check the spelling.") from None
    if not (inspect.isclass(found) and hasattr(found, "fit")) or not _scores(name, found):
        raise InputError(f"detector {name!r} is no outlier estimator: it needs fit and score_samples.")
    return found


def _scores(name: str, kind: Any) -> bool:
    return hasattr(kind, "decision_function" if name.startswith("pyod.") else "score_samples")


def _joined(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x.reshape(len(x), -1))
