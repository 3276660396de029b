"""What a piece of work costs: seconds, and the most memory that was in use while it ran."""

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from safetynet.run import peak_memory_mb

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass
class Cost:
    """Filled in when the work ends."""

    seconds: float = float("nan")
    memory_mb: float = float("nan")
    """Most that the GPU's allocator held, or the process's largest resident size while it worked."""


@contextmanager
def measured() -> Iterator[Cost]:
    """Measure the body. Where a system cannot count anew, memory is the largest since the process began."""
    import torch

    cost = Cost()
    on_gpu = torch.cuda.is_available()
    anew = _count_anew()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    yield cost
    cost.seconds = time.perf_counter() - started
    cost.memory_mb = torch.cuda.max_memory_allocated() / 2**20 if on_gpu else _peak(anew)


def _count_anew() -> bool:
    """Set Linux's record of the largest resident size back to the present one."""
    try:
        _RESET.write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def _peak(anew: bool) -> float:
    found = re.search(r"VmHWM:\s+(\d+) kB", _STATUS.read_text(encoding="ascii")) if anew else None
    return int(found[1]) / 1024 if found else peak_memory_mb()
