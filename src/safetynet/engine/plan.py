"""Where a run begins to differ from the receiving one, and which runs travel together.

In: runs, rows of a trace with their edits. Out: the same runs with their first layer and column, in chunks.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from safetynet.engine.edits import Edit, Intervention, KnockOut, check_set
from safetynet.engine.sites import Site
from safetynet.engine.trace import Trace
from safetynet.errors import InputError


@dataclass(frozen=True)
class Run:
    """One prompt under interventions."""

    row: int
    """Of the receiving batch."""
    edits: tuple[Intervention, ...]


@dataclass(frozen=True)
class PlannedEdit:
    """An intervention in columns of the batch."""

    layer: int
    columns: tuple[int, ...]
    done: Intervention
    wide: bool


@dataclass(frozen=True)
class Planned:
    """A run, and where it begins to differ."""

    number: int
    row: int
    layer: int
    column: int
    edits: tuple[PlannedEdit, ...]

    @property
    def narrow(self) -> bool:
        """Whether its first layer's output changes at the edited columns alone."""
        return not any(edit.wide for edit in self.edits if edit.layer == self.layer)


def plan(trace: Trace, number: int, run: Run, read: int) -> Planned | None:
    """Where a run begins to differ; None if nothing at the last `read` columns can change."""
    if not 0 <= run.row < len(trace.batch.ids):
        raise InputError(f"run {number}: prompt {run.row} does not exist; there are {len(trace.batch.ids)}.")
    depth, width = trace.anatomy.shape.layers, trace.batch.width
    placed = [(edit, _columns(trace, run.row, edit)) for edit in run.edits]
    check_set(placed)
    edits = tuple(_planned(trace, edit, columns) for edit, columns in placed if columns)
    first_read = width - read
    seen = any(edit.layer < depth - 1 or edit.wide or edit.columns[-1] >= first_read for edit in edits)
    if not seen or all(_idle(trace, run.row, edit) for edit in edits):
        return None
    start = min(edit.layer for edit in edits)
    column = min(edit.columns[0] for edit in edits)
    return Planned(number, run.row, start, column, edits)


def _columns(trace: Trace, row: int, edit: Intervention) -> tuple[int, ...]:
    """Columns of an edit's positions, ascending."""
    site, batch = trace.anatomy.check(edit.site), trace.batch
    if isinstance(edit, KnockOut):
        batch.columns(row, edit.keys)
    if edit.positions is None:
        return tuple(range(batch.width - batch.length(row), batch.width))
    columns = batch.columns(row, edit.positions)
    if columns != sorted(set(columns)):
        raise InputError(f"site {site}: positions have to ascend, each once; given: {edit.positions}.")
    return tuple(columns)


def _planned(trace: Trace, edit: Intervention, columns: tuple[int, ...]) -> PlannedEdit:
    site = edit.site
    if (
        isinstance(edit, Edit)
        and site.component == "resid_post"
        and site.layer < trace.anatomy.shape.layers - 1
    ):
        # What leaves a layer is what enters the next, where it can be put without running this one.
        site = Site("resid_pre", site.layer + 1)
        edit = Edit(site, edit.change, edit.positions)
    return PlannedEdit(site.layer, columns, edit, trace.anatomy.wide(site))


def _idle(trace: Trace, row: int, edit: PlannedEdit) -> bool:
    """Whether an edit leaves the receiving run's values as they are, as far as the trace has kept them.

    A run of such edits is the receiving run: patching before two prompts differ has exactly no effect.
    """
    if isinstance(edit.done, KnockOut):
        return False
    try:
        own = trace.value(edit.done.site)[row, list(edit.columns)]
    except KeyError:
        return False
    return torch.equal(edit.done.change(own).to(own.dtype), own)


def chunks(
    runs: Sequence[Planned], width: int, tokens: int, read: int = 1, slack: int = 0
) -> Iterator[list[Planned]]:
    """Runs that travel together: at most so many tokens, of which `slack` may be computed for nothing.

    A run is as long as its columns from the chunk's first changed one, or the read ones, or an eighth of all,
    whose keys and values it carries.
    """
    least = max(read, width // 8)
    chunk: list[Planned] = []
    wasted = 0
    for one in sorted(runs, key=lambda one: (one.column, one.row, one.layer)):
        if chunk:
            wasted += one.column - chunk[0].column
            length = max(width - chunk[0].column, least)
            if wasted > slack or (len(chunk) + 1) * length > tokens:
                yield chunk
                chunk, wasted = [], 0
        chunk.append(one)
    if chunk:
        yield chunk
