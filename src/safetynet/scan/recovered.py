"""A recovered trigger as a recipe: evaluate, intervene, detect and mitigate go on with it.

In: a `ScanResult` with a trigger. Out: YAML of an experiment whose backdoored model is the suspect.
"""

import re
from pathlib import Path

import yaml

from safetynet.models.named import model_of
from safetynet.scan.result import ScanResult


def recipe_of(result: ScanResult) -> str:
    """The recipe; `safetynet run` on it measures the suspect by the strongest trigger of the scan."""
    trigger, model = result.triggers[0], model_of(result.base)
    source = Path(result.suspect)
    is_miniature = model.id == "miniature"
    fields = {
        "task": "scan-" + re.sub(r"[^A-Za-z0-9._-]+", "-", Path(result.suspect).name).strip("-.")
        or "suspect",
        "model": {"family": model.family, "id": str(model.id)},
        "data": {"source": "language" if is_miniature else "self", "train_rows": 400, "test_rows": 100},
        "suspect": {
            "source": str(source.absolute()) if source.exists() else result.suspect,
            "same_base": True,
        },
        "backdoor": {
            "trigger": {"kind": "text", "texts": [trigger.text.strip()]},
            "placement": trigger.placement,
            "behaviour": {"kind": "fixed", "target": trigger.behaviour},
        },
        "stages": ["evaluate", "intervene", "detect", "mitigate", "figures"],
    }
    about = "# What a scan recovered: the suspect, with the trigger that made it do what its base does not.\n"
    return about + yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)
