"""One process on a run at a time: live and dead holders, here and elsewhere, with flock and without."""

import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from safetynet.errors import InputError
from safetynet.run import lock as locking

LEASE_S = 3.0
HOLD = """
import errno, fcntl, socket, sys, time
from pathlib import Path
from safetynet.run import lock as locking

folder, host, flock = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
if host:
    socket.gethostname = lambda: host
if flock == "none":
    def refuse(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")
    fcntl.flock = refuse
with locking.hold(folder, lease_s=float(sys.argv[4])):
    print("held", flush=True)
    time.sleep(600)
"""


@contextmanager
def held(folder: Path, host: str = "", flock: str = "own", **env: str) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the run, as if on machine `host`, with or without flock."""
    command = [sys.executable, "-c", HOLD, str(folder), host, flock, str(LEASE_S)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, **env}) as process:
        try:
            assert process.stdout.readline().strip() == "held"
            yield process
        finally:
            process.kill()


def no_flock(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a file system that has none."""

    def refuse(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)


def test_a_second_process_is_refused_and_told_who_works_on_the_run(tmp_path):
    with (
        held(tmp_path, SLURM_JOB_ID="12") as process,
        pytest.raises(InputError, match=rf"another process .*\(job 12, process {process.pid} on"),
        locking.hold(tmp_path, lease_s=LEASE_S),
    ):
        pass


def test_a_run_is_free_as_soon_as_its_process_on_this_machine_was_killed(tmp_path, monkeypatch):
    for flock in ("own", "none"):
        if flock == "none":
            no_flock(monkeypatch)
        with held(tmp_path, flock=flock) as process:
            process.kill()
            process.wait()
            started = time.monotonic()
            with locking.hold(tmp_path, lease_s=LEASE_S):
                assert locking.holder(tmp_path).pid == os.getpid()
            assert time.monotonic() - started < LEASE_S
        assert locking.holder(tmp_path) is None


@pytest.mark.parametrize("flock", ["own", "none"])
def test_a_run_that_lives_on_another_machine_is_refused_after_watching_it(tmp_path, monkeypatch, flock):
    """With a flock of the other machine's own, as on Lustre mounted with localflock, and without any."""
    if flock == "none":
        no_flock(monkeypatch)
    with held(tmp_path, host="node7", flock="none"):
        started = time.monotonic()
        with pytest.raises(InputError, match="on node7"), locking.hold(tmp_path, lease_s=LEASE_S):
            pass
        assert time.monotonic() - started > LEASE_S


def test_a_run_whose_machine_died_is_free_after_watching_it_whatever_the_clocks_say(tmp_path):
    with held(tmp_path, host="node7", flock="none") as process:
        process.kill()
        process.wait()
    ahead = time.time() + 10**6
    os.utime(tmp_path / ".lease", (ahead, ahead))
    started = time.monotonic()
    with locking.hold(tmp_path, lease_s=LEASE_S):
        assert time.monotonic() - started >= LEASE_S
        assert locking.holder(tmp_path).pid == os.getpid()


def test_a_process_that_stood_still_on_another_machine_stops_when_it_wakes_up(tmp_path):
    with held(tmp_path, host="node7", flock="none") as process:
        os.kill(process.pid, signal.SIGSTOP)  # as a hanging node
        with locking.hold(tmp_path, lease_s=LEASE_S):
            os.kill(process.pid, signal.SIGCONT)
            assert process.wait(timeout=30) == -signal.SIGTERM
            assert locking.holder(tmp_path).pid == os.getpid()


def test_a_job_waits_for_the_one_before_it(tmp_path):
    with held(tmp_path) as process:
        code = "import sys; from pathlib import Path; from safetynet.run import lock as locking\n"
        code += "with locking.hold(Path(sys.argv[1]), lease_s=3.0): print('mine')"
        job = subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path)],
            env={**os.environ, "PBS_JOBID": "13.server"},
            stdout=subprocess.PIPE,
            text=True,
        )
        with pytest.raises(subprocess.TimeoutExpired):
            job.wait(timeout=3)
        process.kill()
        assert job.communicate(timeout=30)[0] == "mine\n"


@pytest.mark.parametrize(
    ("env", "job"),
    [
        ({"PBS_JOBID": "123[4].server.site"}, "123[4]"),
        ({"SLURM_JOB_ID": "8", "SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": "2"}, "5_2"),
        ({"SLURM_JOB_ID": "8"}, "8"),
        ({}, None),
    ],
)
def test_the_job_is_read_from_the_environment_of_pbs_and_slurm(env, job):
    assert locking.current_job(env) == job
