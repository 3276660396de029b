"""Prompts as the engine holds them: token ids padded on the left, so that their ends stand in one column.

Positions count from a prompt's own first token; columns count in the batch. Many prompts are divided into
batches of bounded size, so that only one batch's activations exist at a time.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from safetynet.errors import InputError
from safetynet.models.causal_lm import CausalLM
from safetynet.prompts import pad

Prompts = Sequence[Sequence[int]]
"""Token ids of prompts, unpadded."""
BATCH_TOKENS = 4096
"""Tokens of one batch, padding included; decides about memory, never about numbers."""


@dataclass(frozen=True)
class Batch:
    """A batch of prompts."""

    ids: Tensor
    """(B, S) int64."""
    mask: Tensor
    """(B, S) int64, 1 at tokens."""

    @classmethod
    def of(cls, rows: Prompts, pad_id: int = 0, device: Any = "cpu") -> "Batch":
        """Pad lists of token ids.

        Raises:
            InputError: if there are no rows, or an empty one.
        """
        if not rows or not all(len(row) for row in rows):
            raise InputError("prompts: give at least one, each with at least one token.")
        ones = [[1] * len(row) for row in rows]
        return cls(pad(rows, pad_id, "left").to(device), pad(ones, 0, "left").to(device))

    @property
    def width(self) -> int:
        """Columns: the longest prompt's tokens."""
        return self.ids.shape[1]

    @property
    def position_ids(self) -> Tensor:
        """(B, S) int64, from 0 at each prompt's first token."""
        return (self.mask.cumsum(1) - 1).clamp_min(0)

    def length(self, row: int) -> int:
        """Tokens of one prompt."""
        return int(self.mask[row].sum())

    def columns(self, row: int, positions: Sequence[int]) -> list[int]:
        """Columns of positions; negative ones count from the prompt's end.

        Raises:
            InputError: if the prompt has no such position.
        """
        length = self.length(row)
        wrong = [p for p in positions if not -length <= p < length]
        if wrong:
            raise InputError(f"position {wrong[0]}: prompt {row} has positions 0 to {length - 1}.")
        return [self.width - length + (p % length) for p in positions]

    def tokens(self, row: int) -> list[int]:
        """Ids of one prompt."""
        return self.ids[row, self.width - self.length(row) :].tolist()

    def first_difference(self, other: "Batch") -> list[int]:
        """Column, per row, before which both prompts agree; the width where they are equal.

        Raises:
            InputError: if two prompts of a pair differ in their number of tokens.
        """
        if self.ids.shape != other.ids.shape or not torch.equal(self.mask, other.mask):
            raise InputError(
                "pairs: receiver and source must have as many tokens as each other, row by row, or their "
                "positions do not correspond. Use a placebo of the trigger's token count."
            )
        differs = self.ids != other.ids
        # The largest of zeros and ones, and of those the first; a row without ones would give column 0.
        first = torch.where(differs.any(1), differs.int().argmax(1), torch.tensor(self.width))
        return first.tolist()


def check_length(model: CausalLM, batch: Batch) -> None:
    """Refuse prompts that are longer than the model's context.

    Raises:
        InputError: with both lengths.
    """
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and batch.width > limit:
        raise InputError(
            f"prompts: the longest has {batch.width} tokens, the model's context holds {limit}. "
            "Shorten it, or lower training.max_length."
        )


def batches(model: CausalLM, rows: Prompts, tokens: int = BATCH_TOKENS) -> Iterator[tuple[slice, Batch]]:
    """Rows in their order, as many at a time as `tokens` hold; at least one.

    Yields:
        Which rows, and their batch on the model's device.

    Raises:
        InputError: if there are no rows, or an empty one.
    """
    if not rows:
        raise InputError("prompts: there are none. Give at least one.")
    device = next(model.parameters()).device
    start = 0
    while start < len(rows):
        # In their order, not by length: whoever asks reads results beside their rows.
        stop, longest = start, 0
        while stop < len(rows):
            longest = max(longest, len(rows[stop]))
            if stop > start and (stop + 1 - start) * longest > tokens:
                break
            stop += 1
        yield slice(start, stop), Batch.of(rows[start:stop], device=device)
        start = stop


def check_positions(rows: Prompts, positions: Sequence[Sequence[int]]) -> None:
    """Refuse positions that are not as many lists as prompts, or an empty list.

    Raises:
        InputError: naming the prompt.
    """
    if len(positions) != len(rows):
        raise InputError(f"positions: {len(positions)} lists for {len(rows)} prompts; give one for each.")
    empty = [i for i, row in enumerate(positions) if not len(row)]
    if empty:
        raise InputError(f"positions: prompt {empty[0]} has none. Leave it out, or choose other positions.")


def check_pairs(**runs: Prompts | None) -> None:
    """Refuse runs of different numbers of prompts, whose rows are no groups.

    Raises:
        InputError: with the numbers.
    """
    counts = {name: len(rows) for name, rows in runs.items() if rows is not None}
    if len(set(counts.values())) > 1 or not all(counts.values()):
        numbers = ", ".join(f"{count} {name}" for name, count in counts.items())
        raise InputError(f"groups: each has one prompt of every run, at least one group; given: {numbers}.")
