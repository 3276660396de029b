"""A recipe becomes a job: a script beside the logs, a record in the run, and a submission.

In: a recipe, a scheduler and what to ask it for. Out: a job, and a record in each of its runs. Runs nothing.
"""

import os
import secrets
import shlex
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import yaml

from safetynet.cluster import notation, records, schedulers
from safetynet.cluster.template import Dialect, Resources, Script, render
from safetynet.errors import InputError
from safetynet.recipe import Recipe
from safetynet.run import directory as runs
from safetynet.run.directory import Run, write_text


@dataclass(frozen=True)
class Request:
    """What is asked of which scheduler."""

    scheduler: schedulers.Name
    dialect: Dialect
    resources: Resources
    queue: str | None = None
    account: str | None = None
    seeds: tuple[int, ...] = ()


@dataclass(frozen=True)
class Plan:
    """A job that could be submitted: nothing is written yet."""

    name: str
    script: Path
    recipe: Path
    text: str
    """Of the script."""
    command: tuple[str, ...]


def seeds_of(text: str) -> tuple[int, ...]:
    """Seeds of an array, in ascending order, written in any form that `notation.seeds` reads.

    Raises:
        InputError: if it is written otherwise, or names none.
    """
    seeds = notation.seeds(text)
    if not seeds:
        raise InputError(
            f"--seeds {text}: write start:stop, such as 0:5 for seeds 0 to 4, or 0-4 for the same, or 0,2,5."
        )
    return tuple(sorted(seeds))


def plan(recipe: Recipe, request: Request) -> Plan:
    """Make the script and the command of a job."""
    # Fifteen signs reach an old PBS: the name has to be unique within them.
    name = f"{recipe.model.family[:6]}-{secrets.token_hex(4)}"
    logs = (recipe.output.logs / recipe.model_name).absolute()
    script, snapshot = logs / f"{name}.sh", logs / f"{name}.yaml"
    text = render(
        Script(
            summary=f"{recipe.model_name}/{recipe.task}, submitted {time.strftime('%Y-%m-%d %H:%M:%S')}",
            name=name,
            resources=request.resources,
            command='safetynet run "$WHAT" ${SEED:+--seed "$SEED"}',
            what=shlex.quote(str(snapshot)),
            logs=str(logs),
            folder=str(Path.cwd()),
            path=str(script),
            scratch=os.environ.get("SAFETYNET_SCRATCH"),
            queue=request.queue,
            account=request.account,
            dialect=request.dialect,
        )
    )
    command = schedulers.submission(request.scheduler, request.dialect, script, request.seeds)
    return Plan(name, script, snapshot, text, tuple(command))


def submit(recipe: Recipe, request: Request) -> tuple[list[Run], str]:
    """Submit a recipe, for each seed if there are any.

    Returns:
        The runs, and the job's id.

    Raises:
        InputError: if a run has a job already, its folders cannot be written, or the scheduler refuses; a
            refused array leaves nothing behind.
    """
    schedulers.check_array(request.scheduler, request.seeds)
    new_runs = [runs.place(seeded) for seeded in [recipe.seeded(seed) for seed in request.seeds] or [recipe]]
    recorded = [(run, job) for run in new_runs for job in records.read(run.folder) if job.ended is None]
    for name in {job.scheduler for _, job in recorded}:
        mine = [(run, job) for run, job in recorded if job.scheduler == name]
        states = schedulers.ask(name, [str(job.task_id) for _, job in mine if job.task_id])
        for run, job in mine:
            state = records.state_of(job, states)
            if state is not None and state.active:
                raise InputError(
                    f"{run.folder}: job {state.id} ({state.state}) is for this run already. Wait for it, "
                    f"end it with safetynet cancel {run.folder}, or set another task."
                )

    # Folders that this submission makes, the innermost first.
    planned = plan(recipe, request)
    folders = {planned.script.parent}
    folders |= {folder for run in new_runs for folder in (run.folder / "jobs", run.scratch)}
    above = folders.union(*(folder.parents for folder in folders))
    absent = sorted((path for path in above if not path.exists()), key=lambda path: -len(path.parts))

    runs.check(new_runs[0])  # the others lie beside it
    # As it is now: the file that it came from may change before the job starts.
    fields = recipe.model_dump(mode="json")
    write_text(planned.recipe, yaml.safe_dump(fields, sort_keys=False, allow_unicode=True))
    write_text(planned.script, planned.text)
    jobs = [
        records.Job(
            name=planned.name,
            scheduler=request.scheduler,
            submitted=time.strftime("%Y-%m-%d %H:%M:%S"),
            script=str(planned.script),
            logs=str(planned.script.parent),
            seed=seed,
            array=len(request.seeds) > 1,
        )
        for seed in (request.seeds or (None,))
    ]
    # The records come first: a job may start before its id is known here.
    for run, job in zip(new_runs, jobs, strict=True):
        records.write(run.folder, job)
    is_array = jobs[0].array
    try:
        # From the folder of the logs: there the scheduler leaves what it has to say itself.
        id_ = schedulers.submit(planned.command, planned.script.parent, array=is_array)
    except InputError:
        for run, job in zip(new_runs, jobs, strict=True):
            if is_array:
                records.remove(run.folder, job)
            else:
                records.write(run.folder, replace(job, ended="refused"))
        if is_array:
            for file in (planned.script, planned.recipe):
                file.unlink(missing_ok=True)
            for folder in absent:
                with suppress(OSError):  # another process may have put something there
                    folder.rmdir()
        raise
    for run, job in zip(new_runs, jobs, strict=True):
        records.write(run.folder, replace(job, id=id_))
    return new_runs, id_
