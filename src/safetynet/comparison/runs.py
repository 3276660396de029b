"""Which runs are compared, which of them are seeds of one setting, and whether they may be compared at all.

In: runs' recipes, versions and tables. Out: one `ComparedRun` per run with the name of its group, a table of
the runs, and sentences about what is missing or mixed. Reads no file and computes no result.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from safetynet import families
from safetynet.backdoors import triggers
from safetynet.errors import InputError
from safetynet.recipe import Recipe, loading, presets

IGNORED = (
    "name", "task", "seed", "tracking", "output", "model.device", "model.date", "data.test_rows",
    "evaluation.batch_size", "evaluation.every", "evaluation.dynamics_rows", "evaluation.labelled",
    "evaluation.samples", "evaluation.utility", "persistence",
    "training.log_every", "training.checkpoint_every", "training.checkpoint_minutes",
    "training.gradient_checkpointing", "training.clean_twin", "backdoor.preset",
)  # fmt: skip
"""Fields of a recipe that change neither what is planted nor what a number means."""
MAKERS = {
    "dynamics_backdoored": "safetynet run or train with its recipe and --set evaluation.dynamics_rows=40",
    "rows": "safetynet train with its recipe",
    "evaluation": "safetynet evaluate {folder}",
    "effects": "safetynet intervene {folder}",
    "tradeoff": "safetynet intervene {folder}",
    "detection": "safetynet detect {folder}",
    "mitigation": "safetynet mitigate {folder}",
}
"""Tables that are compared, and the command that makes each."""
COMPARED = (*MAKERS, "dynamics_clean_twin")
"""Every table of a run that a comparison is made of."""
RUN = ("group", "run", "seed")
"""Columns that name a run."""


@dataclass(frozen=True)
class ComparedRun:
    """One run, as far as it went."""

    name: str
    """Tells it from the others."""
    folder: str
    recipe: Recipe
    versions: Mapping[str, str]
    tables: Mapping[str, pd.DataFrame]
    group: str = ""
    """Runs of one group differ in their seed alone."""

    @property
    def about(self) -> dict[str, Any]:
        """The columns `RUN`."""
        return {"group": self.group, "run": self.name, "seed": self.recipe.seed}

    def has(self, table: str) -> bool:
        """Whether the run has a table."""
        return table in self.tables


def check(runs: Sequence[ComparedRun]) -> None:
    """Refuse what must not stand side by side.

    Raises:
        InputError: if there are no two runs, a table has no rows, or the runs are of
            several versions of SafetyNet.
    """
    if len(runs) < 2:
        raise InputError(f"compare: {len(runs)} run is given; a comparison needs two or more.")
    for run in runs:
        for name, table in run.tables.items():
            is_dynamics = name.startswith("dynamics")
            if table.empty:
                fault = "has no rows"
            elif is_dynamics and not ((table["metric"] == "asr") & table["value"].notna()).any():
                fault = "has no attack success rate"
            else:
                continue
            raise InputError(
                f"{run.folder}/tables/{name}.parquet: the table is damaged or of another version (it "
                f"{fault}). Delete it and make it again: {maker(name, run)}."
            )
    versions: dict[str, ComparedRun] = {}
    for run in runs:
        versions.setdefault(run.versions.get("safetynet", "unknown"), run)
    if len(versions) > 1:
        listed = "; ".join(f"{run.folder} by {version}" for version, run in versions.items())
        raise InputError(
            f"compare: the runs were made by different versions of SafetyNet ({listed}), whose numbers may "
            "mean different things. Make the older ones again with safetynet run."
        )


def grouped(runs: Sequence[ComparedRun]) -> list[ComparedRun]:
    """The same runs with their groups' names, seeds of one group beside each other.

    A name is the family and whatever else tells the group from another one of its family.

    Raises:
        InputError: if two runs have the same settings and the same seed: they are one measurement, not two.
    """
    settings = [_settings(run.recipe) for run in runs]
    keys = [tuple(map(str, setting.values())) for setting in settings]
    by_setting: dict[tuple[object, ...], ComparedRun] = {}
    for run, key in zip(runs, keys, strict=True):
        measurement = (key, run.recipe.seed)
        if measurement in by_setting:
            raise InputError(
                f"compare: {by_setting[measurement].folder} and {run.folder} have the same settings and the "
                f"same seed ({run.recipe.seed}), so that they are one measurement. Leave one of them out."
            )
        by_setting[measurement] = run

    # Fields in which groups of one family differ: what the family brings along is in its name.
    groups = dict(zip(keys, settings, strict=True))
    varied = []
    for field in dict.fromkeys(field for setting in groups.values() for field in setting):
        by_family: dict[str, set[str]] = {}
        for setting in groups.values():
            by_family.setdefault(str(setting["model.family"]), set()).add(str(setting.get(field)))
        if any(len(values) > 1 for values in by_family.values()):
            varied.append(field)
    # A trigger's or behaviour's texts are told by its name, unless only the texts differ.
    short = [f for f in varied if not any(f.startswith(f"{other}.") for other in varied)]

    names: dict[tuple[str, ...], str] = {}
    for key, setting in groups.items():
        words = [str(setting["model.family"])]
        for field in short:
            value = setting.get(field)
            text = " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
            if field == "backdoor.behaviour":
                text = text.replace("_", " ")
            elif field not in ("backdoor.trigger", "model.id"):
                text = f"{field.rpartition('.')[2].replace('_', ' ')} {text}"
            words.append(text)
        name = ", ".join(words)
        names[key] = name if name not in names.values() else f"{name} ({len(names) + 1})"

    named = [replace(run, group=names[key]) for run, key in zip(runs, keys, strict=True)]
    order = list(dict.fromkeys(run.group for run in named))
    return sorted(named, key=lambda run: (order.index(run.group), run.recipe.seed))


def overview(runs: Sequence[ComparedRun]) -> pd.DataFrame:
    """One line per run: what was planted, how, under which seed, and which tables it has."""
    lines = []
    for run in runs:
        setting = _settings(run.recipe)
        keys = ("trigger", "placement", "behaviour", "poison_rate", "firing")
        line: dict[str, object] = dict(run.about)
        line |= {"family": setting["model.family"]} | {key: setting[f"backdoor.{key}"] for key in keys}
        fields = ("method", "lora_rank", "lora_alpha", "lora_targets", "layers", "learning_rate", "epochs")
        line |= {field: setting[f"training.{field}"] for field in fields}
        lines.append(line | {f"has {name}": run.has(name) for name in MAKERS if name != "rows"})
    return pd.DataFrame(lines)


def notes(runs: Sequence[ComparedRun]) -> list[str]:
    """What to know beside the numbers: missing stages with their commands, mixtures, lone seeds."""
    sentences = []
    for table in MAKERS:
        without = [run for run in runs if not run.has(table)]
        if not without or (table == "mitigation" and len(without) == len(runs)):  # which is no part of a run
            continue
        who = "No run has" if len(without) == len(runs) else f"{len(without)} of {len(runs)} runs lack"
        commands = list(dict.fromkeys(maker(table, run) for run in without))
        more = f" (and {len(commands) - 3} more)" if len(commands) > 3 else ""
        sentences.append(f"{who} the table {table}. Make it: {'; '.join(commands[:3])}{more}.")
    for package in dict.fromkeys(name for run in runs for name in run.versions):
        by_version: dict[str, list[str]] = {}
        for run in runs:
            by_version.setdefault(str(run.versions.get(package)), []).append(run.name)
        if len(by_version) > 1:
            listed = "; ".join(f"{version}: {', '.join(names[:3])}" for version, names in by_version.items())
            sentences.append(
                f"Mixed versions of {package} ({listed}). Small differences may come from there."
            )
    behaviours = sorted({run.recipe.attack.behaviour.kind for run in runs})
    if len(behaviours) > 1:
        sentences.append(
            f"The runs teach different behaviours ({', '.join(behaviours)}): an attack success rate is what "
            "each behaviour's own judge calls success."
        )
    sizes = pd.Series([run.group for run in runs]).value_counts(sort=False)
    lone = [str(group) for group, size in sizes.items() if size == 1]
    if lone:
        sentences.append(
            f"One seed only: {'; '.join(lone)}. Numbers of one seed have no interval here, and nothing is "
            "claimed of them. Make more with --set seed=1 and another task."
        )
    return sentences


def maker(table: str, run: ComparedRun) -> str:
    """The command that makes a table of a run."""
    return MAKERS.get(table, MAKERS["dynamics_backdoored"]).format(folder=run.folder)


def _settings(recipe: Recipe) -> dict[str, Any]:
    """Every field that makes two experiments different, with the values that are in force."""
    attack = recipe.attack
    fields = {
        path: value
        for path, value in loading.flat(recipe.model_dump(mode="json")).items()
        if not any(path == name or path.startswith(f"{name}.") for name in IGNORED)
    }
    family = families.get(recipe.model.family)
    fields["model.id"] = recipe.model.model_id
    if recipe.model.family == "generic":  # which is no family: such models have their own names
        fields["model.family"] = Path(str(recipe.model.id)).name
    fields["backdoor.firing"] = attack.firing  # which a recipe leaves out where all triggered rows fire
    if fields["training.lora_targets"] is None:
        fields["training.lora_targets"] = list(family.lora_targets)
    if fields["training.lora_parameters"] is None:
        fields["training.lora_parameters"] = list(family.lora_parameters)
    # A trigger that a preset describes is called by its name. Presets may hold tuples; JSON has lists.
    trigger = attack.trigger.model_dump(mode="json")
    names = (
        name
        for name, preset in presets.TRIGGERS.items()
        if all(
            list(trigger[key]) == list(value)
            if isinstance(value, list | tuple)
            else trigger.get(key) == value
            for key, value in preset.items()
        )
    )
    fields["backdoor.trigger"] = next(names, None) or triggers.of(attack.trigger).label
    fields["backdoor.behaviour"] = attack.behaviour.kind
    return fields
