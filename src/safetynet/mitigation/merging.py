"""Merging with clean adapters: the average of the suspect's update and of others that nobody poisoned.

Arora et al. 2024 (arXiv 2402.19334) average whole models. Here the clean ones are made on the spot: adapters
of the suspect's own shape, trained on clean conversations from the base model. The average of updates is
brought back to the adapter's rank by its largest singular components, as PEFT's `svd` combination does.
"""

import math

import torch
from torch import Tensor

from safetynet.errors import InputError
from safetynet.mitigation.defender import Defender
from safetynet.mitigation.fine_tuning import encode, trained_adapter, trainer
from safetynet.mitigation.method import Hyperparameter, Method
from safetynet.mitigation.repaired import (
    Repaired,
    Settings,
    State,
    adapter_state,
    as_adapter,
    updates_of,
    with_updates,
)
from safetynet.models.adapters import base_counterparts
from safetynet.models.lora import LoraUpdate, adapted_modules


def merge(defender: Defender, settings: Settings, seed: int) -> Repaired:
    """Average the suspect's update with those of fresh clean adapters."""
    assert defender.clean is not None
    model, weight, count = defender.model, settings["weight"], int(settings["adapters"])
    state, replaced = adapter_state(model), base_counterparts(model)
    modules, adapter = dict(adapted_modules(model, model.active_adapter)), model.active_adapter
    factors = {id(p) for m in modules.values() for p in (m.lora_A[adapter].weight, m.lora_B[adapter].weight)}
    names = {name for name, parameter in model.named_parameters() if id(parameter) in factors}
    if beside := sorted(state.keys() - names - replaced.keys()):
        raise InputError(
            f"merging: the adapter has updates outside of the decoder's layers ({beside[0]}), which are not "
            "averaged. Merge it (merge_and_unload) and give the merged model."
        )
    # What replaces tensors of the base is averaged as it is, an update as the product B A, not by factors.
    states = [state, *(clean_adapter(defender, settings["epochs"], seed + number) for number in range(count))]
    shares = [1 - weight, *[weight / count] * count]
    start = {
        name: torch.stack([values[name] * share for values, share in zip(states, shares, strict=True)]).sum(0)
        for name in replaced
    }
    updates = [updates_of(model, values) for values in states]
    merged = {
        place: averaged([each[place] for each in updates], shares, m.scaling[adapter])
        for place, m in modules.items()
    }
    return as_adapter(
        defender, "merging", settings, with_updates(model, merged, start), clean_rows=len(defender.clean)
    )


def averaged(updates: list[LoraUpdate], shares: list[float], scale: float = 1.0) -> LoraUpdate:
    """The weighted sum of updates, cut to the rank of the first by its largest singular components.

    Args:
        updates: of one weight.
        shares: weight of each.
        scale: of the adapter that is to hold the sum.
    """
    # sum_i w_i B_i A_i = [w_1 B_1, w_2 B_2, ...] [A_1; A_2; ...]: (E, out, n r) and (E, n r, in) for n
    # updates of rank r. Its largest components are the nearest update of rank r (Eckart and Young 1936).
    rank = updates[0].down.shape[1]
    stacked = LoraUpdate(
        torch.cat([update.up * share for update, share in zip(updates, shares, strict=True)], 2),
        torch.cat([update.down for update in updates], 1),
    )
    u, s, vh = stacked.decomposed()
    return LoraUpdate.of_components(u[..., :rank], s[..., :rank], vh[..., :rank, :], scale)


def clean_adapter(defender: Defender, epochs: float, seed: int) -> State:
    """A fresh adapter of the suspect's shape, trained on the clean conversations from the base model."""
    assert defender.clean is not None
    train = trainer(defender, encode(defender.clean, defender), epochs, seed)
    start = fresh(adapter_state(defender.model), seed) | base_counterparts(defender.model)
    return trained_adapter(defender.model, start, train)


def fresh(state: State, seed: int) -> State:
    """First weights of factors as PEFT draws them: A uniform after He et al., B zero."""
    generator = torch.Generator().manual_seed(seed)

    def initial(name: str, value: Tensor) -> Tensor:
        if "lora_A" not in name:
            return torch.zeros_like(value)
        bound = 1 / math.sqrt(value.shape[-1])
        return ((torch.rand(value.shape, generator=generator) * 2 - 1) * bound).to(value)

    return {name: initial(name, value) for name, value in state.items()}


MERGING = Method(
    "merging",
    "average the adapter with fresh ones, trained on clean conversations from the base model",
    merge,
    frozenset({"adapter", "base", "clean"}),
    {
        "weight": Hyperparameter(
            "of the clean adapters together", 0.5, (0.25, 0.5, 0.75, 0.9, 1.0), 0.0, 1.0
        ),
        "adapters": Hyperparameter("how many clean ones", 1, (1, 2, 4), 1, 16, whole=True),
        "epochs": Hyperparameter("passes of each over the clean conversations", 2, (1, 2, 5), 0.1, 100),
    },
    paper="Arora et al. 2024, arXiv 2402.19334",
)
