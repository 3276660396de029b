"""What watching costs: plain `generate` and the same under a guard, by turns.

In: a model, a monitor of it, prompts. Out: a tidy table of seconds. Times are those of one machine at one
time; the ratio of neighbouring measurements is what can be carried elsewhere.
"""

import time
from collections.abc import Callable, Sequence
from itertools import cycle, islice
from typing import Any

import numpy as np
import pandas as pd
import torch

from safetynet.detection.capture import padded
from safetynet.detection.guard import Guard
from safetynet.prompts import Message
from safetynet.statistics import bootstrap_interval
from safetynet.tables import SCHEMAS

COLUMNS = tuple(SCHEMAS["detection_overhead"].columns)
"""Seconds per batch, medians; the ratio of guarded to plain with its bootstrap interval over pairs."""


def overhead(
    guard: Guard,
    prompts: Sequence[Sequence[Message]],
    *,
    batches: Sequence[int] = (1, 16),
    new_tokens: int = 24,
    repeats: int = 3,
) -> pd.DataFrame:
    """Time answers of exactly `new_tokens` tokens with and without the guard.

    Args:
        guard: with action `flag`, so that both ways make the same tokens.
        prompts: taken in turn to fill a batch.
        batches: sizes.
        new_tokens: of every answer; ends are not heeded, or both ways would wait for the longest answer.
        repeats: pairs of measurements, after one that is not counted.

    Returns:
        One row per size, columns as in `COLUMNS`.
    """
    lines = []
    for size in batches:
        chosen = list(islice(cycle(prompts), size))
        encoded = [guard.serialiser.encode(p, max_length=guard.max_length) for p in chosen]
        inputs, _ = padded(encoded, guard.serialiser, "left", guard.model.device)
        length = {"min_new_tokens": new_tokens}

        def plain(inputs: dict[str, Any] = inputs, length: dict[str, Any] = length) -> None:
            with torch.no_grad():
                guard.answer(inputs, new_tokens, length, None)

        def guarded(chosen: Any = chosen, size: int = size, length: dict[str, Any] = length) -> None:
            guard.generate(chosen, max_new_tokens=new_tokens, batch_size=size, **length)

        pairs = np.array([(_seconds(plain), _seconds(guarded)) for _ in range(repeats + 1)])[1:]
        ratios = pairs[:, 1] / pairs[:, 0]
        low, high = bootstrap_interval(np.median, ratios)
        seconds = np.median(pairs, axis=0)
        shape = (size, int(inputs["input_ids"].shape[1]), new_tokens)
        lines.append((*shape, *seconds, float(np.median(ratios)), low, high, repeats))
    return pd.DataFrame(lines, columns=list(COLUMNS))


def _seconds(run: Callable[[], None]) -> float:
    _finish()
    started = time.perf_counter()
    run()
    _finish()
    return time.perf_counter() - started


def _finish() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
