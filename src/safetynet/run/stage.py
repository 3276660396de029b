"""The stages of an experiment, each declared once: what it measures and writes, and its command.

In: an experiment's run directory. `Experiment.perform` computes a stage or says that it is unchanged; hints
about what is missing, the report's status and a comparison's notes read the declarations.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from safetynet.tables import schema


@dataclass(frozen=True)
class Stage:
    """One step of an experiment."""

    name: str
    """As the manifest calls it."""
    about: str
    """What the report lacks without it."""
    command: str
    """What makes it; `{run}` is the run directory and `{recipe}` its recipe."""
    tables: tuple[str, ...] = ()
    """Tables without which it counts as not run; a stage without any is not missed."""
    needs_trigger: bool = False
    """It cannot be done in an experiment that knows no trigger."""

    def of(self, part: str) -> "Stage":
        """A part of this stage with a record of its own, as the training of one model."""
        return replace(self, name=f"{self.name} {part}")


DATA = Stage("data", "the rows", "safetynet train {recipe}")
BASE = Stage("base", "answers of the base model", "safetynet run {recipe}")
TRAIN = Stage("train", "the training", "safetynet run {recipe}")
TRAIN_BACKDOORED = replace(TRAIN.of("backdoored"), tables=("history_backdoored",))
TRAIN_TWIN = TRAIN.of("clean_twin")
EVALUATE = Stage(
    "evaluate", "rates by role and responses", "safetynet evaluate {run}", ("evaluation", "responses")
)
UTILITY = EVALUATE.of("utility")
INTERVENE = Stage(
    "intervene", "where the trigger acts, and removals", "safetynet intervene {run}", ("effects",), True
)
DETECT = Stage("detect", "a monitor of clean prompts", "safetynet detect {run}", ("detection",))
MITIGATE = Stage("mitigate", "repairs, and what they cost", "safetynet mitigate {run}", ("mitigation",), True)
PERSIST = Stage("persist", "what the backdoor survives", "safetynet persist {run}", ("persistence",), True)
FIGURES = Stage("figures", "the figures", "safetynet plot {run}")
COMPARE = Stage("compare", "runs side by side", "safetynet compare {run} ...")
STAGES = (DATA, TRAIN_BACKDOORED, TRAIN_TWIN, EVALUATE, INTERVENE, DETECT, MITIGATE, PERSIST, FIGURES)
"""Of a run, in their order."""


def command_for(table: str, folder: Path | str) -> str:
    """The command that makes a table of the run in `folder`; `safetynet run` for one declared nowhere."""
    declared = schema(table)
    stages = {stage.name: stage for stage in (*STAGES, BASE, TRAIN, COMPARE)}
    maker = stages.get(declared.stage, TRAIN) if declared else TRAIN
    return maker.command.format(run=folder, recipe="RECIPE")
