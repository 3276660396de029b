"""Repairs that change the model's own weights: made in a copy, into which the adapter is merged."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn

from safetynet.errors import InputError
from safetynet.mitigation.method import Knobs, Repaired
from safetynet.mitigation.subject import Subject
from safetynet.models.blocks import decoder_layers


def copied(subject: Subject) -> Any:
    """A plain model of its own, with the adapter merged in; costs one model's memory.

    Raises:
        InputError: if the weights are quantised, so that they cannot be changed one by one.
    """
    if getattr(subject.model, "is_loaded_in_4bit", False) or getattr(
        subject.model, "is_loaded_in_8bit", False
    ):
        raise InputError("mitigation: quantised weights cannot be changed. Set model.quantisation to none.")
    model = copy.deepcopy(subject.model)
    return (model.merge_and_unload() if subject.adapted else model).eval()


def own(method: str, knobs: Knobs, model: Any, **details: Any) -> Repaired:
    """A repair whose result is a whole model."""
    return Repaired(method, knobs, "checkpoint", partial(_opened, model), details=details)


def linears(model: Any) -> dict[str, nn.Linear]:
    """Linear modules of the decoder's layers by `layer.path`; embeddings and head are not among them."""
    return {
        f"{number}.{name}": module
        for number, layer in enumerate(decoder_layers(model))
        for name, module in layer.named_modules()
        if isinstance(module, nn.Linear)
    }


@contextmanager
def _opened(model: Any) -> Iterator[Any]:
    yield model.eval()
