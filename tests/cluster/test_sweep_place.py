"""Where workers run: what is refused, and what a scheduler is asked for."""

import re
from pathlib import Path

import pytest

from safetynet.cluster import sweep_place
from safetynet.cluster.sweep import retry_cost
from safetynet.cluster.sweep_place import Place
from safetynet.errors import InputError, RunError

SCHEDULERS = {
    "pbs": ("qsub", "1.server"),
    "torque": ("qsub", "1.server"),
    "slurm": ("sbatch", "Submitted batch job 1"),
}
ASKED = {
    "pbs": [
        r"#PBS -l walltime=02:00:00", r"#PBS -l select=1:ncpus=8:ngpus=2:mem=64gb", r"#PBS -l place=excl",
    ],
    "torque": [r"#PBS -l walltime=02:00:00", r"#PBS -l nodes=1:ppn=8:gpus=2", r"#PBS -l mem=64gb"],
    "slurm": [
        r"#SBATCH --time=120", r"#SBATCH --gpus-per-node=2", r"#SBATCH --mem=64g",
        r"#SBATCH --cpus-per-task=8", r"#SBATCH --partition=long", r"#SBATCH --account=lab",
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("scheduler: lsf", "scheduler: Input should be 'local', 'pbs', 'torque' or 'slurm'"),
        ("worker: 2", "worker: Extra inputs are not permitted.*Allowed: scheduler, jobs, workers"),
        ("workers: 0", "workers: Input should be greater than or equal to 1"),
        ("- a", "holds no fields"),
        ("a: [", "cannot be read"),
    ],
)
def test_a_place_that_is_none_is_refused_with_what_is_allowed(text, message, tmp_path):
    (tmp_path / "place.yaml").write_text(text)
    with pytest.raises(InputError, match=message):
        sweep_place.load(tmp_path / "place.yaml")


def test_a_file_that_is_not_there_and_a_scheduler_that_is_not_here_are_refused(tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"nope\.yaml cannot be read"):
        sweep_place.load(tmp_path / "nope.yaml")
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "place.yaml").write_text("scheduler: slurm")
    with pytest.raises(InputError, match="needs sbatch, which is not on the PATH"):
        sweep_place.load(tmp_path / "place.yaml")


def test_without_a_file_workers_run_here_and_the_command_line_sets_how_many(tmp_path):
    assert sweep_place.load(None) == Place()
    assert sweep_place.load(None, workers=3).workers == 3
    made = sweep_place.config(Place(workers=3), tmp_path, 2, retry_cost)
    [executor] = made.executors
    assert executor.max_workers_per_node == 3
    assert executor.address == "127.0.0.1"
    assert "OMP_NUM_THREADS=1" in executor.provider.worker_init


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_a_job_asks_its_scheduler_for_what_the_place_says(scheduler, tmp_path, monkeypatch):
    # The submitting command takes the script and answers as the scheduler does; everything before it is real.
    command, answer = SCHEDULERS[scheduler]
    (tmp_path / command).write_text(
        f'#!/bin/sh\nfor last; do :; done\ncp "$last" {tmp_path}/job\necho {answer}\n'
    )
    (tmp_path / command).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    extra = ("#PBS -l place=excl",) if scheduler == "pbs" else ()
    place = Place(
        scheduler=scheduler, jobs=3, cpus=8, gpus=2, memory_gb=64, walltime="02:00:00", queue="long",
        account="lab", lines=extra, setup=("module load cuda",),
    )  # fmt: skip
    [executor] = sweep_place.config(place, tmp_path, 1, retry_cost).executors
    assert executor.max_workers_per_node == 2, "one for each GPU"
    provider = executor.provider
    assert (provider.init_blocks, provider.max_blocks) == (3, 3)
    provider.script_dir = str(tmp_path)
    assert provider.submit("the-workers", 1)
    script = (tmp_path / "job").read_text()
    for line in ASKED[scheduler]:
        assert re.search(f"^{line}", script, re.MULTILINE), (line, script)
    assert (
        script.index("export OMP_NUM_THREADS=1")
        < script.index("module load cuda")
        < script.index("the-workers")
    )
    assert f"cd {Path.cwd()}" in script


def test_what_refuses_its_input_is_not_tried_again():
    assert retry_cost(InputError("no"), None) == float("inf")
    assert retry_cost(RunError("disk full"), None) == retry_cost(OSError("gone"), None) == 1.0
