"""Finished batches of something long, on disk: what was interrupted takes them up and computes none twice.

In: batches whose order and make-up depend on nothing that was done before. Out: their results, to the last
bit as they were computed. Writes below one folder, whose name says what decides about the results; whoever
gives the folder removes it. Each process keeps the batches that it computed.
"""

import json
import logging
import time
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np

from safetynet.run.directory import write_file

EVERY_S = 2.0
"""Seconds of work that are written at a time: what takes less in all leaves no file."""
Result = TypeVar("Result")

log = logging.getLogger(__name__)


class Finished(Generic[Result]):
    """Results by the number of their batch.

    Args:
        folder: of the results; None keeps none.
        write: a result to a file.
        read: a result from a file; the errors of damaged files are ValueError, OSError and BadZipFile.
    """

    def __init__(
        self, folder: Path | None, write: Callable[[Result, Path], object], read: Callable[[Path], Result]
    ) -> None:
        self.folder, self._write, self._read = folder, write, read
        self.count = 0 if folder is None or not folder.exists() else len([*folder.glob("[0-9]*")])
        """How many there were to begin with."""
        self._pending: dict[Path, Result] = {}
        self._written = time.monotonic()

    @classmethod
    def as_json(cls, folder: Path | None) -> "Finished[Any]":
        """Of lists, texts and numbers."""
        return Finished(
            folder,
            lambda result, path: path.write_text(json.dumps(result), encoding="utf-8"),
            lambda path: json.loads(path.read_text(encoding="utf-8")),
        )

    @classmethod
    def as_arrays(cls, folder: Path | None) -> "Finished[dict[str, np.ndarray]]":
        """Of arrays by name."""

        def write(arrays: dict[str, np.ndarray], path: Path) -> None:
            with path.open("wb") as handle:  # by its name, numpy would give it another ending
                np.savez(handle, **arrays)  # type: ignore[arg-type]  # of an option of its own

        def read(path: Path) -> dict[str, np.ndarray]:
            with np.load(path) as file:
                return {name: file[name] for name in file.files}

        return Finished(folder, write, read)

    def result(self, number: int, compute: Callable[[], Result]) -> Result:
        """What was kept of a batch; or else what `compute` gives, which is kept."""
        if self.folder is None:
            return compute()
        path = self.folder / f"{number:06d}"
        if path.exists():
            try:
                return self._read(path)
            except (ValueError, OSError, zipfile.BadZipFile) as error:
                log.warning("%s: is damaged (%s) and is made anew.", path, error)
        result = self._pending[path] = compute()
        if time.monotonic() - self._written >= EVERY_S:
            for pending, value in self._pending.items():
                write_file(pending, partial(self._write, value))
            self._pending.clear()
            self._written = time.monotonic()
        return result
