"""A monitor: what to capture, detectors fitted on clean prompts, and their calibration; one file, no pickle.

In: `Features` of clean prompts, and of answers to them. Out: p-values of other prompts of the same model and
adapter, and of answers token by token, small for suspect ones. It claims no false-positive rate that its
clean prompts cannot support, and refuses another model's features.
"""

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import pandas as pd

from safetynet.detection import calibration, files
from safetynet.detection.calibration import (
    FUSION,
    PARTS,
    Calibration,
    Conformal,
    Fusion,
    Kinds,
    RateEstimate,
    folds,
    split,
)
from safetynet.detection.detector_set import WHOLE, DetectorSet, DetectorSpec
from safetynet.detection.features import GENERATED, Features, FeatureSpec, View
from safetynet.detection.files import below
from safetynet.errors import InputError
from safetynet.models.identity import Identity

log = logging.getLogger(__name__)
Method = Literal["split", "cross"]
FOLDS = 5
"""Of method `cross`."""
FAR = 15.0
"""Robust standard deviations from the median, below which no score counts as far."""
APART = 2.0
"""How many times as far from the median as all other scores a group has to lie. Heavy tails, as those of a
divergence, reach far too, but leave no gap."""
MIN_GROUP = 3
"""Samples that make a group."""
MAX_COPIES = 0.05
"""Share of the clean prompts that may be copies of others without a warning."""


