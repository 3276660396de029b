"""What stands in front of a model that is repaired while it answers: its `generate` alone is another."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from safetynet.errors import InputError
from safetynet.mitigation.method import Knobs, Repaired


class Front:
    """A model with another `generate`; everything else is the model's own."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own forward pass."""
        return self.model(*args, **kwargs)


@dataclass(frozen=True)
class Asked:
    """What a call of `generate` asks for."""

    ids: Tensor
    """(rows, T), padded on the left."""
    mask: Tensor
    most: int
    """New tokens."""
    stops: list[int]
    pad: int

    @classmethod
    def of(cls, method: str, input_ids: Tensor, attention_mask: Tensor | None, settings: Any) -> "Asked":
        """Read the arguments of transformers' `generate`.

        Args:
            method: for messages.
            input_ids: (rows, T).
            attention_mask: (rows, T), or None where nothing is padded.
            settings: a generation configuration, with `max_new_tokens` and ids of stop tokens and padding.

        Raises:
            InputError: for sampling or beams, which these methods do not define.
        """
        if settings.do_sample or (settings.num_beams or 1) > 1:
            raise InputError(f"{method}: it answers greedily. Set do_sample to False and num_beams to 1.")
        if settings.max_new_tokens is None or settings.eos_token_id is None:
            raise InputError(f"{method}: generate needs max_new_tokens and eos_token_id.")
        stops = settings.eos_token_id
        stops = [stops] if isinstance(stops, int) else list(stops)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        pad = stops[0] if settings.pad_token_id is None else settings.pad_token_id
        return cls(input_ids, mask, settings.max_new_tokens, stops, pad)

    def take(self, rows: Tensor) -> "Asked":
        """Some of the rows, without columns that all of them pad."""
        first = int(self.mask[rows].any(0).long().argmax())
        ids, mask = self.ids[rows, first:], self.mask[rows, first:]
        return replace(self, ids=ids, mask=mask)

    def finished(self, answers: list[list[int]]) -> Tensor:
        """(rows, T + longest answer): prompts and answers, padded as `generate` does."""
        width = max(map(len, answers))
        rows = [answer + [self.pad] * (width - len(answer)) for answer in answers]
        return torch.cat([self.ids, torch.tensor(rows, dtype=self.ids.dtype, device=self.ids.device)], 1)


def at_run_time(method: str, knobs: Knobs, front: Front, **details: Any) -> Repaired:
    """A repair that changes `generate` alone."""
    return Repaired(method, knobs, "run_time", partial(_opened, front), forward_too=False, details=details)


@contextmanager
def _opened(front: Front) -> Iterator[Front]:
    front.model.eval()
    yield front
