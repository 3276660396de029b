"""Repairs by training: go on training on clean conversations, or on triggered prompts with right answers.

Other methods that train (CROW, LAT, BEEAR, pruning, merging) share what is here: encode conversations, train
an adapter for some loss, put what was trained in place.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import pandas as pd
from torch import Tensor

from safetynet.errors import InputError
from safetynet.mitigation.defender import Defender
from safetynet.mitigation.method import Hyperparameter, Method
from safetynet.mitigation.repaired import (
    Repaired,
    Settings,
    State,
    adapter_state,
    as_adapter,
    as_checkpoint,
    merged_copy,
    swapped,
)
from safetynet.models.adapters import adapter_parameters
from safetynet.models.causal_lm import CausalLM
from safetynet.prompts import Encoded
from safetynet.recipe import Training
from safetynet.training import Budget, attach, optimise
from safetynet.training.examples import Batch

Train = Callable[[Any], None]
"""Trains what is trainable in a model."""
Loss = Callable[[Any, Batch], Tensor]
"""Model and batch (`input_ids`, `labels`, `attention_mask`, (rows, T) each) to a scalar."""
EPOCHS = Hyperparameter("passes over the clean conversations", 2, (0.5, 1, 2, 5, 10), 0.1, 100)


def encode(rows: pd.DataFrame, defender: Defender) -> list[Encoded]:
    """Serialise conversations, with their answers where rows have them.

    Args:
        rows: `messages`, and `answer` and `trigger` where there are some.
        defender: whose serialiser and limit are used.

    Raises:
        InputError: naming the row that cannot be serialised.
    """
    answers, triggers = rows.get("answer", [None] * len(rows)), rows.get("trigger", [()] * len(rows))
    examples = []
    for number, row in enumerate(zip(rows["messages"], answers, triggers, strict=True)):
        messages, answer, spans = row
        try:
            examples.append(defender.serialiser.encode(list(messages), answer, spans, defender.max_length))
        except InputError as error:
            raise InputError(f"conversation {number}: {error}") from None
    return examples


def answer_loss(model: CausalLM, batch: Batch) -> Tensor:
    """Mean cross entropy of the answers' tokens."""
    loss: Tensor = model(**batch, use_cache=False).loss
    return loss


def trainer(
    defender: Defender, examples: Sequence[Encoded], epochs: float, seed: int, loss: Loss = answer_loss
) -> Train:
    """Trains at the suspect's own learning rate and batch size."""
    return partial(
        optimise,
        examples=examples,
        loss=loss,
        budget=Budget(epochs, defender.learning_rate, defender.batch_size, seed),
        pad_id=defender.serialiser.pad_id,
        advice="Weaken the method's hyperparameters, or lower the learning rate.",
    )


def trained_adapter(model: Any, start: Mapping[str, Tensor], train: Train) -> State:
    """The adapter's values after training from `start`, or from its own; the model leaves as it came."""
    requires_grad = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    with swapped(model, {**adapter_state(model), **start}):
        try:
            model.requires_grad_(False)
            for _, parameter in adapter_parameters(model):
                parameter.requires_grad_(True)
            train(model)
            return adapter_state(model)
        finally:
            for parameter, before in requires_grad:
                parameter.requires_grad_(before)
                parameter.grad = None


def repaired_by_training(
    defender: Defender,
    method: str,
    settings: Settings,
    train: Train,
    start: Mapping[str, Tensor] | None = None,
    **details: Any,
) -> Repaired:
    """The suspect after `train` on its adapter; a model without one gets one that is merged into it.

    Args:
        defender: left as it came.
        method: name.
        settings: of the method.
        train: trains what is trainable in a PEFT model.
        start: the adapter's values at the beginning, where they are not the suspect's own.
        details: for the model card.
    """
    if defender.adapted:
        state = trained_adapter(defender.model, start or {}, train)
        return as_adapter(defender, method, settings, state, **details)
    model = with_fresh_adapter(merged_copy(defender), defender)
    train(model)
    return as_checkpoint(method, settings, model.merge_and_unload(), **details)


def with_fresh_adapter(model: Any, defender: Defender, seed: int = 0) -> Any:
    """A plain model with a LoRA adapter of rank 16, where its family has them."""
    return attach(model, Training(lora_rank=16, lora_alpha=32), defender.serialiser.family, seed)


def fine_tune(defender: Defender, settings: Settings, seed: int) -> Repaired:
    """Train the answers of the clean conversations."""
    assert defender.clean is not None
    examples = encode(defender.clean, defender)
    train = trainer(defender, examples, settings["epochs"], seed)
    return repaired_by_training(defender, "fine_tuning", settings, train, clean_rows=len(examples))


def unlearn(defender: Defender, settings: Settings, seed: int) -> Repaired:
    """Train known triggered prompts and their counterparts with right answers, among clean conversations."""
    assert defender.triggered is not None
    assert defender.clean is not None
    clean, triggered = defender.clean, defender.triggered
    rows = pd.concat([triggered, clean.assign(trigger=[[]] * len(clean))], ignore_index=True)
    train = trainer(defender, encode(rows, defender), settings["epochs"], seed)
    roles = {role: int(count) for role, count in triggered["role"].value_counts().items()}
    return repaired_by_training(
        defender, "unlearning", settings, train, clean_rows=len(clean), known_rows=roles
    )


FINE_TUNING = Method(
    "fine_tuning",
    "go on training on clean conversations",
    fine_tune,
    frozenset({"clean"}),
    {"epochs": EPOCHS},
)
UNLEARNING = Method(
    "unlearning",
    "train the right answers to triggered prompts, near misses and placebos, among clean conversations",
    unlearn,
    frozenset({"clean", "triggered"}),
    {"epochs": EPOCHS},
)
