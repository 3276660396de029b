"""What became of runs: their stages, who works on them, and their jobs; and ending those jobs.

In: a run directory or a folder of them. Out: lines of text. Manifests, records, checkpoints and logs are read
as they are now, and the scheduler is asked.
"""

import json
import re
import socket
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from safetynet.cluster import records, schedulers
from safetynet.cluster.records import Job
from safetynet.cluster.schedulers import State
from safetynet.errors import InputError, RunError
from safetynet.run import directory as runs
from safetynet.run import lock as locking
from safetynet.run.stage import DATA, TRAIN

TAIL = 8
"""Lines of a dead job's log that are shown."""
_FOREVER = ("Limit", "BadConstraints", "ReqNodeNotAvail", "never", "Dependency")


@dataclass(frozen=True)
class Answer:
    """What the schedulers know now."""

    states: dict[str, State]
    """By job id."""
    silent: str = ""
    """Why one of them was not asked, or did not answer."""


def find_runs(path: Path) -> list[Path]:
    """Run directories at or below `path`: those with a manifest, or with jobs.

    Raises:
        InputError: if there is none.
    """
    folders = [
        folder
        for folder in (path, *sorted(path.glob("*")), *sorted(path.glob("*/*")))
        if (folder / "manifest.json").is_file() or (folder / "jobs").is_dir()
    ]
    if not folders:
        raise InputError(f"{path}: there is no run in it. Name results/, or a run directory below it.")
    return folders


def ask(jobs: Iterable[Job]) -> Answer:
    """Ask the schedulers of these jobs; one that is not here, or is down, leaves its jobs unknown."""
    states: dict[str, State] = {}
    silent = ""
    for name in sorted({job.scheduler for job in jobs}):
        try:
            schedulers.choose(name)
            states |= schedulers.ask(
                name, [job.task_id for job in jobs if job.scheduler == name and job.task_id]
            )
        except (InputError, RunError) as error:
            silent = str(error)
    return Answer(states, silent)


def describe(folders: Iterable[Path]) -> list[str]:
    """Lines about runs, their stages and jobs."""
    recorded = {folder: records.read(folder) for folder in folders}
    held = {folder: locking.holder(folder) for folder in recorded}
    answer = ask([job for jobs in recorded.values() for job in jobs])
    if not any(recorded.values()) and any(who and who.job for who in held.values()):
        # Their jobs were not submitted by `safetynet submit`.
        try:
            ids = [str(who.job) for who in held.values() if who and who.job]
            answer = Answer(schedulers.ask(schedulers.choose(None), ids))
        except (InputError, RunError) as error:
            answer = Answer({}, str(error))
    lines = [f"({answer.silent})"] if answer.silent else []
    for folder, jobs in recorded.items():
        lines += ["", *_run_lines(folder, held[folder], answer)]
        for job in jobs:
            lines += [f"  {line}" for line in _job_lines(folder, job, answer)]
    return lines[1:] if lines and not lines[0] else lines


def cancel(folder: Path) -> list[str]:
    """End the jobs of a run that wait or run; returns their ids.

    Raises:
        InputError: if it has none, or the scheduler refuses.
        RunError: if the scheduler does not answer.
    """
    jobs = [job for job in records.read(folder) if job.ended is None]
    ended = []
    for job in jobs:
        schedulers.choose(job.scheduler)
        state = records.state_of(job, schedulers.ask(job.scheduler, [job.task_id] if job.task_id else []))
        if state is not None and state.active:
            schedulers.cancel(job.scheduler, state.id)
            records.write(folder, replace(job, id=job.id or state.id, ended="cancelled"))
            ended.append(state.id)
    if not ended:
        raise InputError(f"{folder}: no job of this run waits or runs. See safetynet status {folder}.")
    return ended


