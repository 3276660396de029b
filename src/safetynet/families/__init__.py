"""The only place where model families differ.

A family is a module in this folder, made of constants. `get` reads one into a `Family`; `names` lists
them. Adding a family is adding one file.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pkgutil import iter_modules
from typing import Any, Literal

from safetynet.errors import InputError


@dataclass(frozen=True)
class Family:
    """What SafetyNet has to know of a family; one field for each constant of its module."""

    name: str
    hub_id: str | None
    """Default model on the hub; None for `generic`, which has no default."""
    model_types: tuple[str, ...]
    """Values of `config.model_type` that belong to this family."""
    lora_targets: tuple[str, ...]
    """Linear modules, by the end of their names, that LoRA adapts."""
    lora_parameters: tuple[str, ...]
    """Parameters that are no module's weight, such as fused experts (PEFT's `target_parameters`)."""
    system: Literal["native", "fold"]
    """`fold`: the chat template has no system role, so its text opens the first user message."""
    end_of_turn: str | None
    """The token that ends an answer; None: the tokenizer's end-of-sequence token."""
    chat_template: str | None
    """Used only when the tokenizer brings none."""
    defaults: Mapping[str, Any]
    """Recipe fields that differ from the general defaults, as nested dictionaries."""
    resources: Mapping[str, Any]
    """What one training job needs on a cluster: gpus, cpus, memory_gb, walltime."""


@cache
def names() -> tuple[str, ...]:
    """Names of all families, in alphabetical order."""
    return tuple(sorted(module.name for module in iter_modules(__path__)))


@cache
def get(name: str) -> Family:
    """Read the family called `name`.

    Raises:
        InputError: if there is no such family; the message lists those that exist.
    """
    if name not in names():
        raise InputError(f"model.family: there is no family {name!r}. Choose one of: {', '.join(names())}.")
    module = import_module(f"{__name__}.{name}")
    return Family(
        name=name,
        hub_id=module.HUB_ID,
        model_types=module.MODEL_TYPES,
        lora_targets=module.LORA_TARGETS,
        lora_parameters=module.LORA_PARAMETERS,
        system=module.SYSTEM,
        end_of_turn=module.END_OF_TURN,
        chat_template=module.CHAT_TEMPLATE,
        defaults=module.DEFAULTS,
        resources=module.RESOURCES,
    )
