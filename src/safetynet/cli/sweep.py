"""`safetynet sweep`: one recipe over a grid of values, seeds and families."""

import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from safetynet.run.logs import logging_to

if TYPE_CHECKING:
    from safetynet.cluster.sweep import Outcome

log = logging.getLogger("safetynet")


def sweep(  # noqa: PLR0913  # one parameter is one option
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="YAML file that all points start from.")],
    more: Annotated[
        list[str] | None, typer.Argument(metavar="[FIELD=VALUES]...", help="More of --grid.")
    ] = None,
    grid: Annotated[
        list[str] | None,
        typer.Option("--grid", metavar="FIELD=VALUES", help="Values between commas; every combination."),
    ] = None,
    seeds: Annotated[
        str | None, typer.Option(help="first:end (end left out), or numbers and commas.")
    ] = None,
    families: Annotated[str | None, typer.Option(help="Families between commas, or all.")] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="Override a field in all points.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Workers; by default one for each GPU, else for each core.")
    ] = None,
    place: Annotated[
        Path | None, typer.Option(help="YAML file that says on which cluster; this machine by default.")
    ] = None,
    retries: Annotated[int, typer.Option(min=0, help="Tries again of a step that failed.")] = 2,
) -> None:
    """Run a recipe for every combination of values, seeds and families; what has ended is not run again.

    Example: `safetynet sweep recipes/qwen-miniature.yaml --grid training.lora_rank=4,8 --seeds 0:3`
    """
    from safetynet.cluster import sweep_grid, sweep_place

    points = sweep_grid.points(
        recipe, [*(grid or []), *(more or [])], seeds=seeds, chosen=families, overrides=overrides or []
    )
    where = sweep_place.load(place, workers)
    name = sweep_grid.sweep_name(points)
    folder = (points[0].recipe.output.results / "sweeps" / name).absolute()
    from tqdm import tqdm

    from safetynet.cluster import sweep as sweeping
    from safetynet.cluster import sweep_table

    with logging_to(folder / "sweep.log"):
        log.info("sweep %s: %d points in %s", name, len(points), folder)
        # A bar on a terminal; in a log or pipe one line for each point.
        with tqdm(total=len(points), desc="sweep", unit="point", disable=not sys.stderr.isatty()) as bar:

            def progress(outcome: "Outcome", ended: int) -> None:
                result = f"failed in {outcome.failed}" if outcome.failed else "done"
                if not outcome.failed and not outcome.computed:
                    result = "had ended before"
                log.info("sweep: %d of %d, %s %s", ended, len(points), outcome.point.name, result)
                bar.update()

            outcomes = sweeping.sweep(points, name, folder, where, retries=retries, progress=progress)
        sweep_table.write(folder, outcomes)
        failed = [outcome for outcome in outcomes if outcome.failed]
        for outcome in failed:
            log.error(
                "%s: %s failed. %s (%s)", outcome.point.name, outcome.failed, outcome.reason, outcome.log
            )
    typer.echo((folder / "results.md").read_text(encoding="utf-8"))
    typer.echo(f"Results: {folder / 'results.parquet'}, results.csv, results.md")
    if failed:
        typer.echo(
            f"{len(failed)} of {len(outcomes)} points failed. The same command tries them again.", err=True
        )
        raise typer.Exit(1)
