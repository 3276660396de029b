"""Which detectors read which views: the part of a monitor that turns features into scores."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Self

import numpy as np

from safetynet.detection import detectors
from safetynet.detection.detectors.base import Detector
from safetynet.detection.detectors.gaussian import MomentDetector
from safetynet.detection.features import View, view_of
from safetynet.detection.files import below
from safetynet.detection.moments import Reservoir
from safetynet.errors import InputError


@dataclass(frozen=True)
class DetectorSpec:
    """One detector on one view."""

    detector: str
    view: View = "last"
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Such as mahalanobis:last; columns of tables carry it."""
        return f"{self.detector.rpartition('.')[2]}:{self.view}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """From `detector:view`; the view is `last` where none is given."""
        name, _, view = text.partition(":")
        return cls(name, view or "last")  # type: ignore[arg-type]


DIVERSE = (
    DetectorSpec("mahalanobis"),
    DetectorSpec("top_components"),
    DetectorSpec("pca_residual"),
    DetectorSpec("layer_deltas"),
    DetectorSpec("ranks"),
    DetectorSpec("neighbours", "mean"),
    DetectorSpec("mahalanobis", "mean"),
    DetectorSpec("extremes", "confidence", {"two_sided": True}),
)
PRESETS = {
    # What the model is about to say, against what it says without the adapter, and what that hangs on.
    "behaviour": (DetectorSpec("extremes", "unexplained"),),
    "adapter": (
        *DIVERSE,
        DetectorSpec("extremes", "energy", {"top": 4}),
        DetectorSpec("extremes", "direction", {"two_sided": True, "top": 4}),
        DetectorSpec("extremes", "divergence", {"top": 2}),
    ),
    "activations": DIVERSE,
    # The paper's four; here each sample is scored by itself.
    "safetynet-2025": tuple(
        map(DetectorSpec, ("mahalanobis", "pca_residual", "autoencoders", "variational"))
    ),
}
"""Readings that belong together."""

KEPT = 4000
"""Samples of a stream that serve detectors which need single ones."""
WHOLE = "whole "
"""Before a view's name: its answers as they are, not token by token."""


@dataclass(frozen=True)
class DetectorSet:
    """Fitted detectors, by the names of their readings."""

    readings: tuple[DetectorSpec, ...]
    fitted: Mapping[str, Detector]

    @classmethod
    def fit(cls, readings: Sequence[DetectorSpec], arrays: Mapping[str, np.ndarray]) -> Self:
        """Fit every detector to its view of clean samples.

        Raises:
            InputError: if there is no reading, one twice, a supervised detector, or a view that is missing.
        """
        fitted = {
            reading.name: detector.fit(view_of(arrays, _key(reading, detector, arrays)))
            for reading, detector in zip(readings, unfitted(readings), strict=True)
        }
        return cls(tuple(readings), fitted)

    @classmethod
    def fit_stream(cls, readings: Sequence[DetectorSpec], parts: Iterable[Mapping[str, np.ndarray]]) -> Self:
        """Fit from a stream of parts, in memory that does not grow with it.

        Detectors of means and covariances (those with `partial_fit`) see every sample. The others are fitted
        to `KEPT` of them, drawn evenly from the whole stream (Vitter 1985).

        Raises:
            InputError: as in `fit`, and if the stream is empty.
        """
        unfitted_detectors = unfitted(readings)
        reservoir: Reservoir | None = None
        for arrays in parts:
            for reading, detector in zip(readings, unfitted_detectors, strict=True):
                if isinstance(detector, MomentDetector):
                    detector.partial_fit(view_of(arrays, reading.view))
            reservoir = reservoir or Reservoir(KEPT)
            reservoir.add({reading.view: view_of(arrays, reading.view) for reading in readings})
        if reservoir is None:
            raise InputError("detectors: the stream of clean samples is empty. Give clean prompts.")
        fitted = {
            reading.name: detector.finish()
            if isinstance(detector, MomentDetector)
            else detector.fit(reservoir.samples[reading.view])
            for reading, detector in zip(readings, unfitted_detectors, strict=True)
        }
        return cls(tuple(readings), fitted)

    def scores(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """By reading, (n,) each; higher is more suspect.

        Sequential detectors score the tokens that `present` marks, (answers, T), of the whole answers.
        """
        scores = {}
        for reading in self.readings:
            detector = self.fitted[reading.name]
            key = _key(reading, detector, arrays)
            scores[reading.name] = (
                detector.score_samples(view_of(arrays, key))
                if key == reading.view
                else detector.score_steps(arrays[key])[arrays["present"]]
            )
        return scores

    def state(self) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
        """For a file."""
        about, arrays = list[dict[str, Any]](), dict[str, np.ndarray]()
        for index, reading in enumerate(self.readings):
            state, learned = self.fitted[reading.name].state()
            about.append({"reading": asdict(reading), "state": state})
            arrays |= {f"{index}/{name}": array for name, array in learned.items()}
        return about, arrays

    @classmethod
    def restore(cls, about: Sequence[dict[str, Any]], arrays: Mapping[str, np.ndarray]) -> Self:
        """From a file."""
        readings = [DetectorSpec(**part["reading"]) for part in about]
        fitted = {
            reading.name: detectors.restore(part["state"], below(arrays, f"{index}/"))
            for index, (reading, part) in enumerate(zip(readings, about, strict=True))
        }
        return cls(tuple(readings), fitted)


def named(names: Sequence[str]) -> list[DetectorSpec]:
    """The readings of presets, and of detectors written as `detector:view`, in their order.

    Raises:
        InputError: if there is neither a preset nor a detector of a name.
    """
    readings: list[DetectorSpec] = []
    for name in names:
        members = PRESETS.get(name) or (DetectorSpec.parse(name),)
        if not detectors.exists(members[0].detector):
            raise InputError(
                f"there is no detector {name!r}. Choose from {', '.join(detectors.NAMES)}, an estimator's "
                f"full name, such as sklearn.neighbors.LocalOutlierFactor, or a preset: {', '.join(PRESETS)}."
            )
        readings += members
    return readings


def unfitted(readings: Sequence[DetectorSpec], supervised: bool = False) -> list[Detector]:
    """The detectors of these readings, which know nothing yet.

    Args:
        readings: by name.
        supervised: whether they are skylines, which a monitor must not hold.

    Raises:
        InputError: if there is no reading, one twice, an unknown detector, or a supervised one in a monitor.
    """
    names = [reading.name for reading in readings]
    if not names or len(set(names)) < len(names):
        raise InputError(
            f"detectors: {', '.join(names) or 'none of prompts'}; name at least one that reads prompts, and "
            "each detector and view once."
        )
    unfitted_detectors = [detectors.make(reading.detector, **reading.settings) for reading in readings]
    for reading, detector in zip(readings, unfitted_detectors, strict=True):
        if detector.supervised and not supervised:
            raise InputError(
                f"detectors: {reading.detector} is supervised, so no monitor can be made of it. Compare "
                "with it as a skyline instead."
            )
    return unfitted_detectors


def _key(reading: DetectorSpec, detector: Detector, arrays: Mapping[str, np.ndarray]) -> str:
    """Name of what a detector reads: whole answers where it is sequential and they are there."""
    whole = WHOLE + reading.view
    return whole if detector.sequential and whole in arrays else reading.view