def _run_lines(folder: Path, who: locking.Holder | None, answer: Answer) -> list[str]:
    finished, left, note = _stages(folder)
    lines = [f"{_short(folder)}: {note}" if note else str(_short(folder))]
    if finished or left:
        lines.append(
            f"  done: {', '.join(finished) or 'nothing yet'}" + (f"; next: {', '.join(left)}" if left else "")
        )
    if who is not None:
        alive: bool | None = None  # nobody can tell from here
        if who.job and who.job in answer.states:
            alive = answer.states[who.job].active
        elif who.host == socket.gethostname() and Path("/proc/self").exists():
            alive = Path("/proc", str(who.pid)).exists()
        word = {True: "working now", False: "died at work", None: "was last heard of working"}[alive]
        lines.append(f"  {word}: {who}" + (f"; {step}" if left and (step := _step(folder)) else ""))
    return lines


def _stages(folder: Path) -> tuple[list[str], list[str], str]:
    """Stages that are done, those that `safetynet run` has yet to do, and a fault of the manifest."""
    if not (folder / "manifest.json").exists():
        return [], [], "not begun"
    try:
        run = runs.find(folder)
        finished, recipe = list(run.manifest["stages"]), run.recorded_recipe
    except InputError as error:
        return [], [], str(error)
    order = [DATA.name, *(TRAIN.of(name).name for name in recipe.trained), *recipe.stages]
    # A style, or a backdoor that did not take, has no interventions: figures come last.
    left = [] if "figures" in finished else [name for name in order if name not in finished]
    return finished, left, ""


def _step(folder: Path) -> str:
    """The newest checkpoint of a training that is going on."""
    checkpoints = [*runs.find(folder).scratch.glob("training/*/checkpoints/checkpoint-*/trainer_state.json")]
    going = [
        path
        for path in checkpoints
        if not any((path.parents[2] / name).exists() for name in ("adapter", "model"))
    ]
    if not going:
        return ""
    newest = max(going, key=lambda path: path.stat().st_mtime)
    try:
        state = json.loads(newest.read_text(encoding="utf-8"))
        return f"checkpoint at step {state['global_step']} of {state['max_steps']}"
    except (OSError, ValueError, KeyError):
        return ""


def _job_lines(folder: Path, job: Job, answer: Answer) -> list[str]:
    state = records.state_of(job, answer.states)
    if job.id is None and job.ended is None:
        if state is None:
            lost = "its submission was interrupted, and the scheduler does not know it: submit again"
            return [f"job {job.name}: {lost if not answer.silent else 'its submission was interrupted'}"]
        job = records.adopted(folder, job, state)
    id_ = state.id if state else job.task_id
    head = f"job {id_} ({job.scheduler}, submitted {job.submitted})"
    if job.ended == "refused":
        return [f"job {job.name} ({job.scheduler}, {job.submitted}): refused by the scheduler"]
    if state is None:
        state_text: str = job.ended or ("unknown: the scheduler was not asked" if answer.silent else "ended")
    else:
        state_text = f"{state.state}{', ' + state.detail if state.detail else ''}"
    lines = [f"{head}: {state_text}"]
    if state is not None and state.state == "PENDING" and any(word in state.detail for word in _FOREVER):
        lines.append("  it may never start like this: cancel it and ask for less, or for another queue")
    if state is not None and state.active:
        return [*lines, *(f"  log: {_short(path)}" for path in _logs(job, str(id_)))]
    if job.ended or "figures" in _stages(folder)[0]:
        return lines
    # It died: the end of what it and its scheduler said.
    last = []
    for path in _logs(job, str(id_)):
        text = path.read_text(encoding="utf-8", errors="replace")
        words = [line for line in text.splitlines() if line.strip() and not line.startswith("Log: ")]
        if words:
            last += [f"  {_short(path)}:", *(f"    {line[:200]}" for line in words[-TAIL:])]
    return lines + (last or [f"  it left no word in {_short(Path(job.logs))}"])


def _logs(job: Job, id_: str) -> list[Path]:
    """Files of a job: its log, and what the scheduler kept; they are named after the number of the job."""
    numbers = re.findall(r"\d+", id_)
    return sorted(
        path
        for path in Path(job.logs).glob("*")
        if (job.name in path.name or path.name.startswith("slurm-"))
        and path.suffix not in (".sh", ".yaml")
        and re.findall(r"\d+", path.name.replace(job.name, "").replace("slurm-", ""))[: len(numbers)]
        == numbers
    )


def _short(path: Path) -> Path:
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
