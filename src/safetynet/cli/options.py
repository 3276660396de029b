"""Arguments and options that several commands share, each declared once."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from safetynet.experiment import Experiment

RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory, results/{model}/{task}.")]
RecipeFile = Annotated[
    Path | None, typer.Argument(metavar="RECIPE", help="YAML file; the ready ones are in recipes/.")
]
FamilyName = Annotated[
    str | None, typer.Option("--family", help="Take this family's default recipe (see: safetynet families).")
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="FIELD=VALUE", help="Override a field, as in training.learning_rate=1e-4."),
]
Seed = Annotated[
    int | None,
    typer.Option(min=0, max=2**32 - 1, help="Take this seed, as a task of its own: {task}-seed{seed}."),
]
SameBase = Annotated[
    bool, typer.Option("--same-base", help="The adapter calls its base otherwise; it is the run's base.")
]


def redrawn(experiment: "Experiment", folder: Path) -> bool:
    """Draw a run again after a stage has written tables.

    Returns:
        False, with a word to the user, if the run is not evaluated.
    """
    from safetynet import stages

    if not experiment.run.has_table("evaluation"):
        typer.echo(f"No figures: the run is not evaluated. Run safetynet evaluate {folder}, then plot.")
        return False
    stages.draw(experiment)
    return True
