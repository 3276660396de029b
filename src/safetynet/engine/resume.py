"""One layer of a recorded run, called again for some rows and columns with the model's own arguments.

In: a trace, inputs of the layer, the runs that they belong to. Out: the layer's output. Keys and values of
columns that are not computed come from the trace, through an object that stands where the model expects its
cache. Columns are those of the batch, 1-d where they are one stretch that all runs share, else (R, n).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from safetynet.engine.edits import Edit, Intervention, KnockOut
from safetynet.engine.hooks import PlacedEdit, hooked
from safetynet.engine.sites import Site
from safetynet.engine.trace import Trace
from safetynet.errors import InputError
from safetynet.models.blocks import hidden_of, replaced

COLUMN_ARGUMENTS = (
    "attention_mask", "position_ids", "position_embeddings", "cache_position", "alibi", "position_bias",
)  # fmt: skip
"""Tensors among a layer's arguments that are known to belong to rows and columns, or to neither."""
AFTER_HEADS = ("head", "attn_out", "resid_mid", "mlp_out", "router", "expert", "resid_post")
"""Components that a layer computes from its heads on."""


@dataclass(frozen=True)
class ScheduledEdit:
    """An intervention in columns of the batch."""

    layer: int
    columns: tuple[int, ...]
    intervention: Intervention
    local: bool
    """Whether its layer's output changes at these columns alone."""


@dataclass(frozen=True)
class ScheduledRun:
    """A run, and the layer and column from which on it differs from the receiving one."""

    number: int
    row: int
    layer: int
    column: int
    edits: tuple[ScheduledEdit, ...]

    @property
    def local(self) -> bool:
        """Whether its first layer's output changes at the edited columns alone."""
        return all(edit.local for edit in self.edits if edit.layer == self.layer)


class _KeysTaken(Exception):  # noqa: N818 - a signal, not an error
    """The keys and values are there; the rest of the layer is not needed."""


class _RecordedCache:
    """Stands for the cache in one layer's call: puts recorded keys and values before the new ones.

    With `first`, the first column that is computed, keys and values of all columns are there already. With
    `stop`, the call ends as soon as they are complete.
    """

    def __init__(
        self, keys: Tensor | None, values: Tensor | None, first: int | None = None, stop: bool = False
    ) -> None:
        self.keys, self.values, self.first, self.stop = keys, values, first, stop
        self.length = first if first is not None else 0 if keys is None else keys.shape[2]

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        if self.keys is None or self.values is None:
            self.keys, self.values = keys, values
        elif self.first is None:
            # (R, kv heads, columns, head size); the recorded ones of a single row serve all runs of it.
            self.keys = torch.cat([self.keys.expand(len(keys), -1, -1, -1), keys], dim=2)
            self.values = torch.cat([self.values.expand(len(values), -1, -1, -1), values], dim=2)
        self.length = self.keys.shape[2]
        if self.stop:
            raise _KeysTaken
        return self.keys, self.values

    def get_seq_length(self, *_: Any) -> int:
        return self.length


