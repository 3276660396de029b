"""SafetyNet's own engine."""

from typing import Any

import torch

from safetynet.engine import edits
from safetynet.engine.batch import Batch
from safetynet.engine.edits import Edit
from safetynet.engine.metrics import logit_difference
from safetynet.engine.runs import EditedRun, run_interventions
from safetynet.engine.sites import Site
from safetynet.engine.trace import trace

from .workload import Sweep

PACKAGES = ("safetynet-llm",)


def prepare(model: Any, _tokenizer: Any) -> Any:
    """The model itself: nothing is converted."""
    return model


def run_safetynet(model, receiver_ids, source_ids, sweep: Sweep, tokens) -> torch.Tensor:
    """The sweep by SafetyNet's engine: (sites, pairs).

    Positions before the first token that differs are left out, as `safetynet.interventions.sweep` does: their
    effect is zero.
    """
    pairs, length = receiver_ids.shape
    receiver, source = (Batch(ids, torch.ones_like(ids)) for ids in (receiver_ids, source_ids))
    first = receiver.first_difference(source)
    sites = [Site(sweep.component, one.layer, one.head) for one in sweep.sites]
    given = trace(model, source, sorted(set(sites), key=str))
    own = trace(model, receiver, resume=True)
    runs = []
    for site, one in zip(sites, sweep.sites, strict=True):
        values = given.value(site)
        for row in range(pairs):
            everywhere = one.position is None
            positions = tuple(range(first[row], length)) if everywhere else (one.position,)
            wanted = () if positions[0] < first[row] else positions
            change = edits.replace(values[row, list(wanted)])
            runs.append(EditedRun(row, (Edit(site, change, wanted),)))
    metric = logit_difference([tokens[0]] * pairs, [tokens[1]] * pairs)
    return run_interventions(own, runs, metric).reshape(len(sites), pairs)
