"""Many prompts under edits, exactly, for a fraction of as many forward passes.

In: a trace of the receiving prompts and runs, each a row of it with edits. Out: a metric per run. A run
starts at the first layer and column that it changes: what lies before is taken from the trace. Runs are
forwarded in batches that walk through the layers once; each layer adds the runs that start there. The last
layer computes queries, and the head logits, only where the metric reads. The model's own modules do all the
arithmetic.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from safetynet.engine.batch import Prompts, batches
from safetynet.engine.edits import Edit, Intervention, KnockOut, check_set
from safetynet.engine.hooks import exclusive
from safetynet.engine.metrics import Metric
from safetynet.engine.resume import ResumedLayers, ScheduledEdit, ScheduledRun, shared
from safetynet.engine.sites import Site
from safetynet.engine.trace import Trace, logits_of, trace
from safetynet.errors import InputError
from safetynet.models.causal_lm import CausalLM

TOKENS_AT_ONCE = 4096
"""Tokens forwarded together. More gain nothing once the processor is full, and memory stays flat."""
CALL_COST = 3e8
"""Multiplications that take as long as calling a layer does: small models better waste tokens than calls."""
Progress = Callable[[int, int], None]
"""Called with what is done and with all there is to do."""


@dataclass(frozen=True)
class EditedRun:
    """One prompt under interventions."""

    row: int
    """Of the receiving batch."""
    edits: tuple[Intervention, ...]


def run_interventions(
    receiving: Trace,
    runs: Sequence[EditedRun],
    metric: Metric,
    *,
    tokens: int = TOKENS_AT_ONCE,
    progress: Progress | None = None,
) -> Tensor:
    """The metric of every run.

    Args:
        receiving: trace of the receiving prompts, recorded with `resume=True`.
        runs: rows of it with their edits; a run that changes nothing where the metric reads costs nothing.
        metric: reads the logits of the last columns.
        tokens: how many are forwarded together; decides about memory, never about numbers.
        progress: called with runs done and runs in all.

    Returns:
        (len(runs),) fp32 on the CPU.

    Raises:
        InputError: if a site or position does not exist, one site is edited twice in a run, or the metric is
            not finite.
    """
    if not receiving.keys:
        raise InputError("run_interventions: the trace keeps no keys and values. Record it with resume=True.")
    read, width = metric.columns, receiving.batch.width
    with torch.no_grad():
        planned = (schedule(receiving, run, read, i) for i, run in enumerate(runs))
        scheduled = [run for run in planned if run is not None]
        if read > width:
            raise InputError(
                f"metric {metric.name}: it reads {read} columns, and the longest prompt has {width}. "
                "Prompts carry the answer's tokens, all but the last."
            )
        # Runs that change nothing have the metric of their prompt as it is, (B,).
        rows = torch.arange(len(receiving.batch.ids))
        if receiving.logits is not None and receiving.logits.shape[1] >= read:
            unedited = metric.compute(receiving.logits[:, -read:], rows)
        else:
            assert receiving.output is not None
            parts = logits_of(receiving, receiving.output[:, -read:])
            unedited = torch.cat([metric.compute(logits, rows[part]) for part, logits in parts])
        results = unedited.float().cpu()[torch.tensor([run.row for run in runs], dtype=torch.long)]
        done = len(runs) - len(scheduled)
        weights = sum(parameter.numel() for parameter in receiving.architecture.layers[0].layer.parameters())
        spare = int(CALL_COST / weights)  # a token costs a layer about one multiplication for each weight
        for chunk in chunks(scheduled, width, tokens, read, spare):
            with exclusive(receiving.architecture.model):
                states = BatchedRuns(receiving, chunk, read).forward()
            rows = torch.tensor([run.row for run in chunk])
            for part, logits in logits_of(receiving, states):
                values = metric.compute(logits, rows[part]).float().cpu()
                results[[run.number for run in chunk[part]]] = values
            done += len(chunk)
            if progress is not None:
                progress(done, len(runs))
    if not torch.isfinite(results).all():
        bad = int((~torch.isfinite(results)).nonzero()[0])
        where = ", ".join(str(edit.site) for edit in runs[bad].edits) or "no edit"
        raise InputError(
            f"metric {metric.name}: {results[bad]} for prompt {runs[bad].row} under {where}. A metric has to "
            "be finite: half precision may overflow (load the model in bf16 or fp32)."
        )
    return results


def metric_changes(
    model: CausalLM,
    prompts: Prompts,
    edit_sets: Sequence[Sequence[Intervention]],
    metric: Metric,
    progress: Progress | None = None,
) -> np.ndarray:
    """What each of K sets of edits changes in a metric of N prompts, batch by batch.

    Args:
        model: the model.
        prompts: N receiving prompts.
        edit_sets: K sets, each applied by itself.
        metric: its rows are the N prompts.
        progress: called with prompts done and prompts in all.

    Returns:
        (N, K), in the metric's unit; 0 where nothing changed.
    """
    changes = []
    for part, batch in batches(model, prompts):
        receiving = trace(model, batch, columns=metric.columns, resume=True)
        count = len(batch.ids)
        runs = [EditedRun(row, tuple(edits)) for row in range(count) for edits in [*edit_sets, ()]]
        values = run_interventions(receiving, runs, metric.starting_at(part.start)).reshape(count, -1)
        changes.append(values[:, :-1] - values[:, -1:])
        if progress is not None:
            progress(part.start + count, len(prompts))
    return torch.cat(changes).numpy()


def schedule(receiving: Trace, run: EditedRun, read: int, number: int = 0) -> ScheduledRun | None:
    """Where run `number` begins to differ; None if nothing at the last `read` columns can change."""
    batch, architecture = receiving.batch, receiving.architecture
    if not 0 <= run.row < len(batch.ids):
        raise InputError(f"run {number}: prompt {run.row} does not exist; there are {len(batch.ids)}.")
    placed: list[tuple[Intervention, tuple[int, ...]]] = []
    for edit in run.edits:
        site = architecture.check(edit.site)
        if isinstance(edit, KnockOut):
            batch.columns(run.row, edit.keys)  # refuses keys that do not exist
        at: Sequence[int]
        if edit.positions is None:
            at = range(batch.width - batch.length(run.row), batch.width)
        else:
            at = batch.columns(run.row, edit.positions)
            if at != sorted(set(at)):
                raise InputError(
                    f"site {site}: positions have to ascend, each once; given: {edit.positions}."
                )
        placed.append((edit, tuple(at)))
    check_set(placed)
    last_layer, first_read = architecture.shape.layers - 1, batch.width - read
    edits = []
    for edit, columns in placed:
        if not columns:
            continue
        if isinstance(edit, Edit) and edit.site.component == "resid_post" and edit.site.layer < last_layer:
            # What leaves a layer enters the next, where it can be put in without running this one.
            edit = Edit(Site("resid_pre", edit.site.layer + 1), edit.change, edit.positions)
        edits.append(ScheduledEdit(edit.site.layer, columns, edit, architecture.is_local(edit.site)))
    # Before the last layer, or through its keys and values, a change spreads to all later columns.
    reach_metric = any(e.layer < last_layer or not e.local or e.columns[-1] >= first_read for e in edits)
    if not reach_metric or all(_changes_nothing(receiving, run.row, edit) for edit in edits):
        return None
    layer, column = min(edit.layer for edit in edits), min(edit.columns[0] for edit in edits)
    return ScheduledRun(number, run.row, layer, column, tuple(edits))


def _changes_nothing(receiving: Trace, row: int, edit: ScheduledEdit) -> bool:
    """Whether an edit leaves the receiving values as they are, as far as the trace has kept them.

    A run of such edits is the receiving run: patching before two prompts differ has exactly no effect.
    """
    if isinstance(edit.intervention, KnockOut):
        return False
    try:
        values = receiving.value(edit.intervention.site)[row, list(edit.columns)]
    except KeyError:
        return False
    return torch.equal(edit.intervention.change(values).to(values.dtype), values)


def chunks(
    runs: Sequence[ScheduledRun], width: int, tokens: int, read: int = 1, spare: int = 0
) -> Iterator[list[ScheduledRun]]:
    """Runs to forward together: at most `tokens`, of which `spare` may be computed for nothing.

    All runs of a chunk are computed from its first changed column on. A run counts as long as that, or as the
    read columns, or as an eighth of all columns, since it carries keys and values of all of them.
    """
    shortest = max(read, width // 8)
    chunk: list[ScheduledRun] = []
    wasted = 0
    for run in sorted(runs, key=lambda run: (run.column, run.row, run.layer)):
        if chunk:
            # What the chunk computes of this run before it begins to differ.
            wasted += run.column - chunk[0].column
            length = max(width - chunk[0].column, shortest)
            if wasted > spare or (len(chunk) + 1) * length > tokens:
                yield chunk
                chunk, wasted = [], 0
        chunk.append(run)
    if chunk:
        yield chunk


class BatchedRuns:
    """Runs of one chunk on their way through the layers."""

    def __init__(self, receiving: Trace, chunk: Sequence[ScheduledRun], read: int) -> None:
        self.receiving, self.read = receiving, read
        self.depth, self.width = receiving.architecture.shape.layers, receiving.batch.width
        self.start = min(run.column for run in chunk)
        self.layers = ResumedLayers(receiving, self.start)
        # In the order of starting, so that runs under way are always the first of the batch.
        self.order = sorted(range(len(chunk)), key=lambda i: (chunk[i].layer, chunk[i].local))
        self.runs = [chunk[i] for i in self.order]

    def forward(self) -> Tensor:
        """(R, read, width) of the last layer's output at the read columns, in the chunk's order."""
        state = self.receiving.inputs[0].new_empty(0)  # (runs under way, columns from start on, width)
        under_way = 0
        for layer in range(self.runs[0].layer, self.depth):
            starting = [run for run in self.runs[under_way:] if run.layer == layer]
            # A run whose edits are not local needs all columns of its first layer.
            whole = [run for run in starting if not run.local]
            local = starting[len(whole) :]
            runs = [*self.runs[:under_way], *whole]
            if whole:
                inputs = self.layers.rows(self.receiving.inputs[layer], whole)[:, self.start :]
                inputs = inputs.expand(len(whole), -1, -1)
                state = torch.cat([state, inputs]) if under_way else inputs
            if layer == self.depth - 1:  # (R, read, width)
                state = self._last_layer(state, runs, local)
            else:
                if runs:
                    state = self.layers.from_start(layer, state, runs)
                if local:
                    started = self._start_locally(layer, local)
                    state = torch.cat([state, started]) if runs else started
            under_way += len(starting)
        # `state` is in the order of starting: row i of it belongs to run order[i] of the chunk.
        restored = torch.empty(len(self.order), dtype=torch.long)
        restored[torch.tensor(self.order)] = torch.arange(len(self.order))
        return state[restored]

    def _start_locally(self, layer: int, runs: Sequence[ScheduledRun]) -> Tensor:
        """What enters the next layer, (R, T, width), with this one run at the edited columns alone."""
        state = self.layers.rows(self.receiving.inputs[layer + 1], runs)[:, self.start :]
        state = state.expand(len(runs), -1, -1).clone()
        edited = [
            sorted({column for edit in run.edits if edit.layer == layer for column in edit.columns})
            for run in runs
        ]
        for size in sorted({len(columns) for columns in edited}):  # as many columns, one call
            members = [i for i, columns in enumerate(edited) if len(columns) == size]
            columns = shared(torch.tensor([edited[i] for i in members]))
            batch = [runs[i] for i in members]
            changed = self.layers.at_columns(layer, batch, columns, *self.layers.recorded(layer, batch))
            # (members, 1) with (n,) or (members, n): one (members, n, width) block is put in place.
            state[torch.tensor(members)[:, None], columns - self.start] = changed
        return state

    def _last_layer(
        self, state: Tensor, runs: Sequence[ScheduledRun], local: Sequence[ScheduledRun]
    ) -> Tensor:
        """The last layer where the metric reads; runs under way have keys and values of their own."""
        layer, read = self.depth - 1, torch.arange(self.width - self.read, self.width)
        outputs = []
        if runs:
            keys, values = self.layers.keys_values(layer, state, runs)
            inputs = state[:, -self.read :]
            if self.start > self.width - self.read:  # the metric also reads before the first changed column
                before = self.layers.rows(self.receiving.inputs[layer], runs)
                before = before[:, self.width - self.read : self.start].expand(len(runs), -1, -1)
                inputs = torch.cat([before, state], dim=1)
            outputs.append(self.layers.at_columns(layer, runs, read, keys, values, inputs))
        if local:
            recorded = self.layers.recorded(layer, local)
            outputs.append(self.layers.at_columns(layer, local, read, *recorded))
        return torch.cat(outputs)