@dataclass(frozen=True)
class TokenMonitor:
    """The part of a monitor that watches an answer; the p-value at a token is that of the answer up to there.

    Tokens of an answer depend on each other, so no rate is claimed for a token: the largest statistics of
    whole clean answers calibrate, and an answer raises a false alarm, anywhere, at the named rate.
    """

    detectors: DetectorSet
    single: Calibration
    """Weighs detectors against each other, on single tokens."""
    longest: Conformal
    """Largest statistics of whole clean answers."""
    horizon: int
    """Most tokens of an answer; nothing is claimed behind it."""

    @classmethod
    def fit(
        cls,
        clean: Features,
        readings: Sequence[DetectorSpec],
        groups: Sequence[str],
        kinds: np.ndarray,
        seed: int,
    ) -> Self:
        """Fit and calibrate on answers to clean prompts; arguments and disjoint parts as in `Monitor.fit`.

        Raises:
            InputError: if a reading is of a view that has no tokens, or prompts are too few.
        """
        wrong = [reading.name for reading in readings if reading.view not in GENERATED]
        if wrong:
            raise InputError(f"tokens: {wrong[0]} reads no tokens; use view steps or step_confidence.")
        part = split(groups, seed=seed)
        tokens = {name: _flat(clean.take(part == name)) for name in PARTS}
        fitted = DetectorSet.fit(readings, tokens["fit"])
        first, second = (fitted.scores(tokens[name]) for name in ("calibrate", "fuse"))
        single = Calibration.fit(first, second)
        last = part == "fuse"
        largest = np.nanmax(_spread(single.statistic(second), _present(clean.take(last))), axis=1)
        return cls(fitted, single, Conformal.fit(largest, kinds[last]), clean.spec.tokens)

    def check_rate(self, rate: float) -> None:
        """Refuse a rate that the clean answers cannot support.

        Raises:
            InputError: saying how many it needs.
        """
        calibration.check_rate(rate, self.longest.n)

    def statistic(self, arrays: dict[str, np.ndarray]) -> np.ndarray:
        """Of single tokens, one per row of the arrays, (n,)."""
        return self.single.statistic(self.detectors.scores(arrays))

    def latest(self, states: np.ndarray, confidences: np.ndarray) -> np.ndarray:
        """Statistic of the newest token of running answers.

        Args:
            states: (B, L, d) that chose it.
            confidences: (B, t, 2) of all tokens so far, this one the last.
        """
        present = np.zeros(confidences.shape[:2], dtype=bool)
        present[:, -1] = True
        arrays = {"steps": states, "step_confidence": confidences[:, -1]}
        return self.statistic(arrays | {WHOLE + "step_confidence": confidences, "present": present})

    def p_values(self, features: Features) -> np.ndarray:
        """(n, T): p-value of each answer up to each token; NaN after its end."""
        present = _present(features)
        statistics = _spread(self.statistic(_flat(features)), present)
        so_far = np.fmax.accumulate(statistics, axis=1)
        return np.where(present, self.longest.p_values(so_far), np.nan)

    def state(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """For a file."""
        panel, learned = self.detectors.state()
        arrays = {f"panel/{name}": array for name, array in learned.items()}
        arrays |= self.single.state() | self.longest.state("longest")
        return {"panel": panel, "horizon": self.horizon}, arrays

    @classmethod
    def restore(cls, about: dict[str, Any], arrays: dict[str, np.ndarray]) -> Self:
        """From a file."""
        fitted = DetectorSet.restore(about["panel"], below(arrays, "panel/"))
        single = Calibration.restore(fitted.fitted, arrays)
        return cls(fitted, single, Conformal(below(arrays, "longest/")), about["horizon"])


@dataclass(frozen=True)
class Monitor:
    """Scores prompts of one model. Make it with `fit` or `load`."""

    spec: FeatureSpec
    identity: Identity
    detectors: DetectorSet
    calibration: Calibration
    clean: int
    """Number of clean prompts that it was made from."""
    tokens: TokenMonitor | None = None
    """Watches answers too; None for a monitor of prompts alone."""

    @classmethod
    def fit(  # noqa: PLR0913  # all that decides about a calibration, by keyword
        cls,
        clean: Features,
        readings: Sequence[DetectorSpec],
        *,
        how: Fusion = FUSION,
        method: Method = "split",
        groups: Sequence[str] | None = None,
        kinds: Kinds | None = None,
        seed: int = 0,
        token_readings: Sequence[DetectorSpec] = (),
    ) -> Self:
        """Fit and calibrate on clean prompts.

        Args:
            clean: features of prompts that are known to be clean and that the model was not trained on.
            readings: which detectors read which views.
            how: of the fusion.
            method: `split` keeps half for fitting and two quarters for calibration; `cross` fits five times
                and calibrates on all, for few prompts; its validity is approximate.
            groups: prompts of one group (the same text, a conversation) stay on one side.
            kinds: of the prompts; the rate is kept in each kind by itself, and needs as many prompts of each.
                None where all are of one.
            seed: of the split.
            token_readings: detectors of view `steps` or `step_confidence`, to watch answers too.

        Raises:
            InputError: if the prompts are too few, or activations are unusable.
        """
        names = [str(i) for i in range(len(clean))] if groups is None else list(groups)
        of_kind = calibration.each_kind(kinds, len(clean))
        warn_of_copies(clean)
        if method == "split":
            part = split(names, seed=seed)
            fitted = DetectorSet.fit(readings, clean.take(part == "fit").arrays)
            masks = part == "calibrate", part == "fuse"
            first, second = (fitted.scores(clean.take(mask).arrays) for mask in masks)
            calibrated = Calibration.fit(first, second, how, (of_kind[masks[0]], of_kind[masks[1]]))
        else:
            # Each fifth is scored by detectors of the other four; those that stay are fitted to all.
            fold = folds(names, FOLDS, seed)
            scores = {reading.name: np.empty(len(clean)) for reading in readings}
            for index in range(FOLDS):
                others = DetectorSet.fit(readings, clean.take(fold != index).arrays)
                for name, values in others.scores(clean.take(fold == index).arrays).items():
                    scores[name][fold == index] = values
            fitted = DetectorSet.fit(readings, clean.arrays)
            calibrated = Calibration.cross_fitted(scores, fold, how, of_kind)
        warn_of_outliers(calibrated)
        tokens = TokenMonitor.fit(clean, token_readings, names, of_kind, seed) if token_readings else None
        return cls(clean.spec, clean.identity, fitted, calibrated, len(clean), tokens)

    @classmethod
    def fit_stream(
        cls,
        fit: Iterable[Features],
        calibrate: Iterable[Features],
        fuse: Iterable[Features],
        readings: Sequence[DetectorSpec],
        how: Fusion = FUSION,
    ) -> Self:
        """The same from streams of batches, as `capture.stream` gives them; only scores accumulate.

        Args:
            fit: clean prompts that detectors are fitted to, any number; see `DetectorSet.fit_stream`.
            calibrate: other clean prompts, from which each detector's p-values are had.
            fuse: yet others, from which those of the fused statistic are had.
            readings: which detectors read which views.
            how: of the fusion.

        Raises:
            InputError: if a stream is empty, or its batches come from different models.
        """
        origin: tuple[FeatureSpec, Identity] | None = None
        count = 0

        def arrays(parts: Iterable[Features]) -> Iterator[dict[str, np.ndarray]]:
            nonlocal origin, count
            for part in parts:
                origin = origin or (part.spec, part.identity)
                if (part.spec, part.identity) != origin:
                    raise InputError(
                        "monitor: batches come from different models, adapters or specifications; do not mix "
                        "them."
                    )
                count += len(part)
                yield part.arrays

        fitted = DetectorSet.fit_stream(readings, arrays(fit))
        clean_scores = []
        for parts in (calibrate, fuse):
            scores = [fitted.scores(part) for part in arrays(parts)]
            if not scores:
                raise InputError("monitor: a stream of calibrating prompts is empty. Give clean prompts.")
            clean_scores.append({name: np.concatenate([s[name] for s in scores]) for name in scores[0]})
        calibrated = Calibration.fit(clean_scores[0], clean_scores[1], how)
        warn_of_outliers(calibrated)
        assert origin is not None  # an empty stream has been refused
        return cls(*origin, fitted, calibrated, count)

    @property
    def views(self) -> set[View]:
        """Views that judging a prompt needs."""
        return {reading.view for reading in self.detectors.readings}

    @property
    def smallest_rate(self) -> float:
        """The smallest false-positive rate that this monitor may claim."""
        return calibration.smallest_rate(self.calibration.fused.n)

    def check_rate(self, rate: float) -> None:
        """Refuse a rate below `smallest_rate`.

        Raises:
            InputError: saying how many clean prompts it needs.
        """
        calibration.check_rate(rate, self.calibration.fused.n)

    def scores(self, features: Features) -> pd.DataFrame:
        """Scores of each reading and the `fused` statistic, one row per prompt; higher is more suspect.

        Raises:
            InputError: if the features come from another model, adapter or specification.
        """
        self._check(features)
        return self.calibration.scores(self.detectors.scores(features.arrays))

    def p_values(self, features: Features) -> pd.DataFrame:
        """Conformal p-values of each reading and of `fused`; errors as in `scores`."""
        self._check(features)
        return self.p_values_of(features.arrays)

    def p_values_of(self, arrays: dict[str, np.ndarray]) -> pd.DataFrame:
        """The same for bare arrays, whose origin the caller has checked."""
        return self.calibration.p_values(self.detectors.scores(arrays))

    def alarms(self, features: Features, rate: float) -> np.ndarray:
        """Which prompts raise an alarm at a false-positive rate, (n,) of bool.

        Raises:
            InputError: as in `scores`, and if the rate is smaller than the monitor supports.
        """
        self.check_rate(rate)
        return np.asarray(self.p_values(features)["fused"] <= rate)

    def fpr_estimate(self, fresh: Features, rate: float) -> RateEstimate:
        """The false-positive rate that is realised on clean prompts which the monitor has not seen."""
        self.check_rate(rate)
        return calibration.fpr_estimate(np.asarray(self.p_values(fresh)["fused"]), rate)

    def save(self, path: Path) -> None:
        """Write to one file."""
        about, arrays = self.state()
        files.write(path, "monitor", about, arrays)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what `save` wrote.

        Raises:
            InputError: if the file is missing, damaged, tampered with or of another version.
        """
        return cls.restore(*files.read(path, "monitor"))

    def state(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Description and arrays."""
        panel, learned = self.detectors.state()
        about = {
            "spec": self.spec.as_dict(),
            "identity": self.identity.as_dict(),
            "panel": panel,
            "how": self.calibration.how,
            "clean": self.clean,
        }
        arrays = {f"panel/{name}": array for name, array in learned.items()} | self.calibration.state()
        if self.tokens is not None:
            about["tokens"], learned = self.tokens.state()
            arrays |= {f"tokens/{name}": array for name, array in learned.items()}
        return about, arrays

    @classmethod
    def restore(cls, about: dict[str, Any], arrays: dict[str, np.ndarray]) -> Self:
        """From description and arrays."""
        fitted = DetectorSet.restore(about["panel"], below(arrays, "panel/"))
        calibrated = Calibration.restore(fitted.fitted, arrays, about["how"])
        tokens = None
        if "tokens" in about:
            tokens = TokenMonitor.restore(about["tokens"], below(arrays, "tokens/"))
        spec, identity = FeatureSpec.from_dict(about["spec"]), Identity(**about["identity"])
        return cls(spec, identity, fitted, calibrated, about["clean"], tokens)

    def check_model(self, identity: Identity) -> None:
        """Refuse a model that the monitor was not fitted on.

        Raises:
            InputError: saying what differs.
        """
        if identity != self.identity:
            differs = [k for k, v in self.identity.as_dict().items() if identity.as_dict()[k] != v]
            raise InputError(
                f"monitor: it was fitted on another model ({', '.join(differs)} differ), so its scores "
                "mean nothing here. Fit a monitor on this model's clean prompts."
            )

    def _check(self, features: Features) -> None:
        self.check_model(features.identity)
        if features.spec.layers != self.spec.layers or features.spec.tokens != self.spec.tokens:
            raise InputError(
                f"monitor: features were captured as {features.spec}, it was fitted on "
                f"{self.spec}. Capture alike."
            )


def _present(features: Features) -> np.ndarray:
    """(n, T): where an answer has a token."""
    first = next(features.arrays[view] for view in GENERATED if view in features.arrays)
    return ~np.isnan(first.reshape(*first.shape[:2], -1)[:, :, 0])


def _flat(features: Features) -> dict[str, np.ndarray]:
    """All tokens of all answers, one per row; and the whole answers, for sequential detectors."""
    present = _present(features)
    arrays = {str(view): features.arrays[view][present] for view in GENERATED if view in features.arrays}
    if "step_confidence" in arrays:
        arrays |= {WHOLE + "step_confidence": features.arrays["step_confidence"], "present": present}
    return arrays


def _spread(values: np.ndarray, present: np.ndarray) -> np.ndarray:
    """Back to (n, T), NaN where there is no token."""
    spread = np.full(present.shape, np.nan)
    spread[present] = values
    return spread


def warn_of_copies(clean: Features) -> None:
    """Log a warning where more than `MAX_COPIES` of the prompts share their features with another one.

    A trigger among the clean prompts teaches a monitor to accept it. Nothing here can prove or exclude that.
    """
    first = next(iter(clean.arrays.values()))
    flat = np.ascontiguousarray(first.reshape(len(first), -1))
    _, counts = np.unique(flat.view(f"V{flat.dtype.itemsize * flat.shape[1]}"), return_counts=True)
    copies = int(counts[counts > 1].sum())
    if copies > MAX_COPIES * len(flat):
        log.warning(
            "monitor: %d of %d clean prompts are copies of others (the largest group has %d). They count as "
            "one prompt each, so the rates are less certain than they look: remove them.",
            copies, len(flat), counts.max(),
        )  # fmt: skip


def warn_of_outliers(calibrated: Calibration) -> None:
    """Log a warning where some clean prompts lie far from all others by any detector's scores."""
    counts = {}
    for name, conformal in calibrated.single.items():
        # Scores in a group above all others: far from the median in robust standard deviations, with a gap
        # below.
        away = np.sort(conformal.scores - np.median(conformal.scores))[::-1]
        spread = 1.4826 * np.median(np.abs(away))
        above = away[: len(away) // 2]
        is_far = (above[:-1] > FAR * spread) & (above[:-1] > APART * np.maximum(above[1:], 0))
        far = np.flatnonzero(is_far & (spread > 0))
        counts[name] = int(far[-1]) + 1 if len(far) else 0
    worst = max(counts, key=lambda name: counts[name])
    if counts[worst] >= MIN_GROUP:
        log.warning(
            "monitor: %d of %d clean prompts lie far from the others (%s). If triggered prompts are among "
            "the clean ones, the monitor learns to accept them: look at the highest scores.",
            counts[worst], len(calibrated.single[worst].scores), worst,
        )  # fmt: skip
