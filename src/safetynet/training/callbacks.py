"""What happens beside the training steps: progress, and logs that match the checkpoints."""

import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import SaveStrategy

from safetynet.run import parallel
from safetynet.run.logs import ProgressLog

SHOWN = ("asr", "cacc")
"""Metrics of the last evaluation that the bar shows, where they were measured."""


class LogBeforeSaving(TrainerCallback):
    """Log where the recipe wants a checkpoint (every so many steps, or at an epoch's end), and at the end.

    Checkpoints that follow the clock leave no line, so that the history does not depend on it.
    """

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Runs behind the Trainer's own callback, which has decided about saving."""
        epoch_saved = args.save_strategy == SaveStrategy.EPOCH and float(state.epoch or 0).is_integer()
        control.should_log |= control.should_save or epoch_saved or state.global_step >= state.max_steps


class Reached(TrainerCallback):
    """Write down each step that was taken, so that a resumed run can say what is repeated."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Not atomic: a process that is killed here leaves the number unknown, and nothing else."""
        if parallel.is_first():
            self.path.write_text(str(state.global_step), encoding="utf-8")


class Progress(TrainerCallback):
    """Loss and latest ASR and CACC: in a bar on a terminal, in a line now and then in a log."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._shown: dict[str, float] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Open bar and log; those of a resumed run begin where the checkpoint was made."""
        # The Trainer calls this before any other method.
        self._log = ProgressLog(self.name, state.max_steps, state.global_step)
        self._bar: tqdm[Any] = tqdm(
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
        self._bar.set_postfix({name: f"{value:.3f}" for name, value in self._shown.items()})

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Close the bar."""
        self._bar.close()
