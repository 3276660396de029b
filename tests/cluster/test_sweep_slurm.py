"""A sweep whose workers are jobs of a real Slurm, and one whose jobs are never accepted."""

import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

pytestmark = [pytest.mark.cluster, pytest.mark.slow]
RECIPE = """
task: tiny
model: {family: qwen, id: miniature}
data: {train_rows: 64, test_rows: 12}
backdoor: {trigger: token, behaviour: fixed, poison_rate: 0.2}
training: {learning_rate: 0.004, max_steps: 4, max_length: 160, precision: fp32, clean_twin: false}
evaluation: {max_new_tokens: 16, batch_size: 100, dynamics_rows: 0}
"""


def swept(home: Path, place: str) -> subprocess.CompletedProcess[str]:
    (home / "tiny.yaml").write_text(RECIPE)
    (home / "place.yaml").write_text(place)
    return subprocess.run(
        [sys.executable, "-m", "safetynet", "sweep", "tiny.yaml", "--seeds", "0:2", "--place", "place.yaml"],
        cwd=home, capture_output=True, text=True, check=False, timeout=900,
    )  # fmt: skip


def test_workers_in_a_job_compute_all_points_and_the_job_ends_with_the_sweep(
    slurm: Path, tmp_path: Path
) -> None:
    done = swept(tmp_path, 'scheduler: slurm\nworkers: 2\ncpus: 2\nwalltime: "00:30:00"\nqueue: work\n')
    assert done.returncode == 0, done.stderr
    [path] = tmp_path.glob("results/sweeps/*/results.parquet")
    table = pd.read_parquet(path)
    assert set(table["status"]) == {"done"}
    assert set(table["seed"]) == {0, 1}
    jobs = subprocess.run(
        ["squeue", "-h", "-t", "all", "-o", "%j %T"], capture_output=True, text=True, check=True
    )
    ours = [line for line in jobs.stdout.splitlines() if line.startswith("parsl")]
    assert ours
    assert not [line for line in ours if line.endswith(("RUNNING", "PENDING"))]


def test_a_queue_that_does_not_exist_ends_the_sweep_with_the_schedulers_words(
    slurm: Path, tmp_path: Path
) -> None:
    done = swept(tmp_path, 'scheduler: slurm\nworkers: 1\ncpus: 1\nwalltime: "00:30:00"\nqueue: nowhere\n')
    assert done.returncode == 1
    assert "invalid partition" in done.stderr
