"""The suspect's LoRA adapter as tensors: read, computed with, and put in place of itself for a while.

A repair that is an adapter is a dictionary of the adapter's own parameters with other values, so that many
can be kept beside one model, and rank, targets and configuration stay.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from safetynet.mitigation.method import Knobs, Repaired
from safetynet.mitigation.subject import Subject
from safetynet.models.adapters import adapter_parameters

State = dict[str, Tensor]


def state_of(model: Any) -> State:
    """Copies of the active adapter's parameters by their names in the model."""
    return {name: parameter.detach().clone() for name, parameter in adapter_parameters(model)}


@contextmanager
def swapped(model: Any, state: Mapping[str, Tensor]) -> Iterator[Any]:
    """The model with other values in its adapter; its own ones are back afterwards, whatever happened."""
    own = {name: parameter for name, parameter in adapter_parameters(model) if name in state}
    before = {name: parameter.detach().clone() for name, parameter in own.items()}
    training = model.training
    try:
        _put(own, state)
        yield model.eval()
    finally:
        _put(own, before)
        model.train(training)


def repaired(subject: Subject, method: str, knobs: Knobs, state: State, **details: Any) -> Repaired:
    """A repair whose result is an adapter."""
    return Repaired(method, knobs, "adapter", partial(swapped, subject.model, state), details=details)


@torch.no_grad()
def _put(own: Mapping[str, Any], values: Mapping[str, Tensor]) -> None:
    for name, value in values.items():
        own[name].copy_(value)


def learned(model: Any, start: Mapping[str, Tensor], learn: Callable[[Any], None]) -> State:
    """The adapter's values after training from `start`, or from its own; the model leaves as it came."""
    frozen = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    with swapped(model, {**state_of(model), **start}):
        try:
            model.requires_grad_(False)
            for _, parameter in adapter_parameters(model):
                parameter.requires_grad_(True)
            learn(model)
            return state_of(model)
        finally:
            for parameter, wanted in frozen:
                parameter.requires_grad_(wanted)
                parameter.grad = None
