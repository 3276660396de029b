"""How much memory there is, and what a model needs before it is loaded."""

from pathlib import Path

import psutil

from safetynet.errors import InputError

CGROUPS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
"""Where Linux says what a container or a job may use, in versions 2 and 1."""


def available() -> int:
    """Bytes of memory that this process can still take, of the machine's and of its job's."""
    free = int(psutil.virtual_memory().available)
    for path in CGROUPS:
        try:
            limit = int(path.read_text())  # "max" where there is none
        except (OSError, ValueError):
            continue
        free = min(free, max(limit - psutil.Process().memory_info().rss, 0))
    return free


def check(what: str, needed: int, purpose: str) -> None:
    """Refuse work that cannot fit.

    Args:
        what: begins the sentence.
        needed: bytes.
        purpose: ends it.

    Raises:
        InputError: naming how much is needed and how much there is.
    """
    if needed > (free := available()):
        raise InputError(
            f"{what} needs {needed / 2**30:.1f} GB of memory {purpose}, and {free / 2**30:.1f} GB are free "
            "here. Use a machine with more, or a smaller model."
        )
