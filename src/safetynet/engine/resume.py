"""One layer of a recorded run, called again for some rows and columns with the model's own arguments.

In: a trace, states, the runs that they belong to. Out: the layer's output. Keys and values of columns that
are not computed come from the trace, through an object that stands where the model expects its cache.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from safetynet.engine.edits import Edit, KnockOut
from safetynet.engine.hooks import Placed, hooked
from safetynet.engine.plan import Planned, PlannedEdit
from safetynet.engine.sites import Site
from safetynet.engine.trace import Trace
from safetynet.errors import InputError
from safetynet.models.blocks import hidden_of


class _Given:
    """Stands for the cache in one layer's call: hands out keys and values, or takes them and ends it.

    With `first`, the first column that is computed, keys and values of all columns are there already.
    """

    def __init__(
        self, keys: Tensor | None, values: Tensor | None, first: int | None = None, stop: bool = False
    ) -> None:
        self.keys, self.values, self.first, self.stop = keys, values, first, stop
        self.seen = first if first is not None else 0 if keys is None else keys.shape[2]

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        if self.keys is None or self.values is None:
            self.keys, self.values = keys, values
        elif self.first is None:
            self.keys = torch.cat([self.keys.expand(len(keys), -1, -1, -1), keys], dim=2)
            self.values = torch.cat([self.values.expand(len(values), -1, -1, -1), values], dim=2)
        self.seen = self.keys.shape[2]
        if self.stop:
            raise _Taken
        return self.keys, self.values

    def get_seq_length(self, *_: Any) -> int:
        return self.seen


PLACED = (
    "attention_mask", "position_ids", "position_embeddings", "cache_position", "alibi", "position_bias",
)  # fmt: skip
"""Tensors among a layer's arguments that are known to belong to rows and columns, or to neither."""
AFTER_HEADS = ("head", "attn_out", "resid_mid", "mlp_out", "router", "expert", "resid_post")
"""Components that a layer computes from its heads on."""


class _Taken(Exception):  # noqa: N818 - a signal, not an error
    """The keys and values are there; the rest of the layer is not wanted."""


