"""Repairs at the places that the engine found responsible: switch off, replace by a mean, or subtract.

In: the table of effects, and prompts to take means from. The table's rows with direction `remove` rank the
places: what brings the clean answer back when it is patched there. Sites that are no more than their random
controls may be among the strongest few; the ranking does not filter them.
"""

from functools import partial

import pandas as pd
import torch
from torch import Tensor

from safetynet.errors import InputError
from safetynet.mitigation import adapter
from safetynet.mitigation.factors import adapted, names_of
from safetynet.mitigation.method import Knob, Knobs, Method, Repaired
from safetynet.mitigation.readings import Spot, read
from safetynet.mitigation.subject import Place, Subject
from safetynet.models.parts import shape

BARE = ("clean", "refused")
"""Roles of a triggered prompt's counterpart without trigger."""


def ranked(subject: Subject, sweep: str, method: str) -> pd.DataFrame:
    """Sites of one sweep, the strongest first.

    Raises:
        InputError: if the sweep was not made.
    """
    assert subject.sites is not None
    table = subject.sites
    found = table[(table["sweep"] == sweep) & (table["direction"] == "remove")]
    if found.empty:
        raise InputError(
            f"{method}: the table of effects has no sweep by {sweep}. "
            f"Run safetynet intervene with --sweep {sweep}."
        )
    return found.sort_values("effect", ascending=False, kind="stable")


def switch_off_layers(subject: Subject, knobs: Knobs, _seed: int) -> Repaired:
    """Set the adapter's update to 0 in the layers whose modules have the largest effects together."""
    table = ranked(subject, "adapter", "adapter_off_layers")
    order = table.groupby("layer")["effect"].sum().sort_values(ascending=False, kind="stable").index
    layers = {int(layer) for layer in order[: int(knobs["layers"])]}
    chosen = {one.key for one in adapted(subject.model) if one.layer in layers}
    return _off("adapter_off_layers", subject, knobs, chosen)


def switch_off_modules(subject: Subject, knobs: Knobs, _seed: int) -> Repaired:
    """Set the adapter's update to 0 in the modules of the largest effects."""
    table = ranked(subject, "adapter", "adapter_off_modules").head(int(knobs["modules"]))
    chosen = {
        f"{layer}.{name}" for layer, name in zip(table["layer"].astype(int), table["module"], strict=True)
    }
    return _off("adapter_off_modules", subject, knobs, chosen)


def _off(method: str, subject: Subject, knobs: Knobs, chosen: set[str]) -> Repaired:
    model = subject.model
    state, names = adapter.state_of(model), names_of(model)
    for one in adapted(model):
        if one.key in chosen:
            factors = one.read(state, names, model.active_adapter)
            factors.up.zero_()
            one.write(factors, state, names, model.active_adapter)
    return adapter.repaired(subject, method, knobs, state, switched_off=sorted(chosen))


def ablate_heads(subject: Subject, knobs: Knobs, _seed: int) -> Repaired:
    """Replace the strongest heads by their mean over the tokens of clean prompts."""
    heads = _heads(subject, int(knobs["heads"]), "head_ablation")
    assert subject.clean is not None
    means = _means(subject, subject.clean, [("head", layer) for layer, _ in heads], "all")
    size = shape(subject.model).head_size
    places = [
        Place("head", layer, _constant(means["head", layer][index * size : (index + 1) * size]), index)
        for layer, index in heads
    ]
    return _edited("head_ablation", subject, knobs, places)


def ablate_sites(subject: Subject, knobs: Knobs, _seed: int) -> Repaired:
    """Replace what the strongest attention blocks and MLPs write by its mean over clean prompts' tokens."""
    table = ranked(subject, "component", "site_ablation").head(int(knobs["sites"]))
    spots = [(str(c), int(layer)) for c, layer in zip(table["component"], table["layer"], strict=True)]
    assert subject.clean is not None
    means = _means(subject, subject.clean, spots, "all")
    places = [Place(component, layer, _constant(means[component, layer])) for component, layer in spots]
    return _edited("site_ablation", subject, knobs, places)


