"""Many interventions on recorded runs, exactly, for a fraction of as many forward passes.

In: a trace of the receiving prompts and a list of runs, each a row with its edits. Out: a metric per run. A
run starts at the first layer that it changes, from the first column that it changes; the keys and values
before that column are the receiving run's. One wave walks through the layers once: runs that have started
travel as one batch, and each layer adds its own. The last layer computes its queries, and the head its
logits, only where the metric reads. What is computed is computed by the model's own modules.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from safetynet.engine.hooks import exclusive
from safetynet.engine.metrics import Metric
from safetynet.engine.plan import Planned, Run, chunks, plan
from safetynet.engine.resume import Resumed, shared
from safetynet.engine.trace import Trace, head
from safetynet.errors import InputError

TOKENS = 4096
"""Tokens that travel at once. More gain nothing once the processor is full, and memory stays flat."""

CALL = 3e8
"""Multiplications in the time that a layer's call takes beside them: small models better waste tokens."""


def measure(
    trace: Trace,
    runs: Sequence[Run],
    metric: Metric,
    *,
    tokens: int = TOKENS,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """The metric of every run.

    Args:
        trace: of the receiving prompts, recorded with `resume=True`.
        runs: rows of it with their edits; a run without effect on what the metric reads costs nothing.
        metric: reads the logits of the last columns.
        tokens: how many travel at once; decides about memory, never about numbers.
        progress: called with runs done and runs in all.

    Returns:
        (len(runs),) fp32 on the CPU.

    Raises:
        InputError: if a site or position does not exist, one place is edited twice in a run, or the metric is
            not finite.
    """
    if not trace.keys:
        raise InputError("measure: the trace keeps no keys and values. Record it with resume=True.")
    read = metric.columns
    with torch.no_grad():
        planned = [one for i, run in enumerate(runs) if (one := plan(trace, i, run, read)) is not None]
        results = _unchanged(trace, metric)[torch.tensor([run.row for run in runs], dtype=torch.long)]
        done = len(runs) - len(planned)
        weights = sum(parameter.numel() for parameter in trace.anatomy.layers[0].layer.parameters())
        for chunk in chunks(planned, trace.batch.width, tokens, read, int(CALL / weights)):
            with exclusive(trace.anatomy.model):
                states = _Wave(trace, chunk, read).travel()
            chosen = torch.tensor([one.row for one in chunk])
            for part, logits in head(trace, states):
                values = metric.compute(logits, chosen[part]).float().cpu()
                results[[one.number for one in chunk[part]]] = values
            done += len(chunk)
            if progress is not None:
                progress(done, len(runs))
    if not torch.isfinite(results).all():
        bad = int((~torch.isfinite(results)).nonzero()[0])
        where = ", ".join(str(edit.site) for edit in runs[bad].edits) if runs[bad].edits else "no edit"
        raise InputError(
            f"metric {metric.name}: {results[bad]} for prompt {runs[bad].row} under {where}. A metric has to "
            "be finite: half precision may overflow (load the model in bf16 or fp32)."
        )
    return results


def _unchanged(trace: Trace, metric: Metric) -> Tensor:
    """The metric of every prompt of the receiving batch, (B,) fp32."""
    read, rows = metric.columns, torch.arange(len(trace.batch.ids))
    if read > trace.batch.width:
        raise InputError(
            f"metric {metric.name}: it reads {read} columns, and the longest prompt has {trace.batch.width}. "
            "Prompts carry the answer's tokens, all but the last."
        )
    if trace.logits is not None and trace.logits.shape[1] >= read:
        return metric.compute(trace.logits[:, -read:], rows).float().cpu()
    assert trace.output is not None
    parts = [metric.compute(logits, rows[part]) for part, logits in head(trace, trace.output[:, -read:])]
    return torch.cat(parts).float().cpu()


class _Wave:
    """Runs of one chunk on their way through the layers."""

    def __init__(self, trace: Trace, chunk: Sequence[Planned], read: int) -> None:
        self.trace, self.read = trace, read
        self.depth, self.width = trace.anatomy.shape.layers, trace.batch.width
        self.start = min(one.column for one in chunk)
        self.layers = Resumed(trace, self.start)
        # The order of starting, so that runs under way are always the first of the batch.
        self.order = sorted(range(len(chunk)), key=lambda i: (chunk[i].layer, chunk[i].narrow))
        self.chunk = [chunk[i] for i in self.order]

    def travel(self) -> Tensor:
        """(R, n, width) of the last layer's output at the read columns, in the chunk's order."""
        state = self.trace.inputs[0].new_empty(0)
        under_way = 0
        for layer in range(min(one.layer for one in self.chunk), self.depth):
            new = [one for one in self.chunk[under_way:] if one.layer == layer]
            wide = [one for one in new if not one.narrow]
            runs = [*self.chunk[:under_way], *wide]
            if wide:
                inputs = self.layers.rows(self.trace.inputs[layer], wide)[:, self.start :]
                inputs = inputs.expand(len(wide), -1, -1)
                state = torch.cat([state, inputs]) if under_way else inputs
            narrow = new[len(wide) :]
            if layer == self.depth - 1:
                state = self._last(layer, state, runs, narrow)
            else:
                if runs:
                    state = self.layers.suffix(layer, state, runs)
                if narrow:
                    started = self._narrow(layer, narrow)
                    state = torch.cat([state, started]) if runs else started
            under_way += len(new)
        back = torch.empty(len(self.order), dtype=torch.long)
        back[torch.tensor(self.order)] = torch.arange(len(self.order))
        return state[back]

    def _narrow(self, layer: int, runs: Sequence[Planned]) -> Tensor:
        """One layer at the edited columns alone; what enters the next layer, (R, T, width)."""
        state = self.layers.rows(self.trace.inputs[layer + 1], runs)[:, self.start :]
        state = state.expand(len(runs), -1, -1).clone()
        touched = [self._touched(one, layer) for one in runs]
        for size in sorted({len(columns) for columns in touched}):
            chosen = [i for i, columns in enumerate(touched) if len(columns) == size]
            columns = shared(torch.tensor([touched[i] for i in chosen]))
            own = [runs[i] for i in chosen]
            changed = self.layers.at(layer, own, columns, *self.layers.recorded(layer, own))
            state[torch.tensor(chosen)[:, None], columns - self.start] = changed
        return state

    @staticmethod
    def _touched(one: Planned, layer: int) -> list[int]:
        """Columns that a run's edits of this layer change."""
        return sorted({column for edit in one.edits if edit.layer == layer for column in edit.columns})

    def _last(self, layer: int, state: Tensor, runs: Sequence[Planned], narrow: Sequence[Planned]) -> Tensor:
        """The last layer where the metric reads; keys and values of runs under way are their own."""
        read = torch.arange(self.width - self.read, self.width)
        parts = []
        if runs:
            keys, values = self.layers.keys_values(layer, state, runs)
            inputs = self._reading(layer, state, runs)
            parts.append(self.layers.at(layer, runs, read, keys, values, inputs))
        if narrow:
            parts.append(self.layers.at(layer, narrow, read, *self.layers.recorded(layer, narrow)))
        return torch.cat(parts)

    def _reading(self, layer: int, state: Tensor, runs: Sequence[Planned]) -> Tensor:
        """Inputs of the last layer at the read columns, which may begin before the first changed one."""
        missing = self.read - (self.width - self.start)
        if missing <= 0:
            return state[:, -self.read :]
        before = self.layers.rows(self.trace.inputs[layer], runs)[:, self.width - self.read : self.start]
        return torch.cat([before.expand(len(runs), -1, -1), state], dim=1)
