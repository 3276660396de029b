"""Where a run begins to differ from the receiving one, and which runs travel together.

In: runs, rows of a trace with their edits. Out: the same runs with their first layer and column, in chunks.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from safetynet.errors import InputError
from safetynet.interventions.edits import WIDE, Edit, Intervention, check_set
from safetynet.interventions.sites import Site
from safetynet.interventions.trace import Trace

GRAIN = 8
"""Runs whose first columns lie in one such stretch start together."""


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
    check_set(run.edits)
    depth, width = trace.anatomy.shape.layers, trace.batch.width
    first = width - trace.batch.length(run.row)
    edits = []
    for edit in run.edits:
        site = trace.anatomy.check(edit.site)
        columns = (
            tuple(range(first, width))
            if edit.positions is None
            else tuple(trace.batch.columns(run.row, edit.positions))
        )
        if not columns:
            continue
        if list(columns) != sorted(set(columns)):
            raise InputError(f"site {site}: positions have to ascend, each once; given: {edit.positions}.")
        layer, done = site.layer, edit
        if site.component == "resid_post" and site.layer < depth - 1 and isinstance(edit, Edit):
            # What leaves a layer is what enters the next, where it can be put without running this one.
            layer, done = site.layer + 1, Edit(Site("resid_pre", site.layer + 1), edit.change, edit.positions)
        edits.append(PlannedEdit(layer, columns, done, site.component in WIDE or layer != site.layer))
    if not edits:
        return None
    start = min(edit.layer for edit in edits)
    column = min(min(edit.columns) for edit in edits)
    planned = Planned(number, run.row, start, column, tuple(edits))
    first_read = width - read
    seen = any(
        edit.layer < depth - 1 or edit.wide or any(c >= first_read for c in edit.columns)
        for edit in planned.edits
    )
    return planned if seen else None


def chunks(runs: Sequence[Planned], width: int, tokens: int) -> Iterator[list[Planned]]:
    """Runs that start in the same stretch of columns, at most so many tokens of them."""
    order = sorted(runs, key=lambda one: (one.column // GRAIN, one.row, one.layer))
    chunk: list[Planned] = []
    for one in order:
        start = min((other.column for other in chunk), default=one.column)
        length = width - min(start, one.column)
        same = not chunk or chunk[0].column // GRAIN == one.column // GRAIN
        if chunk and (not same or (len(chunk) + 1) * length > tokens):
            yield chunk
            chunk = []
        chunk.append(one)
    if chunk:
        yield chunk
