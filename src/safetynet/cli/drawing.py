"""How `detect` and `mitigate` end: figures and report anew, where the run is far enough for them."""

from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from safetynet.run.directory import Run


def drawn(run: "Run", folder: Path) -> bool:
    """Draw a run again; False, with a word to the user, where it is not evaluated.

    Args:
        run: whose tables a stage has just written.
        folder: the run as the user named it.
    """
    from safetynet import pipeline

    if not run.has_table("evaluation"):
        typer.echo(f"No figures: the run is not evaluated. Run safetynet evaluate {folder}, then plot.")
        return False
    pipeline.draw(run.recipe, run)
    return True
