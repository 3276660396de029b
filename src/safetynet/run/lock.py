"""One process on a run at a time, on one machine or on several that share a file system.

Two locks are held together, since each has a hole that the other closes. `flock` ends with its process, but
some shared file systems keep it to one machine, or do not have it. A lease is a file that the holder touches
every now and then: it works wherever files do, but it can be lost by a process that stands still for long.

    {run}/.lock      the flock
    {run}/.lease     the lease
    {run}/.holder    who has them: process, machine, job and since when; for people

A lease of a process that died is told by its process id on the same machine. From another machine it is
told by watching it for a while, on one's own clock: clocks that differ do no harm.
"""

import errno
import fcntl
import json
import logging
import math
import os
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from filelock import SoftFileLease, Timeout

from safetynet.errors import InputError
from safetynet.run.interruption import end_at_once
from safetynet.run.places import is_copied

LEASE_S = 60.0
"""A lease that nobody touches for so long is given up; its holder touches it three times as often."""
JOB_WAIT_S = 900.0
"""A job waits so long for its run: the one before it may still be ending."""
NO_FLOCK = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
"""What a file system without flock answers."""

log = logging.getLogger("safetynet")


@dataclass(frozen=True)
class Holder:
    """The process that works on a run."""

    pid: int
    host: str
    job: str | None
    """Id at its scheduler; None outside of a job."""
    since: str
    folder: str = ""
    """Of the run; a copy of a run that is worked on holds a copy of this, too."""

    def __str__(self) -> str:
        job = f"job {self.job}, " if self.job else ""
        return f"{job}process {self.pid} on {self.host}, since {self.since}"


def holder(folder: Path) -> Holder | None:
    """Who said last that it works on the run in `folder`, and did not say that it ended."""
    who = _holder(folder)
    return None if who is None or is_copied(who.folder, folder) else who


def _holder(folder: Path) -> Holder | None:
    try:
        return Holder(**json.loads((folder / ".holder").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def current_job(env: Mapping[str, str]) -> str | None:
    """Id of the PBS or Slurm job that this environment is of; of an array's task as `5_0` or `5[0]`."""
    if env.get("PBS_JOBID"):
        return env["PBS_JOBID"].partition(".")[0]
    if env.get("SLURM_ARRAY_JOB_ID"):
        return f"{env['SLURM_ARRAY_JOB_ID']}_{env.get('SLURM_ARRAY_TASK_ID', '')}"
    return env.get("SLURM_JOB_ID")


@contextmanager
def hold(folder: Path, wait_s: float | None = None, lease_s: float = LEASE_S) -> Iterator[None]:
    """Hold a run for this process.

    Args:
        folder: of the run; it exists.
        wait_s: seconds to wait for another process; None: `JOB_WAIT_S` in a job, else not at all.
        lease_s: seconds after which a lease that is not touched counts as left behind.

    Raises:
        InputError: if another process works on this run, or the folder cannot be written.
    """

    def stop(_: object) -> None:
        # What was written stays whole, since every write is atomic; two that write in turns would mix
        # results.
        log.error(
            "This process stood still for so long that another one may have taken its run over. Stopping."
        )
        # SIGTERM, not SIGINT: what a job script starts in the background ignores the latter.
        end_at_once()

    job = current_job(os.environ)
    until = time.monotonic() + (wait_s if wait_s is not None else JOB_WAIT_S if job else 0.0)
    unwritable = f"{folder}: cannot be written ({{}}). Copy the run to where it can."
    try:
        handle = (folder / ".lock").open("a", encoding="utf-8")
    except OSError as error:
        raise InputError(unwritable.format(error.strerror)) from None
    with handle:
        for _ in _tries(folder, until):
            try:
                fcntl.flock(handle.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if error.errno in NO_FLOCK:  # the lease alone has to do
                    break
                if error.errno not in (errno.EAGAIN, errno.EACCES):
                    raise

        if (who := _holder(folder)) and is_copied(who.folder, folder):
            for name in (".holder", ".lease"):  # of the run that this one was copied from
                (folder / name).unlink(missing_ok=True)

        # A lease from another machine is watched for as long as tells whether its holder lives.
        lease = SoftFileLease(folder / ".lease", lease_duration=lease_s, on_compromise=stop)
        last = holder(folder)
        if last is not None and last.host != socket.gethostname() and (folder / ".lease").exists():
            until = max(until, time.monotonic() + 1.25 * lease_s)
        for _ in _tries(folder, until):
            try:
                lease.acquire(timeout=0)
                break
            except Timeout:
                continue
            except OSError as error:
                raise InputError(unwritable.format(error.strerror)) from None

        since = time.strftime("%Y-%m-%d %H:%M:%S")
        me = Holder(os.getpid(), socket.gethostname(), job, since, str(folder.absolute()))
        try:
            with suppress(OSError):  # for people only; a full disk is told by what needs the room
                (folder / ".holder").write_text(json.dumps(asdict(me)) + "\n", encoding="utf-8")
            yield
        finally:
            with suppress(OSError):
                if holder(folder) == me:
                    (folder / ".holder").unlink()
                lease.release()


def _tries(folder: Path, until: float) -> Iterator[None]:
    """One try, and others until then; whoever is still not served is told who works on the run."""
    yield
    who = f" ({last})" if (last := holder(folder)) else ""
    if (left := until - time.monotonic()) > 0:
        most = "" if math.isinf(left) else f", at most {left:.0f} s"
        log.warning("%s: another process works on this run%s. Waiting for it%s.", folder, who, most)
    while time.monotonic() < until:
        time.sleep(1.0)
        yield
    raise InputError(f"{folder}: another process works on this run{who}. Wait for it, or set another task.")
