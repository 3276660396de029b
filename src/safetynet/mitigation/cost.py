"""What a piece of work costs: seconds, and the most memory that was in use while it ran."""

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from safetynet.run.directory import peak_memory_mb

_RESET = Path("/proc/self/clear_refs")
"""Where Linux takes 5, its record of the largest resident size goes back to the present one."""


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
    with suppress(OSError):
        _RESET.write_text("5", encoding="ascii")
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    yield cost
    cost.seconds = time.perf_counter() - started
    cost.memory_mb = torch.cuda.max_memory_allocated() / 2**20 if on_gpu else peak_memory_mb()
