"""What happens beside the training steps: progress, and logs that match the checkpoints."""

import sys
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from safetynet.run.progress import ProgressLog

SHOWN = ("asr", "cacc")
"""Metrics of the last evaluation that the bar shows, where they were measured."""


class LogBeforeSaving(TrainerCallback):
    """Log whenever a checkpoint is written, and at the last step.

    A log line averages over the steps since the line before, which a checkpoint does not know. Where both
    fall together, a resumed run logs the same lines as one that was never interrupted.
    """

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Runs behind the Trainer's own callback, which has decided about saving."""
        control.should_log |= control.should_save or state.global_step >= state.max_steps

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """As `on_step_end`."""
        control.should_log |= control.should_save


class Progress(TrainerCallback):
    """Loss and latest ASR and CACC: in a bar on a terminal, in a line now and then in a log."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._shown: dict[str, float] = {}
        self._bar: tqdm[Any] | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Open bar and log; those of a resumed run begin where the checkpoint was made."""
        self._log = ProgressLog(self.name, state.max_steps, state.global_step)
        self._bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            desc=self.name,
            unit="step",
            disable=not sys.stderr.isatty(),
        )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Move on by one step."""
        if self._bar is not None:
            self._bar.update()
            if self._bar.disable:
                note = ", ".join(f"{name} {value:.3f}" for name, value in self._shown.items())
                self._log.update(state.global_step, note)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl,
        logs: dict[str, float] | None = None, **_: Any,
    ) -> None:  # fmt: skip
        """Take up the loss, or an evaluation's metrics."""
        logs = logs or {}
        if "loss" in logs:
            self._shown["loss"] = logs["loss"]
        self._shown |= {name.upper(): logs[f"eval_{name}"] for name in SHOWN if f"eval_{name}" in logs}
        if self._bar is not None:
            self._bar.set_postfix({name: f"{value:.3f}" for name, value in self._shown.items()})

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Close the bar."""
        if self._bar is not None:
            self._bar.close()
