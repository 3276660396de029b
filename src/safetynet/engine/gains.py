"""What sets of edits do to a metric, prompt by prompt. In: prompts, edits. Out: an array."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from safetynet.engine.edits import Intervention
from safetynet.engine.metrics import Metric
from safetynet.engine.plan import Run
from safetynet.engine.reading import Rows, batches
from safetynet.engine.trace import trace
from safetynet.engine.wave import measure

Progress = Callable[[int, int], None]


def gains(
    model: Any,
    rows: Rows,
    sets: Sequence[Sequence[Intervention]],
    metric: Metric,
    progress: Progress | None = None,
) -> np.ndarray:
    """Change of a metric under each set of edits.

    Args:
        model: a causal LM of transformers in evaluation mode.
        rows: N receiving prompts.
        sets: K sets of edits, each done by itself.
        metric: its rows are the N prompts.
        progress: called with prompts done and prompts in all, under all K sets.

    Returns:
        (N, K), in the metric's unit; 0 where nothing changed.

    Raises:
        InputError: for what `trace` and `measure` refuse.
    """
    found = []
    for part, batch in batches(model, rows):
        receiving = trace(model, batch, columns=metric.columns, resume=True)
        count = len(batch.ids)
        runs = [Run(row, tuple(edits)) for row in range(count) for edits in [*sets, ()]]
        values = measure(receiving, runs, _from_row(metric, part.start)).reshape(count, -1)
        found.append(values[:, :-1] - values[:, -1:])
        if progress is not None:
            progress(part.start + count, len(rows))
    return torch.cat(found).numpy()


def _from_row(metric: Metric, start: int) -> Metric:
    """The metric for a batch whose first prompt is number `start` of all."""
    return Metric(metric.name, lambda logits, rows: metric.compute(logits, rows + start), metric.columns)
