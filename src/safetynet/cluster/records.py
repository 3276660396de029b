"""The jobs of a run, one file each below {run}/jobs/.

A job is written down before it is submitted, without an id, and again when the scheduler has given one. So a
submission that is interrupted between the two leaves a record that says so, and the scheduler, asked for the
job's name, tells whether it was taken: names are unique.
"""

import json
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from safetynet.cluster.schedulers import Name, State
from safetynet.errors import RunError
from safetynet.run.directory import write_text
from safetynet.run.places import is_copied


@dataclass(frozen=True)
class Job:
    """A job as it was submitted."""

    name: str
    """Unique; the scheduler knows the job by it, too."""
    scheduler: Name
    submitted: str
    """When, by the clock of the machine that submitted it."""
    script: str
    logs: str
    """Folder of its logs."""
    id: str | None = None
    """None until the scheduler has given one."""
    seed: int | None = None
    """The seed, and index in its array, of a run for one seed."""
    array: bool = False
    ended: Literal["refused", "cancelled"] | None = None
    run: str = ""
    """Folder of the run that it works on."""

    @property
    def task_id(self) -> str | None:
        """Id of the one task of an array that works on this run, or of the whole job without an array."""
        if self.id is None or not self.array:
            return self.id
        return (
            f"{self.id}_{self.seed}" if self.scheduler == "slurm" else f"{self.id.rstrip('[]')}[{self.seed}]"
        )


def write(folder: Path, job: Job) -> None:
    """Write a job of the run in `folder` down, in the place of what was known of it."""
    job = replace(job, run=str(folder.absolute()))
    write_text(folder / "jobs" / f"{job.name}.json", json.dumps(asdict(job), indent=2) + "\n")


def remove(folder: Path, job: Job) -> None:
    """Forget a job of the run in `folder`."""
    (folder / "jobs" / f"{job.name}.json").unlink(missing_ok=True)


def read(folder: Path) -> list[Job]:
    """The jobs of the run in `folder`, in the order of their submission.

    Damaged records are left out, and those that came with a copy of another run: its jobs are not this one's.
    """
    jobs = []
    for path in folder.glob("jobs/*.json"):
        try:
            jobs.append(Job(**json.loads(path.read_text(encoding="utf-8"))))
        except (ValueError, TypeError):
            continue
    jobs_here = [job for job in jobs if not is_copied(job.run, folder)]
    return sorted(jobs_here, key=lambda job: (job.submitted, job.name))


def state_of(job: Job, states: dict[str, State]) -> State | None:
    """What the scheduler says of a job.

    Args:
        job: as recorded.
        states: by id, what the scheduler said of this user's jobs.

    Returns:
        None if it knows it no more. After a restart under PBS the job has another id and the same name: the
        newest one counts. One that was taken although its submission was interrupted is found by its name.
    """
    same = [state for state in states.values() if state.name == job.name]
    if job.array and job.task_id in states:
        return states[str(job.task_id)]
    if job.array and job.id is None:
        same = [state for state in same if state.id.endswith((f"_{job.seed}", f"[{job.seed}]"))] or same
    if not same:
        return states.get(str(job.task_id)) or states.get(str(job.id))
    return max(same, key=lambda state: (state.active, int("".join(filter(str.isdigit, state.id)) or 0)))


def adopted(folder: Path, job: Job, state: State) -> Job:
    """Give a job whose submission was interrupted the id that the scheduler gave it."""
    id_ = state.id.partition("_")[0].partition("[")[0] + ("[]" if "[" in state.id else "")
    adopted_job = replace(job, id=id_)
    with suppress(RunError):  # whoever looks at another's run may not be allowed to write there
        write(folder, adopted_job)
    return adopted_job
