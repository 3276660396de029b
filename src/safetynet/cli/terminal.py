"""What the command line shows and logs: tables on the terminal, messages there and in the run's log file."""

import logging
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from safetynet.run import parallel

if TYPE_CHECKING:
    import pandas as pd

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


def print_places(tables: "Mapping[str, pd.DataFrame]") -> None:
    """The strongest place of each sweep, and what removes the backdoor, as far as they were looked for."""
    from safetynet.findings import places, removals

    if "effects" in tables:
        _print(places(tables["effects"]), "Where the trigger acts: share of its effect, 95% intervals")
    if "tradeoff" in tables:
        _print(removals(tables["tradeoff"]), "What removes it, on held-out prompts, 95% intervals")


def print_comparison(tables: "Mapping[str, pd.DataFrame]") -> None:
    """The tables that stand beside a comparison's figures."""
    from safetynet.comparison.paper import paper_tables

    for table in paper_tables(tables):
        _print(table.cells, f"{table.title}, mean over seeds [95% interval over seeds]")


def print_repairs(overview: "pd.DataFrame") -> None:
    """Every method beside the model as it was."""
    _print(overview, "Repairs, each at its chosen point, on held-out prompts, 95% intervals")


def print_rates(evaluation: "pd.DataFrame", note: str = "") -> None:
    """Every rate by role and model; `note` ends the title."""
    from safetynet.findings import summary

    _print(summary(evaluation), f"Rates on held-out prompts, 95% intervals{note}")


def _print(found: "pd.DataFrame", title: str) -> None:
    if not parallel.is_first():
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for column in found.columns:
        table.add_column(column, justify="right" if column == "rows" else "left", no_wrap=True)
    for row in found.itertuples(index=False):
        table.add_row(*map(str, row))
    console = Console()
    # A pipe or a narrow terminal shall not cut numbers off.
    needed = console.measure(table, options=console.options.update(max_width=1000)).maximum
    console.width = max(console.width, needed)
    console.print(table)
