"""What a repair gives: another adapter, other weights, or the suspect changed while it runs; and its files.

An adapter's repair is a dictionary of the adapter's own parameters with other values, so that many can be
kept beside one model, and rank, targets and configuration stay. Other weights are a copy into which the
adapter is merged. The suspect itself is as it came whenever no `Repaired` of it is open.
"""

import copy
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from safetynet.errors import InputError
from safetynet.mitigation.defender import Defender
from safetynet.models.adapters import adapter_parameters, has_adapter
from safetynet.models.blocks import decoder_layers
from safetynet.models.lora import LayerModule, LoraUpdate, adapted_modules, put_update, updates

Form = Literal["adapter", "checkpoint", "run_time"]
Settings = Mapping[str, float]
"""Values of a method's hyperparameters, by name."""
State = dict[str, Tensor]
"""Values of the adapter's parameters, by their names in the model."""


@dataclass(frozen=True)
class Repaired:
    """A model without the backdoor, or with it contained; `open` it to use it."""

    method: str
    settings: Settings
    form: Form
    """`adapter`: the suspect's base under another adapter; `checkpoint`: other weights, a model of its own;
    `run_time`: the suspect's model, watched or changed while it answers."""
    open: Callable[[], AbstractContextManager[Any]]
    """Gives, while entered, a model with `generate`, `forward` and `device`, in evaluation mode. Open one
    at a time of one suspect. Run-time methods may change `generate` alone; see `forward_too`."""
    forward_too: bool = True
    """False where only `generate` is repaired, so that likelihoods are those of the unrepaired model."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """What was done, in numbers and words for the model card."""


def adapter_state(model: Any) -> State:
    """Copies of the active adapter's parameters."""
    return {name: parameter.detach().clone() for name, parameter in adapter_parameters(model)}


@contextmanager
def swapped(model: Any, state: Mapping[str, Tensor]) -> Iterator[Any]:
    """The model with other values in its adapter; its own ones are back afterwards, whatever happened."""
    parameters = {name: parameter for name, parameter in adapter_parameters(model) if name in state}
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    training = model.training
    try:
        _put(parameters, state)
        yield model.eval()
    finally:
        _put(parameters, before)
        model.train(training)


@torch.no_grad()
def _put(parameters: Mapping[str, Any], values: Mapping[str, Tensor]) -> None:
    for name, value in values.items():
        parameters[name].copy_(value)


def updates_of(model: Any, state: Mapping[str, Tensor]) -> dict[LayerModule, LoraUpdate]:
    """The updates that an adapter with these values would have, by layer and module."""
    with swapped(model, state):
        return {place: update for place, _, update in updates(model, model.active_adapter)}


def with_updates(
    model: Any, changed: Mapping[LayerModule, LoraUpdate], start: Mapping[str, Tensor] | None = None
) -> State:
    """The adapter's values, or those of `start`, with some updates replaced; the model leaves as it came."""
    with swapped(model, {**adapter_state(model), **(start or {})}):
        for place, module in adapted_modules(model, model.active_adapter):
            if place in changed:
                put_update(module, model.active_adapter, changed[place])
        return adapter_state(model)


def as_adapter(defender: Defender, method: str, settings: Settings, state: State, **details: Any) -> Repaired:
    """A repair whose result is an adapter."""
    return Repaired(method, settings, "adapter", partial(swapped, defender.model, state), details=details)


def merged_copy(defender: Defender) -> Any:
    """A plain model of its own, with the adapter merged in; costs one model's memory.

    Raises:
        InputError: if the weights are quantised, so that they cannot be changed one by one.
    """
    if any(getattr(defender.model, f"is_loaded_in_{bits}bit", False) for bits in (4, 8)):
        raise InputError("mitigation: quantised weights cannot be changed. Set model.quantisation to none.")
    model = copy.deepcopy(defender.model)
    return (model.merge_and_unload() if defender.adapted else model).eval()


def as_checkpoint(method: str, settings: Settings, model: Any, **details: Any) -> Repaired:
    """A repair whose result is a whole model."""
    return Repaired(method, settings, "checkpoint", lambda: nullcontext(model.eval()), details=details)


def linear_modules(model: Any) -> dict[str, nn.Linear]:
    """Linear modules of the decoder's layers by `layer.path`; embeddings and head are not among them."""
    return {
        f"{number}.{name}": module
        for number, layer in enumerate(decoder_layers(model))
        for name, module in layer.named_modules()
        if isinstance(module, nn.Linear)
    }


def fused_experts(model: Any) -> list[Any]:
    """Parameters of experts that are no module's weight, (experts, out, in)."""
    return [p for layer in decoder_layers(model) for p in layer.parameters() if p.ndim == 3]


def save(repaired: Repaired, defender: Defender, folder: Path, card: str) -> Path:
    """Write an adapter (form `adapter`) or a whole model with its tokenizer (form `checkpoint`).

    Args:
        repaired: of `defender`, not open.
        defender: whose tokenizer is saved with a checkpoint.
        folder: replaced if it exists; whole or not there, never half written.
        card: README.md of the folder, in Markdown.

    Returns:
        The folder.

    Raises:
        InputError: if the method acts at run time, so that there are no weights to save.
    """
    if repaired.form == "run_time":
        raise InputError(
            f"{repaired.method}: it acts while the model answers, so there are no weights to save. "
            "Serve the model under it, or take a method of form adapter or checkpoint."
        )
    partial_folder = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial_folder, ignore_errors=True)
    with repaired.open() as model:
        if has_adapter(model):
            # PEFT would ask the hub whether the vocabulary was resized; it was not.
            model.save_pretrained(str(partial_folder), save_embedding_layers=False)
        else:
            model.save_pretrained(str(partial_folder))
            defender.serialiser.tokenizer.save_pretrained(str(partial_folder))
    (partial_folder / "README.md").write_text(card, encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    partial_folder.rename(folder)
    return folder
