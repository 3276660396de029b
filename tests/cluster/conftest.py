"""A real Slurm with its PBS commands on this machine, while the tests run, and a checkout to submit from."""

import getpass
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "qsub", "qstat")
# More cores, memory and GPUs than this machine has: scripts get what they ask for, and nothing enforces it.
CONF = """
ClusterName=safetynet
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={control_port}
SlurmdPort={node_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CryptoType=crypto/munge
# A requeued job may start this many seconds later; the default is two minutes.
AuthInfo=socket={folder}/munge/socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
ReturnToService=2
SchedulerParameters=sched_interval=1,bf_interval=1,sched_min_interval=0
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SlurmdParameters=config_overrides
GresTypes=gpu
KillWait=5
MinJobAge=3600
SlurmdTimeout=3600
NodeName={host} NodeAddr=127.0.0.1 CPUs=64 RealMemory=1000000 Gres=gpu:4 State=UNKNOWN
PartitionName=work Nodes=ALL Default=YES MaxTime=12:00:00 State=UP
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def eventually(what: Callable[[], object], seconds: float = 240, every: float = 0.2) -> object:
    """What `what` returns, as soon as that is true."""
    until = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < until, f"not within {seconds} s"
        time.sleep(every)
    return found


def command(*words: object, **options: object) -> str:
    """Output of a command that has to succeed."""
    done = subprocess.run([*map(str, words)], capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


def state(job: str) -> str:
    """Slurm's word for a job's state."""
    return command("squeue", "-h", "-t", "all", "-j", job, "-o", "%T")


def ended(job: str, seconds: float = 240) -> str:
    """The state in which a job ended."""
    going = ("PENDING", "RUNNING", "COMPLETING", "REQUEUED", "CONFIGURING", "")
    return str(eventually(lambda: (now := state(job)) not in going and now, seconds))


@pytest.fixture(scope="session")
def slurm() -> Iterator[Path]:
    """Folder of a running Slurm; SLURM_CONF points to it."""
    os.environ["PATH"] += ":/usr/sbin"
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        reason = f"{', '.join(missing)} not here (Debian: slurm-wlm slurm-wlm-torque munge)"
        if "slurm" in os.environ.get("SAFETYNET_REQUIRE", "").split(","):
            pytest.fail(f"{reason}, and SAFETYNET_REQUIRE says that slurm must be")
        pytest.skip(reason)
    # Not pytest's own folder: the path of a socket may have 107 signs.
    folder = Path(tempfile.mkdtemp(prefix="sn-slurm-"))
    folder.chmod(0o755)
    try:
        _start(folder)
        yield folder
    finally:
        for file in ("slurmd.pid", "slurmctld.pid", "munge/pid"):
            if (folder / file).exists():
                _end(int((folder / file).read_text()))
        os.environ.pop("SLURM_CONF", None)
        shutil.rmtree(folder, ignore_errors=True)


def _start(folder: Path) -> None:
    for name in ("munge", "state", "spool"):
        (folder / name).mkdir(mode=0o755)
    for name in ("gpu0", "gpu1", "gpu2", "gpu3"):
        (folder / name).touch()
    (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-3]\n")
    (folder / "cgroup.conf").write_text("ConstrainCores=no\nConstrainRAMSpace=no\nConstrainDevices=no\n")
    conf = CONF.format(
        host=socket.gethostname().partition(".")[0],
        user=getpass.getuser(),
        folder=folder,
        control_port=free_port(),
        node_port=free_port(),
    )
    (folder / "slurm.conf").write_text(conf)
    (folder / "munge.key").write_bytes(os.urandom(1024))
    (folder / "munge.key").chmod(0o400)
    munge = folder / "munge"
    command(
        "munged", "--force", f"--key-file={folder}/munge.key", f"--socket={munge}/socket",
        f"--pid-file={munge}/pid", f"--log-file={munge}/log", f"--seed-file={munge}/seed",
    )  # fmt: skip
    os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
    for program in ("slurmctld", "slurmd"):
        done = subprocess.run([program], capture_output=True, text=True, check=False)
        assert done.returncode == 0, (done.stderr, (folder / f"{program}.log").read_text())
    try:
        eventually(lambda: "idle" in subprocess.getoutput("sinfo -h -o %t").split(), seconds=60)
    except AssertionError:
        raise AssertionError((folder / "slurmd.log").read_text()) from None


def _end(pid: int) -> None:
    try:
        os.kill(pid, 15)
        eventually(lambda: not Path("/proc", str(pid)).exists(), seconds=30)
    except ProcessLookupError:
        pass


@pytest.fixture
def checkout(tmp_path: Path, slurm: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder like a checkout, from which jobs are submitted; what they leave running is ended."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    shutil.copytree(ROOT / "scripts", folder / "scripts")
    shutil.copytree(ROOT / "recipes", folder / "recipes")
    (folder / "src").symlink_to(ROOT / "src")
    (folder / ".venv").symlink_to(sys.prefix)
    (folder / "scripts" / "environment.sh").write_text(
        f"export PYTHONPATH={ROOT / 'src'} OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 WANDB_MODE=disabled\n"
    )
    monkeypatch.chdir(folder)
    before = set(command("squeue", "-h", "-r", "-o", "%i").split())
    yield folder
    for job in set(command("squeue", "-h", "-r", "-o", "%i").split()) - before:
        subprocess.run(["scancel", job], check=False)
