"""Messages of a run: on the terminal, and with their time in the run's log file; how far a stage has come."""

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from safetynet.run import parallel

log = logging.getLogger("safetynet")
EVERY_S = 30.0
"""Seconds between two lines of a `ProgressLog`; what ends before the first has none."""


class logging_to:  # noqa: N801 - reads as a function
    """Messages go to the terminal and, with their time, to a log file, if there is to be one."""

    def __init__(self, path: Path | None) -> None:
        file: logging.Handler = logging.NullHandler() if path is None else _LogFile(path, delay=True)
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        self.handlers = [logging.StreamHandler(), file]

    def __enter__(self) -> None:
        log.setLevel(logging.INFO)
        for handler in self.handlers:
            # Of several processes that work on one run, the first one speaks for all.
            handler.addFilter(lambda _: parallel.is_first())
            log.addHandler(handler)
        logging.getLogger("py.warnings").addHandler(self.handlers[1])

    def __exit__(self, *_: object) -> None:
        for handler in self.handlers:
            log.removeHandler(handler)
            logging.getLogger("py.warnings").removeHandler(handler)
            handler.close()


class _LogFile(logging.FileHandler):
    """A log file that stops nothing: where it cannot be written, the terminal says so once."""

    lost = False

    def emit(self, record: logging.LogRecord) -> None:
        if self.lost:
            return
        try:
            if self.stream is None:
                # A run may be opened from another folder than it was made in, or after its logs were cleared.
                Path(self.baseFilename).parent.mkdir(parents=True, exist_ok=True)
            super().emit(record)
        except OSError as error:
            self._lose(error)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - the name is logging's
        error = sys.exc_info()[1]
        if isinstance(error, OSError):
            self._lose(error)
        else:
            super().handleError(record)

    def _lose(self, error: OSError) -> None:
        self.lost = True
        with suppress(OSError):  # what could not be written is tried again when a file is closed
            self.close()
        log.warning("The log %s cannot be written (%s): it is left out.", self.baseFilename, error.strerror)


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
