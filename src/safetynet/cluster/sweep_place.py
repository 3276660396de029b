"""Where a sweep's workers run: processes here, or jobs of PBS Pro, Torque or Slurm; through Parsl.

In: a small YAML file, or nothing for this machine. Out: Parsl's configuration. One worker is one process with
one thread, and has one GPU of its own where there are GPUs. Submits nothing by itself.
"""

import os
import shlex
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from safetynet.cluster import notation, schedulers
from safetynet.errors import InputError
from safetynet.extras import need

if TYPE_CHECKING:
    import parsl

HEARTBEAT_S = {"here": (5, 30), "cluster": (30, 120)}
"""Seconds between signs of life, and seconds without one after which workers end by themselves."""
POOL = "parsl.executors.high_throughput.process_worker_pool"
INTERCHANGE = (
    # Linux ends the interchange together with the sweep, however that ended; its workers then miss it and
    # end.
    "import ctypes, runpy, sys; sys.platform == 'linux' and ctypes.CDLL(None).prctl(1, 9); "
    "runpy.run_module('parsl.executors.high_throughput.interchange', run_name='__main__')"
)
COMMANDS = {"pbs": "qsub", "torque": "qsub", "slurm": "sbatch"}


class Place(BaseModel):
    """Where workers run, and how many."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    scheduler: Literal["local", "pbs", "torque", "slurm"] = "local"
    """`pbs` is PBS Pro or OpenPBS."""
    jobs: Annotated[int, Field(ge=1)] = 1
    """Jobs at once, of one node each; `local` has one."""
    workers: Annotated[int, Field(ge=1)] | None = None
    """In each job; by default one for each GPU, or else for each core."""
    cpus: Annotated[int, Field(ge=1)] | None = None
    gpus: Annotated[int, Field(ge=0)] | None = None
    memory_gb: Annotated[int, Field(ge=1)] | None = None
    """Of each job; None leaves it to the scheduler, `local` takes what the machine has."""
    walltime: str = "04:00:00"
    queue: str | None = None
    account: str | None = None
    lines: tuple[str, ...] = ()
    """Further lines for the scheduler, such as `#PBS -l place=excl`."""
    setup: tuple[str, ...] = ()
    """Shell commands before the workers start, such as `module load cuda`."""

    @field_validator("walltime")
    @classmethod
    def _time(cls, value: str, info: ValidationInfo) -> str:
        scheduler = str(info.data.get("scheduler"))
        name = schedulers.named(scheduler)[0] if scheduler in schedulers.DIALECTS else None
        time = notation.walltime(value, name)
        if time is None:
            raise ValueError(f"write it in quotes as {notation.FORMS}")
        return time


def load(path: Path | None, workers: int | None = None) -> Place:
    """Read where a sweep runs; `workers` replaces the file's.

    Raises:
        InputError: if Parsl is not installed, the file cannot be read or has a wrong field, or the
            scheduler's commands are not here.
    """
    need("workers side by side", "parsl")
    fields: Any = {}
    if path is not None:
        try:
            fields = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise InputError(f"--place: {path} cannot be read ({' '.join(str(error).split())}).") from None
    if not isinstance(fields, dict):
        raise InputError(f"--place: {path} holds no fields. Allowed: {', '.join(Place.model_fields)}.")
    if workers is not None:
        fields = {**fields, "workers": workers}
    try:
        place = Place.model_validate(fields)
    except ValidationError as error:
        faults = [f"{'.'.join(map(str, f['loc']))}: {f['msg']}" for f in error.errors()]
        allowed = f"Allowed: {', '.join(Place.model_fields)}."
        raise InputError(f"--place: {path or '--workers'}: {'; '.join(faults)}. {allowed}") from None
    command = COMMANDS.get(place.scheduler)
    if command and shutil.which(command) is None:
        raise InputError(
            f"--place: scheduler {place.scheduler} needs {command}, which is not on the PATH. "
            "Start the sweep where jobs are submitted from, or set scheduler to local."
        )
    return place


def config(place: Place, folder: Path, retries: int, retry_cost: Any) -> "parsl.Config":
    """Parsl's configuration.

    Args:
        place: where.
        folder: for Parsl's own logs and scripts.
        retries: how often a task that failed is tried again.
        retry_cost: of an exception and a task, what a failure costs of the retries.
    """
    import parsl
    from parsl.executors import HighThroughputExecutor
    from parsl.executors.high_throughput.executor import DEFAULT_LAUNCH_CMD

    here = place.scheduler == "local"
    gpus, cpus = place.gpus or 0, place.cpus
    if here and place.gpus is None:
        import torch

        gpus = torch.cuda.device_count()
    if here and cpus is None:
        cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cpus = cpus or place.workers or max(gpus, 1)
    period, threshold = HEARTBEAT_S["here" if here else "cluster"]
    executor = HighThroughputExecutor(
        label="sweep",
        provider=_provider(place, cpus, gpus),
        address="127.0.0.1" if here else None,
        launch_cmd=DEFAULT_LAUNCH_CMD.replace("process_worker_pool.py", f"{sys.executable} -m {POOL}"),
        interchange_launch_cmd=[sys.executable, "-c", INTERCHANGE],
        max_workers_per_node=place.workers or gpus or cpus,
        cores_per_worker=1e-3,  # the number above decides
        available_accelerators=gpus,
        heartbeat_period=period,
        heartbeat_threshold=threshold,
    )
    return parsl.Config(
        executors=[executor],
        retries=retries,
        retry_handler=retry_cost,
        run_dir=str(folder),
        strategy="none" if here else "simple",
        usage_tracking=0,
    )


def _provider(place: Place, cpus: int, gpus: int) -> Any:
    from parsl.launchers import SingleNodeLauncher
    from parsl.providers import LocalProvider, PBSProProvider, SlurmProvider, TorqueProvider

    # One thread for each worker, the folder that the sweep was started in, and its packages.
    path = os.environ.get("PYTHONPATH")
    environment = [
        "export OMP_NUM_THREADS=1",
        *([f"export PYTHONPATH={shlex.quote(path)}"] if path else []),
        f"cd {shlex.quote(str(Path.cwd()))}",
    ]
    common = {
        "worker_init": "\n".join([*environment, *place.setup]),
        "init_blocks": place.jobs,
        "max_blocks": place.jobs,
    }
    if place.scheduler == "local":
        return LocalProvider(**common | {"init_blocks": 1, "max_blocks": 1})
    lines = list(place.lines)
    common |= {"walltime": place.walltime, "account": place.account, "launcher": SingleNodeLauncher()}
    if place.scheduler == "slurm":
        return SlurmProvider(
            partition=place.queue,
            cores_per_node=cpus,
            gpus_per_node=gpus or None,
            mem_per_node=place.memory_gb,
            exclusive=False,
            scheduler_options="\n".join(lines),
            **common,
        )
    if place.scheduler == "pbs":
        memory = f":mem={place.memory_gb}gb" if place.memory_gb else ""
        return PBSProProvider(
            queue=place.queue,
            cpus_per_node=cpus,
            select_options=(f":ngpus={gpus}" if gpus else "") + memory,
            scheduler_options="\n".join(lines),
            **common,
        )
    if place.memory_gb:
        lines.append(f"#PBS -l mem={place.memory_gb}gb")
    torque = TorqueProvider(queue=place.queue, scheduler_options="\n".join(lines), **common)
    # Parsl asks for as many cores as it starts pools, which is one.
    cores = f"ppn={cpus}" + (f":gpus={gpus}" if gpus else "")
    torque.template_string = torque.template_string.replace("ppn=${tasks_per_node}", cores)
    return torque
