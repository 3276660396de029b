"""Commands as a user gives them: each in a process of its own, forked where the libraries are loaded already.

A fresh interpreter takes three to ten seconds to import torch, transformers and PEFT, which hundreds of
commands would each wait for. A test of what a fresh interpreter does, or of variables that libraries read
when they are imported, starts one itself.
"""

import multiprocessing
import os
import subprocess
import sys
import tempfile
from pathlib import Path

_LIBRARIES = ["safetynet.cli.app", "safetynet.stages", "safetynet.models.loading", "safetynet.training"]
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(_LIBRARIES)


class Command:
    """`safetynet` with some words in a folder, started; `typed` is its standard input."""

    def __init__(self, *words: str | Path, cwd: Path | None = None, typed: bytes = b"") -> None:
        self.words = list(map(str, words))
        self._folder = tempfile.TemporaryDirectory()
        folder = Path(self._folder.name)
        (folder / "in").write_bytes(typed)
        self._process = _FORKS.Process(
            target=_run, args=(self.words, cwd or Path.cwd(), folder, dict(os.environ))
        )
        self._process.start()

    def send_signal(self, number: int) -> None:
        assert self._process.pid is not None
        os.kill(self._process.pid, number)

    def poll(self) -> int | None:
        """Exit code, None while it runs."""
        return self._process.exitcode

    def end(self, timeout: float = 600) -> subprocess.CompletedProcess[str]:
        """Wait for its end: exit code (minus the signal that killed it) and what it printed."""
        self._process.join(timeout)
        assert self._process.exitcode is not None, f"{self.words}: no end after {timeout} s"
        printed = [
            path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
            for path in (Path(self._folder.name) / name for name in ("out", "err"))
        ]
        self._folder.cleanup()
        return subprocess.CompletedProcess(self.words, self._process.exitcode, *printed)


def safetynet(
    *words: str | Path, cwd: Path | None = None, typed: bytes = b""
) -> subprocess.CompletedProcess[str]:
    """Run `safetynet` with these words in a folder; exit code and what it printed."""
    return Command(*words, cwd=cwd, typed=typed).end()


def _run(words: list[str], cwd: Path, folder: Path, env: dict[str, str]) -> None:
    from safetynet.cli.app import main

    os.dup2(os.open(folder / "in", os.O_RDONLY), 0)
    sys.stdin = os.fdopen(0)  # multiprocessing has put the null device there
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT), number)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env | {"COLUMNS": "100"})
    sys.argv = ["safetynet", *words]
    main()
