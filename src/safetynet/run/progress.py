"""How far something long has come: a line at least once a minute, for those who follow a log, not a bar."""

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

log = logging.getLogger("safetynet")
EVERY_S = 30.0
"""Seconds between two lines; what ends before the first has none."""


class ProgressLog:
    """Logs steps, numbers and the time that is left, now and then."""

    def __init__(self, name: str, total: int, done: int = 0) -> None:
        """Begin to measure time.

        Args:
            name: of what is done, such as `train backdoored`; begins each line.
            total: steps in all.
            done: steps that are done already.
        """
        self.name, self.total = name, total
        self._first_step, self._began = done, time.monotonic()
        self._last_line = self._began

    def update(self, done: int, note: str = "") -> None:
        """Log where it stands if the last line is old enough.

        Args:
            done: steps so far.
            note: numbers of this moment, such as a loss.
        """
        now = time.monotonic()
        if now - self._last_line < EVERY_S or done >= self.total or done <= self._first_step:
            return
        self._last_line = now
        left = (now - self._began) / (done - self._first_step) * (self.total - done)
        remaining = f"{left:.0f} s" if left < 120 else f"{left / 60:.0f} min"
        log.info(
            "%s: %d of %d%s, %s left", self.name, done, self.total, f", {note}" if note else "", remaining
        )


@contextmanager
def bars_on_terminals_only(*unasking: Any) -> Iterator[None]:
    """Keep transformers' loading bars out of pipes and logs, and leave its own settings as they were.

    Args:
        unasking: modules of transformers whose bars, by the name of tqdm, heed no setting.
    """
    from transformers.utils import logging as bars

    if sys.stderr.isatty():
        yield
        return
    were_enabled, originals = bars.is_progress_bar_enabled(), [module.tqdm for module in unasking]
    bars.disable_progress_bar()
    for module in unasking:
        module.tqdm = partial(module.tqdm, disable=True)
    try:
        yield
    finally:
        for module, bar in zip(unasking, originals, strict=True):
            module.tqdm = bar
        if were_enabled:
            bars.enable_progress_bar()
