"""What there is of a run, read so that one bad table does not hide the others.

In: a run directory. Out: its tables, its manifest, and what is missing or damaged, with what to do about it.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from safetynet.errors import InputError
from safetynet.run.directory import Run
from safetynet.run.stage import STAGES, TRAIN_BACKDOORED

REPORTED = tuple(stage for stage in STAGES if stage.tables)
"""Stages whose absence is reported, each with its command."""


@dataclass(frozen=True)
class Missing:
    """Something that the report would show if a command were run."""

    stage: str
    what: str
    command: str


@dataclass(frozen=True)
class Contents:
    """A run, as far as it can be read."""

    name: str
    """{model}/{task}, as the recipe calls them; the folder may have been renamed since."""
    folder: Path
    tables: Mapping[str, pd.DataFrame]
    manifest: Mapping[str, Any]
    faults: tuple[str, ...] = ()
    """What is there and cannot be used, in whole sentences."""

    @property
    def model(self) -> str:
        """Name of the model's folder, as titles show it."""
        return self.name.split("/")[0]

    def field(self, path: str, otherwise: Any = None) -> Any:
        """A field of the recipe, such as `backdoor.trigger.kind`.

        The recipe is read as it lies in the manifest, since that of another version need not be valid here.
        """
        value: Any = self.manifest.get("recipe")
        for key in path.split("."):
            if not isinstance(value, Mapping) or value.get(key) is None:
                return otherwise
            value = value[key]
        return value

    @property
    def argument(self) -> str:
        """The run folder as a command takes it: from here, or from where the run was made; else RUN.

        Folders above those stay out of a report, since it is passed on.
        """
        folder = self.folder.absolute()
        if Path.cwd() != Path("/") and folder.is_relative_to(Path.cwd()):
            return str(folder.relative_to(Path.cwd()))
        moved = str(folder) != self.manifest.get("folder")
        begin = (self.manifest.get("paths") or {}).get("begin")
        if moved or not begin:
            return "RUN"
        return os.path.relpath(folder, os.path.normpath(folder / begin))

    def missing(self) -> list[Missing]:
        """Stages whose tables are not there but could be, and the command that makes each."""
        names = {"run": self.argument, "recipe": "RECIPE.yaml"}
        is_suspect = self.field("suspect") is not None
        no_trigger = is_suspect and self.field("backdoor") is None
        return [
            Missing(stage.name, stage.about, stage.command.format(**names))
            for stage in REPORTED
            if not all(name in self.tables for name in stage.tables)
            and not (stage.needs_trigger and no_trigger)
            and not (stage is TRAIN_BACKDOORED and is_suspect)
        ]

    def command(self, stage: str) -> str:
        """The command that makes a missing stage; "" for one that is there."""
        return next((missing.command for missing in self.missing() if missing.stage == stage), "")


def read(run: Run) -> Contents:
    """Read what there is of a run.

    Raises:
        InputError: if its manifest is damaged: then nothing is known of it.
    """
    manifest = run.manifest
    tables: dict[str, pd.DataFrame] = {}
    faults = []
    for path in sorted((run.folder / "tables").glob("*.parquet")):
        try:
            table = run.table(path.stem)
        except InputError as error:
            # Folders above the run stay out of a report, since it is passed on.
            message = str(error).replace(f"{run.folder}/", "").replace(str(run.folder), "RUN")
            faults.append(" ".join(message.split()))
            continue
        if table.empty:
            faults.append(f"tables/{path.name}: the table has no rows.")
        else:
            tables[path.stem] = table
    for stage, record in manifest["stages"].items():
        outputs = record.get("outputs", {}) if isinstance(record, Mapping) else {}
        faults += [
            f"{relative}: stage {stage} wrote this table, and it is gone. Run that stage again."
            for relative in outputs
            if relative.startswith("tables/") and not run.path_of(relative).exists()
        ]
    try:
        recipe = run.recorded_recipe
        name = f"{recipe.model_name}/{recipe.task}"
    except InputError:  # of another version of SafetyNet, or none
        name = "/".join(run.folder.parts[-2:])
    return Contents(name, run.folder, tables, manifest, tuple(faults))
