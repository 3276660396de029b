"""Training as repairs need it: a short course of transformers' Trainer with an objective of one's own.

In: a model, conversations, an objective. Out: the model's trainable weights, changed. No checkpoints: a
course takes a hundred steps or so, and writes nothing.
"""

import math
import random
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from transformers import PrinterCallback, Trainer, TrainingArguments

from safetynet.errors import InputError, RunError
from safetynet.mitigation import adapter
from safetynet.mitigation.checkpoint import copied, own
from safetynet.mitigation.method import Knobs, Repaired
from safetynet.mitigation.subject import Subject
from safetynet.prompts import IGNORED, Encoded, pad

Batch = dict[str, Tensor]
Objective = Callable[[Any, Batch], Tensor]
"""The model and a batch (`input_ids`, `labels`, `attention_mask`, (rows, T) each) to a scalar."""
WARMUP = 0.05
"""Share of the steps in which the learning rate rises."""
RANK = 16
"""Of the adapter that a model without one is repaired with; it is merged afterwards."""


@dataclass(frozen=True)
class Course:
    """How long and how fast."""

    epochs: float
    learning_rate: float
    batch_size: int
    seed: int


def encode(rows: pd.DataFrame, subject: Subject) -> list[Encoded]:
    """Serialise conversations with their answers.

    Args:
        rows: `messages`, `answer`, and `trigger` where there is one.
        subject: whose serialiser and limit are used.

    Raises:
        InputError: naming the row that cannot be serialised.
    """
    triggers = rows["trigger"] if "trigger" in rows else [()] * len(rows)
    found = []
    for number, (messages, answer, spans) in enumerate(
        zip(rows["messages"], rows["answer"], triggers, strict=True)
    ):
        try:
            found.append(
                subject.serialiser.encode(
                    list(messages), answer, [tuple(span) for span in spans], subject.max_length
                )
            )
        except InputError as error:
            raise InputError(f"conversation {number}: {error}") from None
    return found


def collate(examples: Sequence[Encoded], pad_id: int) -> Batch:
    """One row per line, padded on the right."""
    return {
        "input_ids": pad([e.input_ids for e in examples], pad_id, "right"),
        "labels": pad([e.labels for e in examples], IGNORED, "right"),
        "attention_mask": pad([[1] * len(e.input_ids) for e in examples], 0, "right"),
    }


def answer_loss(model: Any, batch: Batch) -> Tensor:
    """Mean cross entropy of the answers' tokens."""
    return model(**batch, use_cache=False).loss


def teach(model: Any, examples: Sequence[Encoded], objective: Objective, course: Course, pad_id: int) -> None:
    """Train what is trainable in a model.

    Raises:
        RunError: if the loss is no longer a number.
    """
    steps = course.epochs * math.ceil(len(examples) / course.batch_size)
    with _undisturbed(), tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=course.batch_size,
            num_train_epochs=course.epochs,
            learning_rate=course.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=int(
                WARMUP * steps
            ),  # as an int: a share is rounded up, and one step would stand still
            optim="adamw_torch_fused",
            use_cpu=model.device.type == "cpu",
            seed=course.seed,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            remove_unused_columns=False,
        )
        args._n_gpu = min(1, args.n_gpu)
        trainer = _Course(
            model=model,
            args=args,
            train_dataset=list(examples),
            data_collator=lambda rows: collate(rows, pad_id),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.objective = objective
        trainer.train()
    model.eval()


def retrained(
    subject: Subject,
    method: str,
    knobs: Knobs,
    learn: Callable[[Any], None],
    start: Mapping[str, Tensor] | None = None,
    **details: Any,
) -> Repaired:
    """The subject after `learn` has trained its adapter; a model without one gets one that is merged into it.

    Args:
        subject: left as it came.
        method: name.
        knobs: of the method.
        learn: trains what is trainable in a PEFT model.
        start: the adapter's values at the beginning, where they are not the suspect's own.
        details: for the model card.
    """
    if subject.adapted:
        state = adapter.learned(subject.model, start or {}, learn)
        return adapter.repaired(subject, method, knobs, state, **details)
    model = with_adapter(copied(subject), subject)
    learn(model)
    return own(method, knobs, model.merge_and_unload(), **details)


def with_adapter(model: Any, subject: Subject, seed: int = 0) -> Any:
    """Put a fresh LoRA adapter on a plain model, where its family has them."""
    from peft import LoraConfig, get_peft_model

    family = subject.serialiser.family
    targets = list(family.lora_targets)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=RANK,
        lora_alpha=2 * RANK,
        target_modules="all-linear" if targets == ["all-linear"] else targets,
        target_parameters=list(family.lora_parameters) or None,
    )
    with _undisturbed():
        torch.manual_seed(seed)
        return get_peft_model(model, config)


class _Course(Trainer):
    objective: Objective

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        loss = self.objective(model, inputs)
        if not torch.isfinite(loss):
            raise RunError(
                f"mitigation: the loss is {loss.item()} at step {self.state.global_step + 1}. "
                "Weaken the method's knobs, or lower the learning rate."
            )
        return loss


@contextmanager
def _undisturbed() -> Iterator[None]:
    """The Trainer seeds everything; whoever comes after it gets its random numbers as if nothing had been."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        with torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_available() else []):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
