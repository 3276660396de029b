"""Messages of a run: on the terminal, and with their time in the run's log file."""

import logging
import sys
from contextlib import suppress
from pathlib import Path

from safetynet.run import parallel

log = logging.getLogger("safetynet")


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
