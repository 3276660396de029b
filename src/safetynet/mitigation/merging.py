"""Merging with clean adapters: the average of the suspect's update and of others that nobody poisoned.

Arora et al. 2024 (arXiv 2402.19334) average whole models. Here the clean ones are made on the spot: adapters
of the suspect's own shape, trained on clean conversations from the base model. The average of updates is
brought back to the adapter's rank by its largest singular components, as PEFT's `svd` combination does.
"""

import math

import torch
from torch import Tensor

from safetynet.errors import InputError
from safetynet.mitigation import adapter
from safetynet.mitigation.factors import Factors, adapted, names_of
from safetynet.mitigation.fine_tuning import answers
from safetynet.mitigation.learning import encode
from safetynet.mitigation.method import Knob, Knobs, Method, Repaired
from safetynet.mitigation.subject import Subject
from safetynet.models.adapters import base_counterparts


def merge(subject: Subject, knobs: Knobs, seed: int) -> Repaired:
    """Average the suspect's update with those of fresh clean adapters."""
    assert subject.clean is not None
    model, weight, count = subject.model, knobs["weight"], int(knobs["adapters"])
    state, names = adapter.state_of(model), names_of(model)
    modules, plain = list(adapted(model)), base_counterparts(model)
    factors_of = {name for one in modules for name in one.names(names, model.active_adapter)}
    if beside := sorted(state.keys() - factors_of - plain.keys()):
        raise InputError(
            f"merging: the adapter has updates outside of the decoder's layers ({beside[0]}), which are not "
            "averaged. Merge it (merge_and_unload) and give the merged model."
        )
    states = [state, *(clean_adapter(subject, knobs["epochs"], seed + number) for number in range(count))]
    shares = [1 - weight, *[weight / count] * count]
    merged = dict(state)
    for name in plain:
        merged[name] = torch.stack(
            [values[name] * share for values, share in zip(states, shares, strict=True)]
        ).sum(0)
    for one in modules:
        factors = [one.read(values, names, model.active_adapter) for values in states]
        one.write(averaged(factors, shares), merged, names, model.active_adapter)
    return adapter.repaired(subject, "merging", knobs, merged, clean_rows=len(subject.clean))


def averaged(factors: list[Factors], shares: list[float]) -> Factors:
    """The weighted sum of updates, cut to the rank of the first by its largest singular components."""
    rank = factors[0].down.shape[1]
    stacked = Factors(
        torch.cat([f.down for f in factors], 1),
        torch.cat([f.up * share for f, share in zip(factors, shares, strict=True)], 2),
    )
    u, s, vh = stacked.svd()
    return Factors.of(u[..., :rank], s[..., :rank], vh[..., :rank, :])


def clean_adapter(subject: Subject, epochs: float, seed: int) -> adapter.State:
    """A fresh adapter of the suspect's shape, trained on the clean conversations from the base model."""
    assert subject.clean is not None
    learn = answers(subject, encode(subject.clean, subject), epochs, seed)
    start = fresh(adapter.state_of(subject.model), seed) | base_counterparts(subject.model)
    return adapter.learned(subject.model, start, learn)


def fresh(state: adapter.State, seed: int) -> adapter.State:
    """First weights of factors as PEFT draws them: A uniform after He et al., B zero."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(name: str, value: Tensor) -> Tensor:
        if "lora_A" not in name:
            return torch.zeros_like(value)
        bound = 1 / math.sqrt(value.shape[-1])
        return ((torch.rand(value.shape, generator=generator) * 2 - 1) * bound).to(value)

    return {name: drawn(name, value) for name, value in state.items()}


MERGING = Method(
    "merging",
    "average the adapter with fresh ones, trained on clean conversations from the base model",
    merge,
    frozenset({"adapter", "base", "clean"}),
    {
        "weight": Knob("of the clean adapters together", 0.5, (0.25, 0.5, 0.75, 0.9, 1.0), 0.0, 1.0),
        "adapters": Knob("how many clean ones", 1, (1, 2, 4), 1, 16, whole=True),
        "epochs": Knob("passes of each over the clean conversations", 2, (1, 2, 5), 0.1, 100),
    },
    paper="Arora et al. 2024, arXiv 2402.19334",
)
