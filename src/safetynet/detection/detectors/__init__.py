"""Detectors: scores of single samples, fitted on clean samples alone.

Each has scikit-learn's interface with one difference that is stated everywhere: a HIGHER score is MORE
suspect (scikit-learn's own `score_samples` is the other way round). `make` builds one by name; a name with
dots is an estimator of scikit-learn or PyOD.
"""

from importlib import import_module
from typing import Any

from safetynet.detection.detectors.base import Detector
from safetynet.errors import InputError

NAMES = {
    "mahalanobis": "gaussian.Mahalanobis",
    "top_components": "gaussian.TopComponents",
    "pca_residual": "gaussian.Residual",
    "layer_deltas": "trajectories.LayerDeltas",
    "ranks": "trajectories.Ranks",
    "neighbours": "neighbours.Neighbours",
    "mixture": "neighbours.Mixture",
    "autoencoders": "autoencoders.AutoEncoders",
    "variational": "autoencoders.VariationalAutoEncoders",
    "gram": "gram.Gram",
    "extremes": "extremes.Extremes",
    "lock": "extremes.SequenceLock",
    "linear_probe": "supervised.LinearProbe",
    "mlp_probe": "supervised.MLPProbe",
    "contrast_probe": "supervised.ContrastProbe",
}
"""Name to module and class. The three probes need labels: skylines, no monitors."""


def make(name: str, **settings: Any) -> Detector:
    """An unfitted detector by name.

    Raises:
        InputError: if there is no such detector, or it does not have one of these settings.
    """
    if "." in name:
        from safetynet.detection.detectors.estimator import Estimator

        return Estimator(name, settings)
    kind = _class_of(name)
    try:
        return kind(**settings)
    except TypeError as error:
        raise InputError(f"detector {name}: {str(error).rpartition('()')[2].strip()}.") from None


def exists(name: str) -> bool:
    """Whether there is a detector of this name, or it may be an estimator's."""
    return name in NAMES or "." in name


def needs_labels(name: str) -> bool:
    """Whether a detector of this name needs labels; False for names that do not exist."""
    return name in NAMES and bool(_class_of(name).supervised)


def restore(about: dict[str, Any], arrays: dict[str, Any]) -> Detector:
    """A fitted detector from what `Detector.state` gave."""
    detector = make(about["name"], **about["settings"])
    detector.learn(arrays)
    return detector


def _class_of(name: str) -> Any:
    if name not in NAMES:
        raise InputError(
            f"there is no detector {name!r}. Choose from {', '.join(NAMES)}, or give an estimator's full "
            "name, such as sklearn.neighbors.LocalOutlierFactor."
        )
    module, _, kind = NAMES[name].partition(".")
    return getattr(import_module(f"{__name__}.{module}"), kind)
