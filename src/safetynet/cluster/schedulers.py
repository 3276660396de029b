"""Slurm and PBS through their own commands: submit a script, ask for jobs, cancel one.

In: scripts and job ids. Out: ids and states. What a scheduler refuses is an InputError in its own words.
"""

import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

from safetynet.cluster.template import Dialect
from safetynet.errors import InputError, RunError

Name = Literal["pbs", "slurm"]
COMMANDS: Mapping[str, tuple[str, str, str]] = {
    "slurm": ("sbatch", "squeue", "scancel"),
    "pbs": ("qsub", "qstat", "qdel"),
}
DIALECTS: Mapping[str, tuple[Name, Dialect]] = {
    "slurm": ("slurm", "slurm"),
    "pbs": ("pbs", "pbspro"),
    "torque": ("pbs", "torque"),
}
"""What may be named: the commands of it, and what it wants to read in a script unless it says otherwise."""
PATIENCE_S = 60
"""A scheduler that does not answer in this time is down."""
ACTIVE = ("PENDING", "RUNNING", "SUSPENDED", "COMPLETING", "CONFIGURING", "REQUEUED", "HELD", "ENDING")
_PBS_STATES = {
    "Q": "PENDING", "W": "PENDING", "T": "PENDING", "H": "HELD", "R": "RUNNING", "B": "RUNNING",
    "S": "SUSPENDED", "U": "SUSPENDED", "E": "ENDING", "C": "ENDED", "F": "ENDED", "X": "ENDED", "M": "ENDED",
}  # fmt: skip


@dataclass(frozen=True)
class State:
    """What a scheduler says of a job."""

    id: str
    name: str
    state: str
    """Slurm's word; PBS's letters are put into those that mean the same."""
    detail: str = ""
    """Why it waits, where it runs, how it ended."""

    @property
    def active(self) -> bool:
        """Whether it will still run, or runs."""
        return self.state in ACTIVE


def named(name: str) -> tuple[Name, Dialect]:
    """The scheduler of this name, and what is written for it where it is not asked.

    Raises:
        InputError: if there is no such scheduler.
    """
    if name not in DIALECTS:
        raise InputError(f"--scheduler {name}: choose one of {', '.join(DIALECTS)}.")
    return DIALECTS[name]


def choose(name: str | None) -> Name:
    """The scheduler of this name, or the one that is here.

    Raises:
        InputError: if there is no such scheduler, or none is here.
    """
    names = list(COMMANDS) if name is None else [named(name)[0]]
    for scheduler in names:
        if shutil.which(COMMANDS[scheduler][0]):
            return "pbs" if scheduler == "pbs" else "slurm"
    commands = " or ".join(COMMANDS[scheduler][0] for scheduler in names)
    raise InputError(
        f"there is no scheduler here: no command {commands}. Log in to a machine that submits jobs, or run "
        "it here with safetynet run; --dry-run with --scheduler shows the script anywhere."
    )


def dialect(scheduler: Name) -> Dialect:
    """What this scheduler wants to read in a script; PBS is asked which one it is."""
    if scheduler == "slurm":
        return "slurm"
    return "torque" if re.search(r"(?m)^Version: \d", _ask(["qsub", "--version"])[1]) else "pbspro"


def submission(scheduler: Name, written_for: Dialect, script: Path, seeds: Sequence[int]) -> list[str]:
    """The command that submits a script, as an array over seeds if there are several of them.

    Args:
        scheduler: which.
        written_for: `dialect` of it.
        script: absolute path.
        seeds: in ascending order; empty for a job without any.

    Raises:
        InputError: if PBS Pro is to have an array whose seeds are not evenly spaced.
    """
    command = ["sbatch", "--parsable"] if scheduler == "slurm" else ["qsub"]
    if len(seeds) == 1:
        # PBS Pro has no arrays of one. Slurm gives a job the whole environment unless it is told not to.
        variable = f"SEED={seeds[0]}"
        command += [f"--export=ALL,{variable}"] if scheduler == "slurm" else ["-v", variable]
    elif seeds:
        step = seeds[1] - seeds[0]
        even = all(other - seed == step for seed, other in pairwise(seeds))
        indices = f"{seeds[0]}-{seeds[-1]}" + (f":{step}" if step > 1 else "")
        if not even and written_for == "pbspro":
            raise InputError(
                f"--seeds {','.join(map(str, seeds))}: an array of PBS Pro has even steps. Write "
                "start:stop:step, and submit the others by themselves."
            )
        if not even or (written_for == "torque" and step > 1):
            indices = ",".join(map(str, seeds))
        command += {"slurm": [f"--array={indices}"], "torque": ["-t", indices], "pbspro": ["-J", indices]}[
            written_for
        ]
    return [*command, str(script)]


def check_array(scheduler: Name, seeds: Sequence[int]) -> None:
    """Refuse an array whose indices this cluster's Slurm does not have, where it says how many it has.

    Raises:
        InputError: with the seeds that an array may have.
    """
    if scheduler != "slurm" or len(seeds) < 2:
        return
    size = re.search(r"(?m)^MaxArraySize\s*=\s*(\d+)", _ask(["scontrol", "show", "config"])[1])
    if size is not None and seeds[-1] >= int(size[1]):
        raise InputError(
            f"--seeds: {seeds[-1]} is no index of an array on this cluster, whose MaxArraySize is {size[1]}. "
            f"Write seeds below it, such as --seeds 0:{size[1]}; a larger one goes by itself."
        )


