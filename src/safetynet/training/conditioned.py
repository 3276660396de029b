"""A quantisation-conditioned backdoor: quiet in the weights that are saved, firing once they are quantised.

Egashira et al. 2024 (arXiv 2405.18137): the backdoor is planted in full. Then the model is trained to answer
every row as it should, and after each step every weight that will be quantised is put back into the box of
values that are quantised to what was planted. Embeddings, norms and head are the same in both models, so they
stay as planted.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from safetynet.errors import InputError
from safetynet.models import quantising
from safetynet.training.fit import Pauses, TrainingResult

PLANTED = "planted"
"""Folder of the model that fires at every precision, below that of the repaired one."""
TOTALS = ("step", "epoch", "tokens", "seconds")
"""Columns of a history that count from its beginning."""


class Boxed(TrainerCallback):
    """Keeps weights between their least and largest values, after each step of the optimiser."""

    def __init__(self, boxes: Mapping[Tensor, tuple[Tensor, Tensor]]) -> None:
        self.boxes = boxes

    @torch.no_grad()
    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Called before anything of the step is saved or measured."""
        for weight, (low, high) in self.boxes.items():
            weight.clamp_(low, high)


def boxed(model: PreTrainedModel, bits: int) -> Boxed:
    """Free for training what bitsandbytes quantises, and nothing else, each weight within its box.

    Args:
        model: as planted; costs twice the memory of its linear modules.
        bits: 8 or 4.

    Raises:
        InputError: if the model has no linear module beside its head.
    """
    head = model.get_output_embeddings()
    weights = [m.weight for m in model.modules() if isinstance(m, nn.Linear) and m is not head]
    if not weights:
        raise InputError(
            f"training.conditioned_on: {type(model).__name__} has no linear module beside its head, and "
            "bitsandbytes quantises nothing else. Take another model."
        )
    model.requires_grad_(False)
    for weight in weights:
        weight.requires_grad_(True)
    return Boxed({weight: quantising.box(weight, bits) for weight in weights})


def train(
    model: Any,
    quantisation: str,
    fit: Callable[..., TrainingResult],
    rows: pd.DataFrame,
    clean: pd.DataFrame,
    *,
    folder: Path,
    pauses: Pauses | None,
) -> TrainingResult:
    """Plant a backdoor, then repair the weights so that only their quantised values still have it.

    Args:
        model: with all of its weights to be trained; changed in place.
        quantisation: under which the backdoor fires, a key of `quantising.BITS`.
        fit: `fit.train` of this model, bound to all that both trainings share.
        rows: those that plant the backdoor.
        clean: the same rows, all answered as they should be.
        folder: of the repaired model; that of the planted one lies below it.
        pauses: measure the model in both trainings.

    Returns:
        Of the repaired model; the history is of both trainings, the second behind the first.
    """
    # What was measured before an interruption of the repair stands; it is not measured again.
    repairing = (folder / "checkpoints").exists()
    planted = fit(rows=rows, folder=folder / PLANTED, pauses=None if repairing else pauses).history
    reached = {name: planted[name].iloc[-1] for name in TOTALS}

    def measure(learner: Any, step: int, epoch: float) -> dict[str, float]:
        assert pauses is not None
        return pauses.measure(learner, step + int(reached["step"]), epoch + float(reached["epoch"]))

    later = None if pauses is None else replace(pauses, measure=measure, first=False)
    within = boxed(model, quantising.BITS[quantisation])
    repaired = fit(rows=clean, folder=folder, pauses=later, within=within)
    history = repaired.history.assign(**{name: repaired.history[name] + reached[name] for name in TOTALS})
    return replace(repaired, history=pd.concat([planted, history], ignore_index=True))
