"""SafetyNet: plant, dissect, detect and remove backdoors in open-weight language models.

The names of `__all__` are what docs/python.md explains. Each is imported when it is first asked for, so that
`import safetynet` takes no time and a name only what it needs.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from safetynet.detection.guard import Guard
    from safetynet.detection.monitor import Monitor
    from safetynet.engine.patching import patch
    from safetynet.engine.trace import trace
    from safetynet.experiment import Experiment
    from safetynet.models.named import load_model
    from safetynet.recipe.loading import load as load_recipe
    from safetynet.scan.stage import scan
    from safetynet.stages import evaluate, plant

__version__ = "0.1.0"
__all__ = [
    "Experiment", "Guard", "Monitor", "evaluate", "load_model", "load_recipe", "patch", "plant", "scan",
    "trace",
]  # fmt: skip
_PLACES = {
    "Experiment": "experiment.Experiment",
    "Guard": "detection.guard.Guard",
    "Monitor": "detection.monitor.Monitor",
    "evaluate": "stages.evaluate",
    "load_model": "models.named.load_model",
    "load_recipe": "recipe.load",
    "patch": "engine.patching.patch",
    "plant": "stages.plant",
    "trace": "engine.trace.trace",
}
"""Where each name lies; `scan` is the package of that name, which can be called."""


def __getattr__(name: str) -> Any:
    if name == "scan":
        return import_module("safetynet.scan")
    if name not in _PLACES:
        raise AttributeError(f"module 'safetynet' has no attribute {name!r}")
    place, _, attribute = _PLACES[name].rpartition(".")
    value = getattr(import_module(f"safetynet.{place}"), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
