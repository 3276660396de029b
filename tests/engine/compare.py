"""Hold the engine against plain hooks: the same prompts and edits, one number per run."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from tests.engine import plain

from safetynet.engine.batch import Batch
from safetynet.engine.edits import Intervention
from safetynet.engine.metrics import Metric
from safetynet.engine.runs import EditedRun, run_interventions
from safetynet.engine.trace import trace


@dataclass(frozen=True)
class Case:
    """One intervention on one prompt, as the engine takes it and as plain hooks do it."""

    row: int
    edits: Sequence[Intervention]
    plain: Sequence[Any] = ()
    weights: Callable[[], AbstractContextManager[Any]] = nullcontext
    """What else holds while the reference runs, such as weights that are zero."""


def probe(vocabulary: int, columns: int = 2) -> Metric:
    """A number to which every logit of the last columns contributes."""
    direction = torch.randn(columns, vocabulary, generator=torch.Generator().manual_seed(5))
    direction /= direction.norm()
    return Metric("probe", lambda logits, rows: (logits * direction.to(logits)).sum((1, 2)), columns)


def reference(model: Any, prompts: Sequence[list[int]], case: Case, metric: Metric) -> float:
    with case.weights():
        found = plain.logits(model, prompts[case.row], case.plain)
    return float(metric.compute(found[None, -metric.columns :], torch.tensor([case.row])))


def compare(
    model: Any,
    prompts: Sequence[list[int]],
    cases: Sequence[Case],
    tolerance: float = 1e-4,
    tokens: int = 4096,
) -> None:
    """Each case's number is that of plain hooks, and is not the unpatched one."""
    metric = probe(model.config.vocab_size, min(2, min(map(len, prompts))))
    receiving = trace(model, Batch.of(prompts), resume=True)
    runs = [EditedRun(case.row, tuple(case.edits)) for case in cases]
    found = run_interventions(receiving, runs, metric, tokens=tokens)
    expected = [reference(model, prompts, case, metric) for case in cases]
    apart = (found - torch.tensor(expected)).abs()
    worst = int(apart.argmax())
    assert apart.max() <= tolerance, (
        f"case {worst} is {apart[worst]:.1e} from {expected[worst]:.4f}: {cases[worst]}"
    )
    rows = {case.row for case in cases}
    untouched = {row: reference(model, prompts, Case(row, ()), metric) for row in rows}
    changed = [
        abs(a - untouched[case.row]) > max(1e-3, tolerance) for a, case in zip(expected, cases, strict=True)
    ]
    assert sum(changed) >= len(cases) / 4, f"only {sum(changed)} of {len(cases)} interventions did anything"
