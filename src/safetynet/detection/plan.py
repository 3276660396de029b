"""What a user asks of detection: detectors, rate and sizes, checked before a model is loaded."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from safetynet.detection import detectors
from safetynet.detection.calibration import PARTS, check_rate
from safetynet.detection.detector_set import PRESETS, DetectorSpec, named, unfitted
from safetynet.detection.features import GENERATED, FeatureSpec
from safetynet.errors import InputError

PER_DOMAIN = 100
"""Benign prompts of each other domain."""
TEST_SHARE = 0.25
"""Share of the clean prompts that the monitor never sees, to measure its false positives on."""


@dataclass(frozen=True)
class Plan:
    """What the user asked for. Make it with `of`."""

    readings: tuple[DetectorSpec, ...]
    """Of prompts."""
    token_readings: tuple[DetectorSpec, ...] = ()
    """Of answers, token by token: views `steps` and `step_confidence`."""
    skylines: tuple[DetectorSpec, ...] = ()
    """Supervised probes, measured beside the monitor and no part of it."""
    rate: float = 0.01
    seed: int = 0
    batch_size: int = 32
    max_length: int | None = None
    """Prompts are truncated as in training."""
    tokens: int = 24
    """Most tokens of an answer."""
    probe: str | None = None
    """A request that the model refuses, for view `probe`."""

    @classmethod
    def of(cls, names: Sequence[str], rate: float, **more: Any) -> "Plan":
        """From presets' names, and detectors written as `detector:view`.

        Raises:
            InputError: if there is no name, or neither a preset nor a detector of one.
        """
        if not names:
            raise InputError(
                f"detectors: name a preset ({', '.join(PRESETS)}) or detectors, as in ranks:last."
            )
        readings = named(names)
        probes = [r for r in readings if detectors.needs_labels(r.detector)]
        return cls(
            tuple(r for r in readings if r.view not in GENERATED and r not in probes),
            tuple(r for r in readings if r.view in GENERATED and r not in probes),
            tuple(probes),
            rate,
            **more,
        )

    @property
    def prompt_rate(self) -> float:
        """The rate of an alarm on a prompt: prompt and answer get half each where both are watched."""
        return self.rate / 2 if self.token_readings else self.rate

    @property
    def is_alone(self) -> bool:
        """Whether one detector watches: it needs no fusion, and is calibrated on both parts."""
        return len(self.readings) == 1 and not self.token_readings

    @property
    def clean(self) -> int:
        """Clean prompts to take where the user names no number.

        Three quarters make the monitor. One detector is calibrated on half of these, 750 of each kind; 1%
        needs 499, for which 1,340 prompts would do. With 2,000, seven lie above a threshold and not five, so
        that the realised rate scatters less, and the false positives are measured on 500 others. Several
        detectors are calibrated together on a quarter of the three: they need twice as many.
        """
        return 2000 if self.is_alone else 4000

    @property
    def spec(self) -> FeatureSpec:
        """What is to be captured; InputError where a view does not exist."""
        every = (*self.readings, *self.token_readings, *self.skylines)
        views = tuple(dict.fromkeys(reading.view for reading in every))
        return FeatureSpec(
            views,
            tokens=self.tokens if self.token_readings else 0,
            probe=self.probe if "probe" in views else None,
        )

    @property
    def reads_probe(self) -> bool:
        """Whether a refused request is needed."""
        return any(reading.view == "probe" for reading in self.readings)

    def check(self, clean: int) -> None:
        """Refuse what can be told before a model is loaded, and thousands of prompts are read with it.

        Args:
            clean: number of clean prompts.

        Raises:
            InputError: for unknown detectors and views, and a rate that so few clean prompts cannot carry.
        """
        unfitted(self.readings)
        if self.token_readings:
            unfitted(self.token_readings)
        if self.skylines:
            unfitted(self.skylines, supervised=True)
        _ = self.spec
        if not 0 < self.rate < 1:
            check_rate(self.rate, 0)
        share = PARTS["fuse"] + (PARTS["calibrate"] if self.is_alone else 0)
        check_rate(self.prompt_rate, int(clean * (1 - TEST_SHARE) * share))