class Resumed:
    """Calls of a trace's layers for runs that differ from column `start` on."""

    def __init__(self, trace: Trace, start: int) -> None:
        self.trace, self.start, self.width = trace, start, trace.batch.width

    def suffix(self, layer: int, state: Tensor, runs: Sequence[Planned]) -> Tensor:
        """The layer from column `start` on: (R, T, width) to (R, T, width)."""
        columns = torch.arange(self.start, self.width)
        keys, values = self._before(layer, runs)
        return self._call(layer, state, runs, columns, _Given(keys, values))

    def keys_values(self, layer: int, state: Tensor, runs: Sequence[Planned]) -> tuple[Tensor, Tensor]:
        """Keys and values of all columns, (R, kv heads, S, head size); the rest of the layer is left out."""
        keys, values = self._before(layer, runs)
        given = _Given(keys, values, stop=True)
        try:
            self._call(layer, state, runs, torch.arange(self.start, self.width), given)
        except _Taken:
            assert given.keys is not None
            assert given.values is not None
            return given.keys, given.values
        raise InputError(
            "model: its attention keeps no keys and values in the cache, so runs cannot be resumed in it."
        )

    def at(
        self,
        layer: int,
        runs: Sequence[Planned],
        columns: Tensor,
        keys: Tensor,
        values: Tensor,
        inputs: Tensor | None = None,
    ) -> Tensor:
        """One layer at given columns, (n,) or (R, n), with all keys and values given."""
        keys, values = (kv.expand(len(runs), -1, -1, -1) for kv in (keys, values))
        given = _Given(keys, values, first=int(columns.flatten()[0]))
        if inputs is not None:
            return self._call(layer, inputs, runs, columns, given)
        inputs = self._at_columns(self.trace.inputs[layer], runs, columns)
        with self._attended(layer, runs, columns):
            return self._call(layer, inputs, runs, columns, given)

    def _at_columns(self, x: Tensor, runs: Sequence[Planned], columns: Tensor) -> Tensor:
        """(B, S, width) of the receiving runs to (R, n, width)."""
        rows = slice(None) if columns.ndim == 1 else torch.arange(len(runs))[:, None]
        return self.rows(x, runs).expand(len(runs), -1, -1)[rows, columns]

    @contextmanager
    def _attended(self, layer: int, runs: Sequence[Planned], columns: Tensor) -> Iterator[None]:
        """Where no edit comes before the heads, let attention begin with those that the trace recorded."""
        plain = layer in self.trace.anatomy.verdict.plain
        recorded = self.trace.read.get(Site("head", layer)) if plain else None
        edits = [edit.done for one in runs for edit in one.edits if edit.layer == layer]
        if recorded is None or any(edit.site.component not in AFTER_HEADS for edit in edits):
            yield
            return
        parts = self.trace.anatomy.layers[layer]
        heads = self._at_columns(recorded, runs, columns)
        own = vars(parts.attention).get("forward")
        parts.attention.forward = lambda *_, **__: (parts.output(heads), None)
        try:
            yield
        finally:
            if own is None:
                del parts.attention.forward
            else:
                parts.attention.forward = own

    def _call(
        self, layer: int, inputs: Tensor, runs: Sequence[Planned], columns: Tensor, given: _Given
    ) -> Tensor:
        """Run one layer as the model would, with this layer's edits of these runs in place."""
        edits = [(i, edit) for i, one in enumerate(runs) for edit in one.edits if edit.layer == layer]
        masks = [(i, edit) for i, edit in edits if isinstance(edit.done, KnockOut)]
        placed: list[Placed] = []
        for i, edit in edits:
            if isinstance(edit.done, Edit):
                placed += self._placed(i, edit, columns if columns.ndim == 1 else columns[i])
        arguments = self._arguments(layer, runs, columns)
        if masks:
            arguments["attention_mask"] = self._cut(layer, arguments["attention_mask"], masks, runs, columns)
        module = self.trace.anatomy.layers[layer].layer
        with hooked(self.trace.anatomy, layer, placed):
            output = module(inputs, **{self.trace.cache: given}, **arguments)
        return hidden_of(output)

    def _placed(self, i: int, edit: PlannedEdit, columns: Tensor) -> list[Placed]:
        """The part of an edit that lies in the columns of this call."""
        assert isinstance(edit.done, Edit)
        first, last = int(columns[0]), int(columns[-1])
        contiguous = last - first + 1 == len(columns)
        if contiguous and first <= edit.columns[0] and edit.columns[-1] <= last:
            at = [column - first for column in edit.columns]
            whole = at[-1] - at[0] + 1 == len(at)
            return [Placed(edit.done, i, slice(at[0], at[-1] + 1) if whole else at)]
        here = {int(column): t for t, column in enumerate(columns)}
        kept = [k for k, column in enumerate(edit.columns) if column in here]
        if not kept:
            return []
        change, size = edit.done.change, len(edit.columns)

        def partly(x: Tensor) -> Tensor:
            # A change may know its positions (a patch does), so it sees as many rows as it was made for.
            whole = x.new_zeros(size, x.shape[-1])
            whole[kept] = x
            return change(whole)[kept]

        return [Placed(Edit(edit.done.site, partly), i, [here[edit.columns[k]] for k in kept])]

    def _arguments(self, layer: int, runs: Sequence[Planned], columns: Tensor) -> dict[str, Any]:
        """What the model passed to this layer, for these rows and columns."""
        given = dict(self.trace.arguments[layer])
        if "position_ids" in given and given["position_ids"] is not None:
            given["position_ids"] = self._gathered(given["position_ids"], runs, columns)
        embedded = given.get("position_embeddings")
        if isinstance(embedded, Tensor):  # complex numbers, in Llama 4 and DeepSeek 2
            given["position_embeddings"] = self._gathered(embedded, runs, columns)
        elif embedded is not None:
            given["position_embeddings"] = tuple(self._gathered(x, runs, columns) for x in embedded)
        if given.get("alibi") is not None:  # heads of a row below each other, a value for each key
            by_row = given["alibi"].unflatten(0, (len(self.trace.batch.ids), -1))
            given["alibi"] = by_row[[one.row for one in runs]].flatten(0, 1)
        if "cache_position" in given:
            given["cache_position"] = None
        given["attention_mask"] = self._mask(given.get("attention_mask"), runs, columns)
        return given

    def _gathered(self, x: Tensor, runs: Sequence[Planned], columns: Tensor) -> Tensor:
        """(B or 1, S, ...) to these rows and columns; one row stays one where it serves all."""
        if columns.ndim == 1:
            return self.rows(x, runs)[:, int(columns[0]) : int(columns[-1]) + 1]
        rows = torch.tensor([one.row if len(x) > 1 else 0 for one in runs])
        return x[rows[:, None], columns]

    def _mask(self, mask: Tensor | None, runs: Sequence[Planned], columns: Tensor) -> Tensor | None:
        """Rows of the model's mask, or of the plainly causal one that the model left out."""
        if mask is None:
            causal = columns[..., None] >= torch.arange(self.width)
            if causal.all():
                return None
            causal = causal[None, None] if columns.ndim == 1 else causal[:, None]
            return self._as_model(causal)
        if columns.ndim == 1:
            return self.rows(mask, runs)[:, :, int(columns[0]) : int(columns[-1]) + 1]
        rows = torch.tensor([one.row if len(mask) > 1 else 0 for one in runs])
        return mask[rows[:, None], :, columns].transpose(1, 2)

    def _as_model(self, allowed: Tensor) -> Tensor:
        """A boolean mask in the form that this attention takes."""
        dtype = self.trace.inputs[0].dtype
        device = self.trace.inputs[0].device
        if self.trace.anatomy.model.config._attn_implementation == "sdpa":
            return allowed.to(device)
        least = torch.finfo(dtype).min
        return torch.zeros(allowed.shape, dtype=dtype).masked_fill(~allowed, least).to(device)

    def _closed(self, layer: int, dtype: torch.dtype) -> bool | float:
        """What stands in this model's mask where a token must not look, as at the last one from the first."""
        if dtype != torch.bool:
            return torch.finfo(dtype).min
        mask = self.trace.arguments[layer].get("attention_mask")
        unpadded = int(self.trace.batch.mask[:, 0].argmax())
        return False if mask is None else bool(mask[unpadded % len(mask), 0, 0, -1])

    def _cut(
        self,
        layer: int,
        mask: Tensor | None,
        cuts: Sequence[tuple[int, PlannedEdit]],
        runs: Sequence[Planned],
        columns: Tensor,
    ) -> Tensor:
        """The mask, with the edges of knock-outs closed: (R, heads or 1, n, S)."""
        if mask is None:
            mask = self._as_model(torch.ones(1, 1, columns.shape[-1], self.width, dtype=torch.bool))
        by_head = any(edit.done.site.index is not None for _, edit in cuts)
        heads = self.trace.anatomy.count("attention", layer) if by_head else mask.shape[1]
        mask = mask.expand(len(runs), heads, -1, -1).clone()
        closed = self._closed(layer, mask.dtype)
        for i, edit in cuts:
            assert isinstance(edit.done, KnockOut)
            own = columns if columns.ndim == 1 else columns[i]
            keys = torch.tensor(self.trace.batch.columns(runs[i].row, edit.done.keys), dtype=torch.long)
            queries = torch.isin(own, torch.tensor(edit.columns)).nonzero()[:, 0]
            chosen = slice(None) if edit.done.head is None else slice(edit.done.head, edit.done.head + 1)
            block = mask[i, chosen]
            block[:, queries[:, None], keys] = closed
            if (block[:, queries] == closed).all(-1).any():
                raise InputError(
                    f"site {edit.done.site}: of prompt {runs[i].row} a query among {edit.done.queries} has "
                    "no key left to attend to. Leave it one, such as its own position."
                )
        return mask

    def recorded(self, layer: int, runs: Sequence[Planned]) -> tuple[Tensor, Tensor]:
        """The receiving run's keys and values of these rows."""
        return self.rows(self.trace.keys[layer], runs), self.rows(self.trace.values[layer], runs)

    def _before(self, layer: int, runs: Sequence[Planned]) -> tuple[Tensor | None, Tensor | None]:
        if not self.start:
            return None, None
        keys, values = self.recorded(layer, runs)
        return keys[:, :, : self.start], values[:, :, : self.start]

    def rows(self, x: Tensor, runs: Sequence[Planned]) -> Tensor:
        """Rows of these runs; a single row is left to broadcast."""
        if len(x) == 1:
            return x
        rows = [one.row for one in runs]
        return x[rows[0] : rows[0] + 1] if len(set(rows)) == 1 else x[torch.tensor(rows)]


def shared(columns: Tensor) -> Tensor:
    """(R, n) columns as (n,) where they are one stretch, the same for all: nothing has to be gathered."""
    first = columns[0]
    same = (columns == first).all() and int(first[-1] - first[0]) + 1 == len(first)
    return first if same else columns
