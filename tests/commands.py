"""Commands as a user gives them: each in a process of its own, forked where the libraries are loaded already.

A fresh interpreter takes three seconds to import torch and transformers, which hundreds of commands would
each wait for. A test of what a fresh interpreter does, or of variables that libraries read when they are
imported, starts one itself.
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


def safetynet(*words: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run `safetynet` with these words in a folder; exit code and what it printed."""
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder) / "out", Path(folder) / "err"
        process = _FORKS.Process(target=_run, args=(list(map(str, words)), cwd, out, err, dict(os.environ)))
        process.start()
        process.join()
        assert process.exitcode is not None
        printed = [path.read_text(encoding="utf-8") if path.exists() else "" for path in (out, err)]
    return subprocess.CompletedProcess(words, process.exitcode, *printed)


def _run(words: list[str], cwd: Path, out: Path, err: Path, env: dict[str, str]) -> None:
    from safetynet.cli.app import main

    for path, number in ((out, 1), (err, 2)):
        with path.open("w", encoding="utf-8") as file:
            os.dup2(file.fileno(), number)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env | {"COLUMNS": "100"})
    sys.argv = ["safetynet", *words]
    main()
