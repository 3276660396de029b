"""What a run was made with: versions of packages, and the machine. For the manifest."""

import os
import platform
from importlib import metadata
from typing import Any

PACKAGES = (
    "safetynet",
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "tokenizers",
    "datasets",
    "lm_eval",
    "numpy",
    "pandas",
)


def versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that decide about results; None for what is not installed."""
    result: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            result[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            result[package] = None
    return result


def hardware() -> dict[str, Any]:
    """The machine: its kind, cores, torch's threads, and the names of its GPUs."""
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": gpus,
    }