class ResumedLayers:
    """Calls of a trace's layers for runs that differ from column `start` on."""

    def __init__(self, trace: Trace, start: int) -> None:
        self.trace, self.start, self.width = trace, start, trace.batch.width
        self.architecture = trace.architecture

    def from_start(self, layer: int, state: Tensor, runs: Sequence[ScheduledRun]) -> Tensor:
        """The layer from column `start` on: (R, T, width) to (R, T, width)."""
        cache = _RecordedCache(*self._before_start(layer, runs))
        return self._call(layer, state, runs, torch.arange(self.start, self.width), cache)

    def keys_values(self, layer: int, state: Tensor, runs: Sequence[ScheduledRun]) -> tuple[Tensor, Tensor]:
        """Keys and values of all columns, (R, kv heads, S, head size); the rest of the layer is left out."""
        cache = _RecordedCache(*self._before_start(layer, runs), stop=True)
        try:
            self._call(layer, state, runs, torch.arange(self.start, self.width), cache)
        except _KeysTaken:
            assert cache.keys is not None
            assert cache.values is not None
            return cache.keys, cache.values
        raise InputError(
            "model: its attention keeps no keys and values in the cache, so runs cannot be resumed in it."
        )

    def at_columns(
        self,
        layer: int,
        runs: Sequence[ScheduledRun],
        columns: Tensor,
        keys: Tensor,
        values: Tensor,
        inputs: Tensor | None = None,
    ) -> Tensor:
        """One layer at some columns, with keys and values of all; recorded inputs where none are given."""
        keys, values = (x.expand(len(runs), -1, -1, -1) for x in (keys, values))
        cache = _RecordedCache(keys, values, first=int(columns.flatten()[0]))
        if inputs is not None:
            return self._call(layer, inputs, runs, columns, cache)
        inputs = self._inputs(self.trace.inputs[layer], runs, columns)
        plain = layer in self.architecture.checked.plain_attention
        recorded = self.trace.read.get(Site("head", layer)) if plain else None
        sites = [edit.intervention.site for run in runs for edit in run.edits if edit.layer == layer]
        if recorded is None or any(site.component not in AFTER_HEADS for site in sites):
            return self._call(layer, inputs, runs, columns, cache)
        # No edit precedes the heads, so that attention begins with those recorded, (R, n, heads * head size).
        parts, heads = self.architecture.layers[layer], self._inputs(recorded, runs, columns)
        with replaced([parts.attention], lambda *_, **__: (parts.output(heads), None)):
            return self._call(layer, inputs, runs, columns, cache)

    def recorded(self, layer: int, runs: Sequence[ScheduledRun]) -> tuple[Tensor, Tensor]:
        """The receiving run's keys and values of these rows."""
        return self.rows(self.trace.keys[layer], runs), self.rows(self.trace.values[layer], runs)

    def rows(self, x: Tensor, runs: Sequence[ScheduledRun]) -> Tensor:
        """(B or 1, ...) to the rows of these runs; a single row is left to broadcast."""
        rows = [run.row for run in runs]
        if len(x) == 1:
            return x
        return x[rows[0] : rows[0] + 1] if len(set(rows)) == 1 else x[torch.tensor(rows)]

    def _before_start(self, layer: int, runs: Sequence[ScheduledRun]) -> tuple[Tensor | None, Tensor | None]:
        if not self.start:
            return None, None
        keys, values = self.recorded(layer, runs)
        return keys[:, :, : self.start], values[:, :, : self.start]

    def _inputs(self, x: Tensor, runs: Sequence[ScheduledRun], columns: Tensor) -> Tensor:
        """(B, S, width) of the receiving runs to (R, n, width)."""
        return self._gathered(x, runs, columns).expand(len(runs), -1, -1).contiguous()

    def _call(
        self,
        layer: int,
        inputs: Tensor,
        runs: Sequence[ScheduledRun],
        columns: Tensor,
        cache: _RecordedCache,
    ) -> Tensor:
        """Run one layer as the model would, (R, n, width) to (R, n, width), with its edits of these runs."""
        # What the model passed to this layer, for these rows and columns.
        arguments = dict(self.trace.arguments[layer])
        if arguments.get("position_ids") is not None:
            arguments["position_ids"] = self._gathered(arguments["position_ids"], runs, columns)
        embeddings = arguments.get("position_embeddings")
        if isinstance(embeddings, Tensor):  # complex numbers, in Llama 4 and DeepSeek 2
            arguments["position_embeddings"] = self._gathered(embeddings, runs, columns)
        elif embeddings is not None:  # cosines and sines, (B or 1, S, rotated size) each
            arguments["position_embeddings"] = tuple(self._gathered(x, runs, columns) for x in embeddings)
        if arguments.get("alibi") is not None:  # (B * heads, 1, S): heads of a row below each other
            by_row = arguments["alibi"].unflatten(0, (len(self.trace.batch.ids), -1))
            arguments["alibi"] = by_row[[run.row for run in runs]].flatten(0, 1)
        if "cache_position" in arguments:
            arguments["cache_position"] = None
        mask = arguments.get("attention_mask")
        if mask is not None:  # (B or 1, heads or 1, S, S): its queries are columns
            mask = self._gathered(mask.transpose(1, 2), runs, columns).transpose(1, 2)
        else:
            # The model left out a plainly causal mask, which attention would apply from column 0 on.
            causal = columns[..., None] >= torch.arange(self.width)
            if not causal.all():
                mask = self._as_mask(causal[None, None] if columns.ndim == 1 else causal[:, None])

        placed: list[PlacedEdit] = []
        knock_outs: list[tuple[int, ScheduledEdit]] = []
        for i, run in enumerate(runs):
            for edit in run.edits:
                if edit.layer == layer and isinstance(edit.intervention, KnockOut):
                    knock_outs.append((i, edit))
                elif edit.layer == layer:
                    placed += self._placed(i, edit, columns if columns.ndim == 1 else columns[i])
        if knock_outs:
            mask = self._cut(layer, mask, knock_outs, runs, columns)
        arguments |= {"attention_mask": mask, self.trace.cache_name: cache}
        with hooked(self.architecture, layer, placed):
            return hidden_of(self.architecture.layers[layer].layer(inputs, **arguments))

    def _placed(self, i: int, edit: ScheduledEdit, columns: Tensor) -> list[PlacedEdit]:
        """The part of an edit that lies in the columns of this call."""
        intervention = edit.intervention
        assert isinstance(intervention, Edit)
        first, last = int(columns[0]), int(columns[-1])
        contiguous = last - first + 1 == len(columns)
        if contiguous and first <= edit.columns[0] and edit.columns[-1] <= last:
            at = [column - first for column in edit.columns]
            stretch = at[-1] - at[0] + 1 == len(at)  # a slice is a view, and faster than a list
            return [PlacedEdit(intervention, i, slice(at[0], at[-1] + 1) if stretch else at)]
        index = {int(column): t for t, column in enumerate(columns)}
        inside = [k for k, column in enumerate(edit.columns) if column in index]
        if not inside:
            return []
        change, size = intervention.change, len(edit.columns)

        def change_inside(x: Tensor) -> Tensor:
            # A change may know its positions (a patch does), so it sees as many rows as it was made for.
            whole = x.new_zeros(size, x.shape[-1])
            whole[inside] = x
            return change(whole)[inside]

        at = [index[edit.columns[k]] for k in inside]
        return [PlacedEdit(Edit(intervention.site, change_inside), i, at)]

    def _gathered(self, x: Tensor, runs: Sequence[ScheduledRun], columns: Tensor) -> Tensor:
        """(B or 1, S, ...) to these rows and columns; one row stays one where it serves all."""
        if columns.ndim == 1:
            return self.rows(x, runs)[:, int(columns[0]) : int(columns[-1]) + 1]
        rows = torch.tensor([run.row if len(x) > 1 else 0 for run in runs])
        return x[rows[:, None], columns]

    def _as_mask(self, allowed: Tensor) -> Tensor:
        """A boolean mask in the form that this attention takes."""
        like = self.trace.inputs[0]
        if self.architecture.model.config._attn_implementation == "sdpa":
            return allowed.to(like.device)
        closed = torch.finfo(like.dtype).min
        return torch.zeros(allowed.shape, dtype=like.dtype).masked_fill(~allowed, closed).to(like.device)

    def _cut(
        self,
        layer: int,
        mask: Tensor | None,
        knock_outs: Sequence[tuple[int, ScheduledEdit]],
        runs: Sequence[ScheduledRun],
        columns: Tensor,
    ) -> Tensor:
        """The mask, with the edges of knock-outs closed: (R, heads or 1, n, S)."""
        if mask is None:
            mask = self._as_mask(torch.ones(1, 1, columns.shape[-1], self.width, dtype=torch.bool))
        # A row for each run and, if single heads are cut, a plane for each head: what shared one is copied.
        by_head = any(edit.intervention.site.index is not None for _, edit in knock_outs)
        heads = self.architecture.count("attention", layer) if by_head else mask.shape[1]
        mask = mask.expand(len(runs), heads, -1, -1).clone()
        closed: bool | float = torch.finfo(mask.dtype).min if mask.dtype != torch.bool else False
        model_mask = self.trace.arguments[layer].get("attention_mask")
        if mask.dtype == torch.bool and model_mask is not None:
            # Models disagree on what True means: take what keeps the first token from seeing the last.
            unpadded = int(self.trace.batch.mask[:, 0].argmax())
            closed = bool(model_mask[unpadded % len(model_mask), 0, 0, -1])
        for i, edit in knock_outs:
            cut = edit.intervention
            assert isinstance(cut, KnockOut)
            keys = torch.tensor(self.trace.batch.columns(runs[i].row, cut.keys), dtype=torch.long)
            queries = torch.isin(columns if columns.ndim == 1 else columns[i], torch.tensor(edit.columns))
            queries = queries.nonzero()[:, 0]
            # (heads that are cut, n, S), a view: what is written into it is in the mask.
            block = mask[i, slice(None) if cut.head is None else slice(cut.head, cut.head + 1)]
            block[:, queries[:, None], keys] = closed
            if (block[:, queries] == closed).all(-1).any():
                raise InputError(
                    f"site {cut.site}: of prompt {runs[i].row} a query among {cut.queries} has "
                    "no key left to attend to. Leave it one, such as its own position."
                )
        return mask


def shared(columns: Tensor) -> Tensor:
    """(R, n) columns as (n,) where they are one stretch, the same for all: nothing has to be gathered."""
    first = columns[0]
    same = (columns == first).all() and int(first[-1] - first[0]) + 1 == len(first)
    return first if same else columns
