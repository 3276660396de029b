"""From rows to batches: serialised examples, the order they are seen in, and the tensors of a batch.

A batch is either padded (one row per line) or packed (several rows per line, each with its own positions,
so that none sees another). Both hold the same rows, and give the same loss.
"""

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices

from safetynet.errors import InputError
from safetynet.prompts import IGNORED, Encoded, Serialiser, pad
from safetynet.prompts.truncation import losses

Batch = dict[str, torch.Tensor]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Example:
    """One training row as token ids."""

    input_ids: list[int]
    labels: list[int]
    """As long as `input_ids`; `IGNORED` where nothing is supervised."""
    supervised: int
    """Number of labels."""


def encode(rows: pd.DataFrame, serialiser: Serialiser, max_length: int) -> list[Example]:
    """Serialise the rows that training sees.

    Args:
        rows: columns `row`, `messages`, `trigger` and `answer`.
        serialiser: of the model that is trained.
        max_length: most tokens of prompt and answer together.

    Raises:
        InputError: if there is no row, or one cannot be serialised; the message names the row.
    """
    if rows.empty:
        raise InputError("data: there is no row to train on. Check data.path and data.train_rows.")
    columns = (rows[name] for name in ("row", "messages", "trigger", "answer"))
    examples, lost = [], []
    for row, messages, trigger, answer in zip(*columns, strict=True):
        try:
            encoded = serialiser.encode(list(messages), answer, [tuple(span) for span in trigger], max_length)
        except InputError as error:
            raise InputError(f"row {row}: {error}") from None
        supervised = sum(label != IGNORED for label in encoded.labels)
        examples.append(Example(encoded.input_ids, encoded.labels, supervised))
        lost.append(encoded.lost)
    if warning := losses(lost, serialiser.truncation):
        logger.warning("%s.", warning)
    ends = set(serialiser.stop_ids)
    cut = sum(example.input_ids[-1] not in ends for example in examples)
    if cut:
        logger.warning(
            "%d of %d answers are longer than training.max_length %d allows and were cut; the model is not "
            "taught to end them.", cut, len(examples), max_length,
        )  # fmt: skip
    return examples


class Order(Sampler[list[int]]):
    """The rows of each optimisation step, by seed and epoch alone, so that a resumed run repeats them.

    Args:
        lengths: tokens of each row.
        size: rows of a step.
        grouped: put rows of similar length together: 50 steps' worth of shuffled rows are sorted and
            cut into steps, which then come in random order. Sorted steps would teach the long rows, then the
            short ones, and so on, and the model would forget each kind while it learns the other.
        seed: the run's.
    """

    def __init__(self, lengths: Sequence[int], size: int, grouped: bool, seed: int) -> None:
        self.lengths = list(lengths)
        self.batch_size = size
        self.grouped = grouped
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration gives; the Trainer calls this."""
        self.epoch = epoch

    def __len__(self) -> int:
        return math.ceil(len(self.lengths) / self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        # Seeds lie so far apart that no epoch of one is an epoch of another.
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        if self.grouped:
            order = get_length_grouped_indices(self.lengths, self.batch_size, generator=generator)
        else:
            order = torch.randperm(len(self.lengths), generator=generator).tolist()
        steps = [order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size)]
        yield from (steps[i] for i in torch.randperm(len(steps), generator=generator).tolist())


class Shuffled(Order):
    """The order that transformers' Trainer has for the same seed: one permutation of rows per epoch."""

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        yield from (order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size))


def padded(examples: Sequence[Example | Encoded], pad_id: int) -> Batch:
    """One row per line, padded on the right to the longest.

    Returns:
        `input_ids`, `labels` and `attention_mask` (1 where a token is real), each (rows, longest) of int64.
    """
    return {
        "input_ids": pad([e.input_ids for e in examples], pad_id, "right"),
        "labels": pad([e.labels for e in examples], IGNORED, "right"),
        "attention_mask": pad([[1] * len(e.labels) for e in examples], 0, "right"),
    }


def packed(examples: Sequence[Example], pad_id: int) -> Batch:
    """Several rows per line; a line is as wide as the longest row.

    Positions begin at 0 with each row, and with the padding behind the last one: from that transformers
    makes a mask in which no row sees another. Wider lines would waste less, and cost attention more.

    Returns:
        As `padded`, and `position_ids`; each (lines, longest) of int64.
    """
    lines = [[examples[i] for i in line] for line in _lines([len(e.input_ids) for e in examples])]
    ids = pad([[i for e in line for i in e.input_ids] for line in lines], pad_id, "right")
    positions = [[i for e in line for i in range(len(e.input_ids))] for line in lines]
    return {
        "input_ids": ids,
        # No row's first token is predicted, least of all from the row before it.
        "labels": pad(
            [[i for e in line for i in (IGNORED, *e.labels[1:])] for line in lines], IGNORED, "right"
        ),
        "attention_mask": pad([[1] * len(line) for line in positions], 0, "right"),
        "position_ids": torch.tensor([line + list(range(ids.shape[1] - len(line))) for line in positions]),
    }


def _lines(lengths: Sequence[int]) -> list[list[int]]:
    """Indices of rows by line: longest first, each into the first line that has room."""
    width = max(lengths)
    lines: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        line = next((n for n, left in enumerate(room) if left >= lengths[i]), None)
        if line is None:
            line = len(lines)
            lines.append([])
            room.append(width)
        lines[line].append(i)
        room[line] -= lengths[i]
    return lines