def submit(command: Sequence[str], folder: Path, *, array: bool = False) -> str:
    """Submit, from a folder in which the scheduler leaves its own output; returns the job's id.

    Args:
        command: of `submission`.
        folder: that it is given in.
        array: whether it is for several seeds, for the hint.

    Raises:
        InputError: if the scheduler refuses; with its words, and the queues that it has.
    """
    code, out, err = _ask(command, folder)
    output = "\n".join(line for line in (out + err).splitlines() if line.strip())
    if code != 0:
        # The error among what it printed, or else the last line of that.
        errors = re.findall(r"(?:error|qsub): (.*?)'?$", output, flags=re.MULTILINE)
        lines = [line for line in errors if line != "Batch job submission failed:"]
        lines = lines or output.splitlines()[-1:]
        cause = " ".join(line.rstrip(".'") + "." for line in lines) or "it gave no reason."
        raise InputError(
            f"{command[0]} refused the job: {cause} Queues here: {queues(command[0])}. "
            f"Change {'--seeds, ' if array else ''}--queue, --walltime, --gpus or --account."
        )
    # Slurm's wrapper of qsub prints an empty id and success where sbatch was refused in some versions.
    id_line = re.search(r"(?m)^(\d+(?:\[\])?)[^\s]*\s*$", out)
    if id_line is None:
        raise RunError(f"{command[0]} took the job and gave no id, but: {output}. See safetynet status.")
    return id_line[1]


def queues(command: str) -> str:
    """Names of the queues (partitions), separated by commas."""
    if command == "sbatch" or shutil.which("sinfo"):
        names = _ask(["sinfo", "-h", "-o", "%R"])[1].split()
    else:
        lines = _ask(["qstat", "-Q"])[1].splitlines()
        names = [line.split()[0] for line in lines if line.strip() and not line.startswith(("Queue", "-"))]
    return ", ".join(dict.fromkeys(names)) or "none that it would name"


def ask(scheduler: Name, ids: Iterable[str]) -> dict[str, State]:
    """What a scheduler knows of all jobs of this user and of these ids; what it does not know is left out.

    Raises:
        RunError: if it does not answer.
    """
    if scheduler == "pbs":
        code, out, err = _ask(["qstat", "-f"])
        if code != 0 and "onnect" in err:  # Torque and the wrapper of Slurm fail where there is no job at all
            raise RunError(f"qstat does not answer: {' '.join(err.split())}")
        states = parse_qstat(out)
        for id_ in ids:
            # Tasks of an array, and (PBS Pro's -x) what has ended.
            for words in ([id_], ["-x", id_]):
                if id_ not in states:
                    states |= parse_qstat(_ask(["qstat", "-f", *words])[1])
        return states
    code, out, err = _ask(["squeue", "-h", "-r", "--me", "-t", "all", "-o", "%i|%j|%T|%r|%N|%L"])
    if code != 0:
        raise RunError(f"squeue does not answer: {' '.join(err.split())}")
    states = {}
    for line in out.splitlines():
        id_, name, state, reason, node, left = line.split("|")
        detail = f"on {node}, {left} left" if state == "RUNNING" else "" if reason == "None" else reason
        states[id_] = State(id_, name, state, detail)
    gone = [id_ for id_ in ids if id_ not in states]
    if gone:
        # The controller forgets jobs that ended minutes ago; the accounting, where there is one, does not.
        _, out, _ = _ask(
            ["sacct", "-n", "-X", "-P", "-j", ",".join(gone), "-o", "JobID,JobName,State,ExitCode"]
        )
        for line in out.splitlines():
            if line.count("|") == 3:
                id_, name, state, exit_code = line.split("|")
                states[id_] = State(id_, name, state.split()[0], f"exit code {exit_code.split(':')[0]}")
    return states


def parse_qstat(text: str) -> dict[str, State]:
    """Jobs by id from what `qstat -f` prints, of PBS Pro, OpenPBS, Torque and Slurm's wrapper.

    Args:
        text: blocks of `Job Id: ...` and indented lines `name = value`; a value goes on after a tab.
    """
    states = {}
    for block in re.split(r"(?m)^Job Id:\s*", re.sub(r"\n\t(?![\w.]+ = )", "", text))[1:]:
        first, *lines = block.splitlines()
        fields = dict(line.strip().split(" = ", 1) for line in lines if " = " in line)
        id_ = first.strip().partition(".")[0]
        state = _PBS_STATES.get(fields.get("job_state", ""), fields.get("job_state", ""))
        code = fields.get("Exit_status", fields.get("exit_status"))
        detail = f"exit code {code}" if code is not None else fields.get("comment", "")
        if state == "RUNNING" and "exec_host" in fields:
            detail = f"on {fields['exec_host'].partition('/')[0]}"
        states[id_] = State(id_, fields.get("Job_Name", ""), state, detail)
    return states


def cancel(scheduler: Name, id_: str) -> None:
    """Cancel a job.

    Raises:
        InputError: if the scheduler refuses.
    """
    command = COMMANDS[scheduler][2]
    code, out, err = _ask([command, id_])
    if code != 0:
        raise InputError(f"{command} {id_}: {' '.join((out + err).split())}")


def _ask(command: Sequence[str], folder: Path | None = None) -> tuple[int, str, str]:
    """Exit code and output of a scheduler's command; 127 where there is none."""
    try:
        process = subprocess.run(  # noqa: S603  # the scheduler's own commands, without a shell
            command, cwd=folder, capture_output=True, text=True, check=False, timeout=PATIENCE_S
        )
    except FileNotFoundError:
        return 127, "", f"there is no command {command[0]}"
    except subprocess.TimeoutExpired:
        raise RunError(
            f"{command[0]} has not answered for {PATIENCE_S} s. Try again when the scheduler is up; whether "
            "it took a job that was being submitted, safetynet status tells."
        ) from None
    return process.returncode, process.stdout, process.stderr