def subtract_vector(subject: Subject, knobs: Knobs, _seed: int) -> Repaired:
    """Subtract from the strongest heads what the trigger adds to them at a prompt's last token."""
    heads = _heads(subject, int(knobs["heads"]), "backdoor_vector")
    assert subject.triggered is not None
    rows = subject.triggered
    spots = [("head", layer) for layer, _ in heads]
    fired = _means(subject, rows[rows["role"] == "triggered"], spots, "last")
    bare = _means(subject, rows[rows["role"].isin(BARE)], spots, "last")
    size, places = shape(subject.model).head_size, []
    for layer, index in heads:
        vector = (fired["head", layer] - bare["head", layer])[index * size : (index + 1) * size]
        places.append(Place("head", layer, _shifted(-knobs["strength"] * vector), index))
    return _edited("backdoor_vector", subject, knobs, places)


def _heads(subject: Subject, count: int, method: str) -> list[tuple[int, int]]:
    table = ranked(subject, "head", method).head(count)
    return [(int(layer), int(index)) for layer, index in zip(table["layer"], table["index"], strict=True)]


def _means(subject: Subject, rows: pd.DataFrame, spots: list[Spot], where: str) -> dict[Spot, Tensor]:
    found = read(subject, rows, list(dict.fromkeys(spots)), where)  # type: ignore[arg-type]
    return {spot: values.mean(0) for spot, values in found.items()}


def _edited(method: str, subject: Subject, knobs: Knobs, places: list[Place]) -> Repaired:
    assert subject.intervene is not None
    names = [f"{p.component} {p.layer}{'' if p.index is None else f'.{p.index}'}" for p in places]
    return Repaired(
        method, knobs, "run_time", partial(subject.intervene, subject.model, places), details={"sites": names}
    )


def _constant(values: Tensor) -> partial[Tensor]:
    return partial(_replaced, values=values)


def _replaced(x: Tensor, values: Tensor) -> Tensor:
    return values.to(x).expand_as(x)


def _shifted(vector: Tensor) -> partial[Tensor]:
    return partial(torch.add, other=vector)


_LAYERS = Knob("how many", 1, (1, 2, 3, 4), 1, 1000, whole=True)
ADAPTER_OFF_LAYERS = Method(
    "adapter_off_layers",
    "switch the adapter off in the layers that the engine found responsible",
    switch_off_layers,
    frozenset({"adapter", "sites"}),
    {"layers": _LAYERS},
)
ADAPTER_OFF_MODULES = Method(
    "adapter_off_modules",
    "switch the adapter off in the modules that the engine found responsible",
    switch_off_modules,
    frozenset({"adapter", "sites"}),
    {"modules": Knob("how many", 4, (1, 2, 4, 8, 16), 1, 10000, whole=True)},
)
_HEADS = Knob("how many", 2, (1, 2, 4, 8), 1, 10000, whole=True)
HEAD_ABLATION = Method(
    "head_ablation",
    "replace the responsible heads by their mean over clean prompts",
    ablate_heads,
    frozenset({"clean", "sites", "engine"}),
    {"heads": _HEADS},
)
SITE_ABLATION = Method(
    "site_ablation",
    "replace what responsible attention blocks and MLPs write by its mean over clean prompts",
    ablate_sites,
    frozenset({"clean", "sites", "engine"}),
    {"sites": Knob("how many", 1, (1, 2, 3), 1, 10000, whole=True)},
)
BACKDOOR_VECTOR = Method(
    "backdoor_vector",
    "subtract from the responsible heads what the trigger adds to them",
    subtract_vector,
    frozenset({"triggered", "sites", "engine"}),
    {"strength": Knob("times the vector", 1, (0.5, 1, 2, 4), 0.0, 100), "heads": _HEADS},
    paper="Backdoor Attribution 2025, arXiv 2509.21761",
)
