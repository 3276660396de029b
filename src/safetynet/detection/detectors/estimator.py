"""Any outlier detector of scikit-learn or PyOD by its full name, behind the detectors' interface.

Estimators are not pickled: the samples they were fitted on are saved, they are fitted again when loaded, and
a few remembered scores tell whether that gave the same estimator (another library version may not). An
estimator whose score of a sample depends on its batch is refused: a guard asks about one prompt.
"""

import inspect
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, ClassVar, Self

import numpy as np

from safetynet.detection.detectors.base import Detector, clean, joined, layered
from safetynet.errors import InputError

LIBRARIES = ("sklearn", "pyod")
"""A name may come from a recipe: nothing else is imported."""
REMEMBERED = 20
ASKED = 4
"""Samples that are scored alone and in company when an estimator is fitted."""
COMPANY = 64
"""The largest company: a few samples among thousands of a fit would move a score too little to be seen."""
ROUNDING = 1e-4
"""Share of the range of scores within which they are the same: networks compute in fp32."""


@dataclass
class Estimator(Detector):
    """Wraps an estimator; layers are joined into one vector per sample."""

    estimator: str
    """Such as sklearn.neighbors.LocalOutlierFactor or pyod.models.knn.KNN."""
    options: dict[str, Any] = field(default_factory=dict)
    """The estimator's own arguments. `novelty` and `random_state` are set where it has them."""
    name: ClassVar[str] = "estimator"

    def __post_init__(self) -> None:
        module, _, kind = self.estimator.rpartition(".")
        if self.estimator.partition(".")[0] not in LIBRARIES:
            raise InputError(
                f"detector {self.estimator!r}: estimators come from {' or '.join(LIBRARIES)}. Give a name "
                "from there."
            )
        try:
            self._kind = getattr(import_module(module), kind)
        except ImportError as error:
            raise InputError(
                f"detector {self.estimator!r} cannot be imported ({error}). Install its library."
            ) from None
        except AttributeError:
            raise InputError(
                f"detector {self.estimator!r}: {module} holds no {kind}. Check the spelling."
            ) from None
        scoring = "decision_function" if self.estimator.startswith("pyod.") else "score_samples"
        is_estimator = inspect.isclass(self._kind) and hasattr(self._kind, "fit")
        if not is_estimator or not hasattr(self._kind, scoring):
            raise InputError(
                f"detector {self.estimator!r} is no outlier estimator: it needs fit and score_samples."
            )
        parameters = inspect.signature(self._kind).parameters
        unknown = sorted(set(self.options) - set(parameters))
        if unknown:
            raise InputError(
                f"{self.estimator}: there is no argument {unknown[0]!r}. It takes: {', '.join(parameters)}."
            )
        defaults = {"novelty": True, "random_state": 0}
        self._arguments = {k: v for k, v in defaults.items() if k in parameters} | self.options

    def fit(self, x: np.ndarray, y: np.ndarray | None = None) -> Self:
        """Fit the estimator to clean samples.

        Raises:
            InputError: if it cannot be fitted to them, or scores a sample otherwise alone than in company.
        """
        self.samples_ = joined(clean(x, self.estimator, 10))
        self._refit()
        self._check_alone()
        self.remembered_ = self.score_samples(self.samples_[:REMEMBERED])
        return self

    def score_samples(self, x: np.ndarray) -> np.ndarray:
        """The estimator's own score, turned so that higher is more suspect, (n,)."""
        flat = joined(layered(x, self.estimator))
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
            InputError: if the scores are not what they were, or depend on the batch.
        """
        super().learn(arrays)
        remembered = arrays["remembered_"]
        self._refit()
        self._check_alone()
        if not np.allclose(self.score_samples(self.samples_[:REMEMBERED]), remembered, rtol=1e-6, atol=1e-9):
            raise InputError(
                f"{self.estimator}: fitted again to the same samples, it scores otherwise than when it was "
                "saved. The library's version is another: fit the monitor again."
            )

    def _refit(self) -> None:
        """Fit to the samples, in the same way each time."""
        try:
            with _seeded():
                self._fitted = self._kind(**self._arguments).fit(self.samples_)
        except Exception as error:  # noqa: BLE001  # whatever a library raises where it cannot do this
            raise InputError(
                f"detector {self.estimator}: it cannot be fitted to {len(self.samples_)} clean samples "
                f"without labels ({_short(error)}). Give its arguments, or choose another estimator."
            ) from None

    def _check_alone(self) -> None:
        """Score some samples alone and in several companies, which must not make a difference."""
        samples, away = self.samples_, 3 * self.samples_.std(axis=0)
        # Between two samples: a sample itself may lie on the edge of a bin, where rounding decides.
        between = (samples[:ASKED] + samples[1 : ASKED + 1]) / 2
        probes = np.concatenate([between, between[:1] + away])
        company = samples[ASKED : ASKED + COMPANY]
        strangers = company[::-1] + away
        try:
            alone = np.concatenate([self.score_samples(sample[None]) for sample in probes])
            together = [
                self.score_samples(np.concatenate([probes, others]))[: len(probes)]
                for others in (probes[:0], company, strangers, -strangers)
            ]
            turned = self.score_samples(probes[::-1])[::-1]
        except Exception as error:  # noqa: BLE001
            raise InputError(
                f"detector {self.estimator}: it cannot score a single sample ({_short(error)}), as a guard "
                "must. Choose another estimator."
            ) from None
        if alone.shape != (len(probes),) or not np.isfinite(alone).all():
            raise InputError(
                f"detector {self.estimator}: its scores of single samples are no numbers. Give its "
                "arguments, or choose another estimator."
            )
        size = np.ptp(np.concatenate([alone, *together]))
        if size == 0:
            raise InputError(
                f"detector {self.estimator}: it gives clean and strange samples one and the same score. Give "
                "its arguments, or choose another estimator."
            )
        for scores in (*together, turned):
            if not np.allclose(scores, alone, rtol=ROUNDING, atol=ROUNDING * size):
                raise InputError(
                    f"detector {self.estimator}: its score of a sample depends on the batch that it is "
                    "scored in, so that a prompt alone and among others would be judged differently. Choose "
                    "another estimator, such as pyod.models.knn.KNN."
                )


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}".rstrip(": .")


@contextmanager
def _seeded() -> Iterator[None]:
    """The global random numbers of those that take no `random_state`, always the same; then as before."""
    import torch

    held = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng():
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002
        torch.manual_seed(0)
        try:
            yield
        finally:
            random.setstate(held[0])
            np.random.set_state(held[1])  # noqa: NPY002
