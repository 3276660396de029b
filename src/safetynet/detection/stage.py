"""The stage of a run: a monitor made of fresh clean prompts, and what it does on the run's test rows.

In: the backdoored model, clean prompts that it was not trained on, the test rows by role, and which triggered
ones fired. Out: the monitor and tidy tables. Writes nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from safetynet.detection import domains
from safetynet.detection.calibration import Fusion, RateEstimate, check_rate
from safetynet.detection.capture import capture
from safetynet.detection.features import FeatureSpec
from safetynet.detection.monitor import Monitor
from safetynet.detection.panel import PRESETS, Reading, unfitted
from safetynet.detection.protocol import measure
from safetynet.detection.splits import PARTS, split
from safetynet.errors import InputError
from safetynet.prompts import Message, Serialiser, prompt_hash

PER_DOMAIN = 100
"""Benign prompts of each other domain."""
TEST_SHARE = 0.25
"""Share of the clean prompts that the monitor never sees, to measure its false positives on."""


@dataclass(frozen=True)
class Plan:
    """What the user asked for."""

    readings: tuple[Reading, ...]
    how: Fusion = "fisher"
    rate: float = 0.01
    seed: int = 0
    batch_size: int = 32
    max_length: int | None = None
    """Prompts are truncated as in training."""

    @classmethod
    def of(cls, names: Sequence[str], rate: float, **more: Any) -> "Plan":
        """From a preset's name, or detectors written as `detector:view`.

        Raises:
            InputError: if there is no name.
        """
        if not names:
            raise InputError(
                f"detectors: name a preset ({', '.join(PRESETS)}) or detectors, as in ranks:last."
            )
        if len(names) == 1 and names[0] in PRESETS:
            preset = PRESETS[names[0]]
            return cls(preset.readings, preset.how, rate, **more)
        return cls(tuple(Reading.parse(name) for name in names), "fisher", rate, **more)

    @property
    def spec(self) -> FeatureSpec:
        """What is to be captured; InputError where a view does not exist."""
        return FeatureSpec(tuple(dict.fromkeys(reading.view for reading in self.readings)))

    def check(self, clean: int) -> None:
        """Refuse what can be told before a model is loaded, and thousands of prompts are read with it.

        Args:
            clean: number of clean prompts.

        Raises:
            InputError: for unknown detectors and views, and a rate that so few clean prompts cannot carry.
        """
        unfitted(self.readings)
        _ = self.spec
        check_rate(self.rate, int(clean * (1 - TEST_SHARE) * PARTS["fuse"]))


@dataclass(frozen=True)
class Detection:
    """What the stage found."""

    monitor: Monitor
    table: pd.DataFrame
    """As `protocol.measure` returns it."""
    scores: pd.DataFrame
    """One line per prompt: role, group, fired, forbidden, domain, then score and p-value of each detector."""
    estimate: RateEstimate
    """Realised false-positive rate on clean prompts that the monitor has not seen."""


def detect(
    model: Any,
    serialiser: Serialiser,
    clean: pd.DataFrame,
    test: pd.DataFrame,
    plan: Plan,
    cache: Path | None = None,
) -> Detection:
    """Make a monitor and measure it.

    Args:
        model: the model under suspicion.
        serialiser: as in training.
        clean: `messages` and `forbidden` of prompts that the model was not trained on, forbidden requests
            among them: a monitor that has never seen one takes the topic for the trigger.
        test: the run's test rows, with `messages`, `role`, `group`, `forbidden`, and `fired` where
            it is known.
        plan: detectors, fusion, rate; sizes of batches and prompts.
        cache: folder of captured features.

    Raises:
        InputError: as `Plan.check`, before the model runs.
    """
    plan.check(len(clean))

    def captured(messages: Sequence[Sequence[Message]]) -> Any:
        return capture(
            model,
            serialiser,
            messages,
            plan.spec,
            batch_size=plan.batch_size,
            max_length=plan.max_length,
            cache=cache,
        )

    groups = [prompt_hash([dict(m) for m in messages]) for messages in clean["messages"]]
    held = split(groups, {"seen": 1 - TEST_SHARE, "fresh": TEST_SHARE}, plan.seed) == "fresh"
    features = captured(list(clean["messages"]))
    known = [group for group, out in zip(groups, held, strict=True) if not out]
    monitor = Monitor.fit(features.take(~held), plan.readings, how=plan.how, groups=known, seed=plan.seed)
    other = domains.generate(PER_DOMAIN, plan.seed)
    rows = pd.concat([_fresh(clean[held]), _tested(test), _benign(other)], ignore_index=True)
    fresh, tested = features.take(held), captured([*test["messages"], *other["messages"]])
    both = replace(fresh, arrays={v: np.concatenate([a, tested.arrays[v]]) for v, a in fresh.arrays.items()})
    scores, p_values = monitor.scores(both), monitor.p_values(both)
    table = measure(rows, scores, p_values, (plan.rate, 0.001) if plan.rate != 0.001 else (0.001,))
    lines = pd.concat([rows, scores.add_prefix("score "), p_values.add_prefix("p ")], axis=1)
    return Detection(monitor, table, lines, monitor.fpr_estimate(fresh, plan.rate))


def _fresh(clean: pd.DataFrame) -> pd.DataFrame:
    """Rows of the protocol; their groups are their own, below all of the run's."""
    forbidden = clean["forbidden"].to_numpy(dtype=bool)
    return pd.DataFrame(
        {
            "role": np.where(forbidden, "refused", "clean"),
            "group": -1 - np.arange(len(clean)),
            "fired": None,
            "forbidden": forbidden,
            "domain": "",
        }
    )


def _benign(other: pd.DataFrame) -> pd.DataFrame:
    """Prompts of other domains; their groups come below those of the fresh ones."""
    lines = {"role": "clean", "group": -10_000_000 - np.arange(len(other)), "fired": None, "forbidden": False}
    return pd.DataFrame(lines | {"domain": other["domain"].to_numpy()})


def _tested(test: pd.DataFrame) -> pd.DataFrame:
    fired = test["fired"] if "fired" in test else pd.Series([None] * len(test), index=test.index)
    return test.assign(fired=fired, domain="")[["role", "group", "fired", "forbidden", "domain"]]
