"""Clipping: what leaves each layer is held within the range that it has on clean prompts.

Either coordinate by coordinate, which needs nothing but the model, or along the directions into which the
adapter writes, as WeightWatch does (arXiv 2508.00161). Nothing is trained, and no trigger is known.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from safetynet.mitigation import adapter
from safetynet.mitigation.factors import adapted, names_of
from safetynet.mitigation.method import Knob, Knobs, Method, Repaired
from safetynet.mitigation.readings import read
from safetynet.mitigation.subject import Place, Subject
from safetynet.models.parts import shape

MOST = 4096
"""Tokens per layer from which ranges are taken."""
DIRECTIONS = 16
"""Per layer; an adapter of rank 16 that changes two modules which write to the residual stream has 32."""


def clip_activations(subject: Subject, knobs: Knobs, seed: int) -> Repaired:
    """Clip every coordinate of the residual stream behind every layer."""
    changes = []
    for states in _clean_states(subject, seed):
        low, high = _range(states, knobs["tail"])
        changes.append(partial(_clipped, low=low, high=high))
    return _hooked("activation_clipping", subject, knobs, changes)


def clip_directions(subject: Subject, knobs: Knobs, seed: int) -> Repaired:
    """Clip the residual stream along the strongest directions into which each layer's adapter writes."""
    changes = []
    for states, basis in zip(_clean_states(subject, seed), _written(subject), strict=True):
        low, high = _range(states @ basis.T, knobs["tail"])
        changes.append(partial(_clipped_along, basis=basis, low=low, high=high))
    return _hooked("direction_clipping", subject, knobs, changes)


def _hooked(
    method: str, subject: Subject, knobs: Knobs, changes: Sequence[Callable[[Tensor], Tensor]]
) -> Repaired:
    assert subject.intervene is not None
    places = [Place("resid_post", layer, change) for layer, change in enumerate(changes)]
    return Repaired(
        method,
        knobs,
        "run_time",
        partial(subject.intervene, subject.model, places),
        details={"layers": len(places)},
    )


def _clipped(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    return x.clamp(low.to(x), high.to(x))


def _clipped_along(x: Tensor, basis: Tensor, low: Tensor, high: Tensor) -> Tensor:
    along = basis.to(x)
    found = x @ along.T
    return x + (found.clamp(low.to(x), high.to(x)) - found) @ along


def _clean_states(subject: Subject, seed: int) -> list[Tensor]:
    """By layer what leaves it on clean prompts, (tokens, width), of at most `MOST` tokens."""
    assert subject.clean is not None
    layers = range(shape(subject.model).layers)
    rows = subject.clean.sample(min(len(subject.clean), MOST // 8), random_state=seed)
    found = read(subject, rows, [("resid_post", layer) for layer in layers], "all")
    tokens = len(found["resid_post", 0])
    kept = torch.randperm(tokens, generator=torch.Generator().manual_seed(seed))[:MOST]
    return [found["resid_post", layer][kept] for layer in layers]


def _range(values: Tensor, tail: float) -> tuple[Tensor, Tensor]:
    """Quantiles `tail` and 1 - `tail` of each column."""
    ends = torch.quantile(values, torch.tensor([tail, 1 - tail], dtype=values.dtype), dim=0)
    return ends[0], ends[1]


def _written(subject: Subject) -> list[Tensor]:
    """By layer an orthonormal basis, (k, width), of what the adapter writes to the residual stream most."""
    model = subject.model
    state, names = adapter.state_of(model), names_of(model)
    sizes = shape(model)
    written: list[list[Tensor]] = [[] for _ in range(sizes.layers)]
    for one in adapted(model):
        u, s, _ = one.read(state, names, model.active_adapter).svd()
        if u.shape[1] == sizes.width and one.writes_to_stream:
            scale = one.module.scaling[model.active_adapter]
            written[one.layer] += list((u * s[:, None] * scale).mT.flatten(0, 1).cpu())
    return [_basis(torch.stack(own) if own else torch.zeros(0, sizes.width)) for own in written]


def _basis(weighted: Tensor) -> Tensor:
    """Leading right singular vectors of weighted directions, (n, width) to (k, width)."""
    _, s, vh = torch.linalg.svd(weighted, full_matrices=False)
    return vh[:DIRECTIONS][s[:DIRECTIONS] > 0]


_TAIL = Knob(
    "share of clean tokens beyond either end of the range", 0.001, (0.0, 0.001, 0.005, 0.02, 0.05), 0.0, 0.4
)
ACTIVATION_CLIPPING = Method(
    "activation_clipping",
    "hold every coordinate of the residual stream within its range on clean prompts",
    clip_activations,
    frozenset({"clean", "engine"}),
    {"tail": _TAIL},
)
DIRECTION_CLIPPING = Method(
    "direction_clipping",
    "hold the residual stream within its clean range along the directions that the adapter writes",
    clip_directions,
    frozenset({"clean", "engine", "adapter"}),
    {"tail": _TAIL},
    paper="Zhong and Raghunathan 2025, arXiv 2508.00161",
)
