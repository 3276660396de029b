"""A scan's folder: one file for each format, and the recipe by which the other stages go on."""

import re
from collections.abc import Sequence
from pathlib import Path

import yaml

from safetynet.errors import InputError
from safetynet.models.named import model_of
from safetynet.scan.outputs import Format, render
from safetynet.scan.result import ScanResult

FILES: dict[Format, str] = {
    "text": "scan.txt", "json": "scan.json", "sarif": "scan.sarif", "cyclonedx": "scan.cdx.json",
    "card": "card.md", "html": "scan.html",
}  # fmt: skip
RECIPE = "recipe.yaml"


def prepare(folder: Path, suspects: Sequence[str]) -> None:
    """Make a scan's folder, without what an earlier scan has said there.

    Raises:
        InputError: if it cannot be made, or lies in a suspect.
    """
    for suspect in suspects:
        if Path(suspect).is_dir() and folder.resolve().is_relative_to(Path(suspect).resolve()):
            raise InputError(f"--out {folder}: it lies in the suspect's own folder. Name another one.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in (*FILES.values(), RECIPE):
            (folder / name).unlink(missing_ok=True)
    except OSError as error:
        raise InputError(
            f"--out {folder}: it cannot be written ({error.strerror}). Name another one."
        ) from None


def save(result: ScanResult, folder: Path) -> None:
    """Write every format, and the recipe where a string was recovered.

    Raises:
        RunError: if the disk is full or refuses a file.
    """
    from safetynet.run.directory import write_text

    for form, name in FILES.items():
        write_text(folder / name, render(result, form))
    if result.triggers and result.exit_code == 1:
        write_text(folder / RECIPE, recipe_of(result))


def recipe_of(result: ScanResult) -> str:
    """A recovered trigger as YAML of an experiment whose backdoored model is the suspect.

    `safetynet run` on it measures the suspect by the strongest trigger of the scan.
    """
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
