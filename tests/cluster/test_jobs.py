"""Real jobs on a real Slurm and its PBS commands: finish, fail, be killed, go on, be refused."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from .conftest import ROOT, command, ended, eventually, state

pytestmark = pytest.mark.cluster

TINY = """
task: tiny
model: {{family: qwen, id: miniature}}
data: {{train_rows: 200, test_rows: 4}}
backdoor: {{trigger: token, behaviour: fixed, poison_rate: 0.2}}
training:
  {{max_steps: {steps}, batch_size: 4, max_length: 160, precision: fp32, checkpoint_every: 2, log_every: 1,
   lora_dropout: 0.1, clean_twin: false}}
evaluation: {{max_new_tokens: 8, batch_size: 100, dynamics_rows: 0}}
"""
RUN = Path("results", "qwen-miniature", "tiny")


@pytest.fixture
def tiny(checkout: Path) -> Path:
    return recipe(checkout, 12)


def recipe(checkout: Path, steps: int) -> Path:
    path = checkout / "tiny.yaml"
    path.write_text(TINY.format(steps=steps))
    return path


def safetynet(*words: object, code: int = 0, **env: str) -> str:
    """What a command prints, to both streams; checks its exit code."""
    done = subprocess.run(
        [sys.executable, "-c", "from safetynet.cli.app import main; main()", *map(str, words)],
        env={**os.environ, "PYTHONPATH": str(ROOT / "src"), **env},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr


def log_of(job: str, folder: str = "logs/qwen") -> str:
    (path,) = Path(folder).glob(f"*-{job}.log")
    return path.read_text()


def submitted(*words: object, **env: str) -> str:
    """Submit with `safetynet submit`; the id of the job."""
    said = safetynet("submit", *words, **env)
    return next(line.split()[1] for line in said.splitlines() if line.startswith("Job:"))


def tables(run: Path) -> dict[str, pd.DataFrame]:
    found = {path.stem: pd.read_parquet(path) for path in run.glob("tables/*.parquet")}
    return {name: table.drop(columns="seconds", errors="ignore") for name, table in found.items()}


def assert_same_tables(one: Path, other: Path) -> None:
    first, second = tables(one), tables(other)
    assert first.keys() == second.keys()
    for name, table in first.items():
        pd.testing.assert_frame_equal(table, second[name])


def test_a_script_finishes_by_qsub_and_killed_and_started_again_by_sbatch_ends_with_the_same_tables(
    checkout, tmp_path
):
    whole = recipe(checkout, 40)
    first = command("qsub", "-v", f"RECIPE={whole}", "scripts/qwen/run.sh")
    assert ended(first) == "COMPLETED", log_of(first)
    log = log_of(first)
    assert "Ended with exit code 0" in log
    assert "ASR" in log
    assert json.loads((RUN / "manifest.json").read_text())["stages"].keys() >= {"evaluate", "figures"}
    asked = command("scontrol", "show", "job", first)
    assert "NumCPUs=8" in asked
    assert "mem=48G" in asked
    assert "TimeLimit=04:00:00" in asked
    assert "TresPerNode=gres:gpu:1" in asked

    RUN.rename(tmp_path / "whole")
    sbatch = ("sbatch", "--parsable", f"--export=ALL,RECIPE={whole}", "scripts/qwen/run.sh")
    second = command(*sbatch)
    eventually(lambda: list(RUN.glob("training/*/checkpoints/checkpoint-4/complete")), every=0.05)
    command("scancel", "--signal=KILL", "--full", second)
    assert ended(second) in ("FAILED", "CANCELLED")
    assert not list(RUN.glob("training/*/adapter")), "it was to be killed in the middle of the training"
    third = command(*sbatch)
    assert ended(third) == "COMPLETED", log_of(third)
    assert_same_tables(RUN, tmp_path / "whole")


def test_a_job_whose_time_is_up_is_requeued_and_goes_on_to_the_same_tables(checkout, tmp_path):
    path = recipe(checkout, 40)
    script = "scripts/qwen/training_on_backdoor.sh"
    whole = command("sbatch", "--parsable", f"--export=ALL,RECIPE={path}", script)
    assert ended(whole) == "COMPLETED", log_of(whole)
    RUN.rename(tmp_path / "whole")
    job = command("sbatch", "--parsable", f"--export=ALL,RECIPE={path}", script)
    eventually(lambda: list(RUN.glob("training/*/checkpoints/checkpoint-4/complete")), every=0.05)
    command("scancel", "--signal=USR1", "--batch", job)
    eventually(lambda: "Submitting again (1)" in log_of(job), 60)
    assert ended(job) == "COMPLETED", log_of(job)
    assert log_of(job).count(f"job {job}, on") == 2, "one log, two starts"
    assert_same_tables(RUN, tmp_path / "whole")


COUNTING = """
from safetynet.cluster.template import Resources, Script, render
import sys
print(render(Script(
    summary="counts its starts", name="count", what="/dev/null", logs="logs",
    folder={folder!r}, path={path!r},
    resources=Resources(gpus=0, cpus=1, memory_gb=1, walltime={walltime!r}),
    command="bash -c 'echo start >>starts; [ $(wc -l <starts) = 2 ] || exec sleep 100'",
)), end="")
"""


def counting_script(folder: Path, walltime: str = "00:01:00") -> Path:
    """A job whose command has not enough time when it is started first, and ends at once the second time."""
    path = folder / "count.sh"
    code = COUNTING.format(folder=str(folder), path=str(path), walltime=walltime)
    path.write_text(command(sys.executable, "-c", code, env={**os.environ, "PYTHONPATH": str(ROOT / "src")}))
    return path


def test_a_job_ends_in_order_ahead_of_its_wall_time_and_is_requeued(checkout):
    job = command("sbatch", "--parsable", counting_script(checkout))
    assert ended(job) == "COMPLETED"
    log = log_of(job, "logs")
    assert "Time is up" in log
    assert "Ended with exit code 0" in log
    assert Path("starts").read_text() == "start\n" * 2


def test_slurm_warns_a_job_whose_limit_was_lowered_and_it_is_requeued(checkout):
    job = command("sbatch", "--parsable", counting_script(checkout, "00:50:00"))
    eventually(lambda: Path("starts").exists())
    command("scontrol", "update", f"JobId={job}", "TimeLimit=00:05:00")
    assert ended(job) == "COMPLETED"
    assert "Submitting again (1)" in log_of(job, "logs")
    assert Path("starts").read_text() == "start\n" * 2


def test_under_pbs_a_job_whose_time_is_up_submits_itself_again_by_qsub(checkout):
    """The wrapper's qsub is real; a job of PBS itself is told by its variables."""
    script = counting_script(checkout)
    env = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_JOB")}
    with subprocess.Popen(["bash", str(script)], env=env | {"PBS_JOBID": "99999.server"}) as process:
        eventually(lambda: Path("starts").exists())
        process.send_signal(signal.SIGUSR1)
    assert process.returncode == 0
    first = log_of("99999", "logs")
    assert "Submitting again (1)" in first
    assert ended(first.splitlines()[-1]) == "COMPLETED"
    assert Path("starts").read_text() == "start\n" * 2


def test_seeds_are_one_array_with_a_run_for_each(tiny):
    job = submitted(tiny, "--seeds", "0:2")
    runs = [RUN.with_name(f"tiny-seed{seed}") for seed in (0, 1)]
    for seed, run in enumerate(runs):
        assert ended(f"{job}_{seed}") == "COMPLETED"
        assert json.loads((run / "manifest.json").read_text())["recipe"]["seed"] == seed
    one, other = (pd.read_parquet(run / "tables" / "history_backdoored.parquet")["loss"] for run in runs)
    assert not one.equals(other)
    said = safetynet("status")
    assert said.count("COMPLETED") == 2
    assert f"job {job}_1 (slurm" in said


def test_status_shows_a_run_at_work_and_a_cancelled_one_can_be_submitted_again(checkout):
    path = recipe(checkout, 3000)
    job = submitted(path, "--scheduler", "slurm", "--set", "training.checkpoint_every=20")
    assert "is for this run already" in safetynet("submit", path, code=2)
    eventually(lambda: list(RUN.glob("training/*/checkpoints/*/complete")))
    said = safetynet("status", RUN)
    assert "done: data; next: train backdoored" in said
    assert f"working now: job {job}, process" in said
    assert "checkpoint at step" in said
    assert "RUNNING, on" in said
    assert "log: logs/qwen-miniature/" in said
    assert f"Cancelled: {job}" in safetynet("cancel", RUN)
    assert ended(job) in ("CANCELLED", "FAILED")
    assert "no job of this run waits or runs" in safetynet("cancel", RUN, code=2)
    assert submitted(path, "--set", "training.checkpoint_every=20") != job


def test_two_jobs_on_one_run_take_turns(tiny):
    script = "scripts/qwen/training_on_backdoor.sh"
    jobs = [command("qsub", "-v", f"RECIPE={tiny}", script) for _ in range(2)]
    assert [ended(job) for job in jobs] == ["COMPLETED"] * 2
    unchanged = [log_of(job).count("train backdoored: unchanged") for job in jobs]
    assert sorted(unchanged) == [0, 1], "one of them trained, the other found it done"


def test_the_last_words_of_a_job_that_died_before_python_started_are_shown(tiny, tmp_path):
    environment = tiny.parent / "scripts" / "environment.sh"
    before = environment.read_text()
    environment.write_text(f"{before}SAFETYNET_SCRATCH={tmp_path}/no/scratch\n")
    job = submitted(tiny)
    assert ended(job) == "FAILED"
    said = safetynet("status", RUN)
    assert "FAILED" in said
    assert f"{tmp_path}/no is not there on node" in said
    environment.write_text(f"{before}echo no such module >&2; exit 7\n")
    broken = command("sbatch", "--parsable", f"--export=ALL,RECIPE={tiny}", "scripts/qwen/run.sh")
    assert ended(broken) == "FAILED"
    assert "no such module" in log_of(broken)


def test_a_job_that_fails_in_python_is_not_started_again_and_says_why(tiny):
    job = submitted(tiny, "--set", "evaluation.max_new_tokens=2")
    assert ended(job) == "FAILED"
    assert "evaluation.max_new_tokens: 2 cuts the target" in safetynet("status")


@pytest.mark.parametrize("scheduler", ["slurm", "pbs"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--queue", "nowhere"), "nvalid partition.*Queues here: work.*Change --queue"),
        (("--gpus", "9"), "node configuration is not available|invalid"),
    ],
)
def test_a_refused_job_is_told_in_the_schedulers_words_and_recorded(tiny, scheduler, options, message):
    said = safetynet("submit", tiny, "--scheduler", scheduler, *options, code=2)
    assert re.search(message, said), said
    assert "refused by the scheduler" in safetynet("status")
    assert command("squeue", "-h", "-t", "PD,R") == ""


def test_an_array_longer_than_the_cluster_allows_is_refused_before_anything_is_made(tiny):
    said = safetynet("submit", tiny, "--scheduler", "slurm", "--seeds", "0:1002", code=2)
    assert "--seeds: 1001 is no index of an array on this cluster, whose MaxArraySize is 1001." in said
    assert "such as --seeds 0:1001; a larger one goes by itself" in said
    said = safetynet("submit", tiny, "--scheduler", "slurm", "--seeds", "0-1,4", "--queue", "nowhere", code=2)
    assert "Change --seeds, --queue" in said
    assert not Path("results").exists()
    assert not Path("logs").exists()


def test_seeds_and_times_are_given_in_slurms_own_words(tiny):
    job = submitted(tiny, "--scheduler", "slurm", "--seeds", "0,3", "--walltime", "90", "--account", "lab")
    asked = command("scontrol", "show", "job", f"{job}_3")
    assert "TimeLimit=01:30:00" in asked
    for seed in (0, 3):
        assert ended(f"{job}_{seed}") == "COMPLETED"
        assert RUN.with_name(f"tiny-seed{seed}").joinpath("manifest.json").exists()


def test_a_job_that_can_never_start_is_pointed_out(tiny):
    job = submitted(tiny, "--walltime", "99:00:00", "--scheduler", "pbs")
    assert state(job) == "PENDING"
    assert safetynet("cancel", RUN).strip() == f"Cancelled: {job}"
    job = submitted(tiny, "--walltime", "99:00:00", "--scheduler", "slurm")
    # The line of this job: the one that was cancelled may still have its reason in its own.
    own = re.compile(rf"job {job} .*PartitionTimeLimit")
    said = str(eventually(lambda: own.search(text := safetynet("status")) and text, 60))
    assert "it may never start like this" in said
    assert f"job {job} (slurm" in said
    assert ": cancelled" in said or "CANCELLED" in said or "ENDED" in said


STANDIN = """#!/bin/bash
{before}
out="$({real} "$@")"; code=$?
{after}
echo "$out"; exit $code
"""


@pytest.mark.parametrize("moment", ["before", "after"])
def test_an_interrupted_submission_leaves_no_half_recorded_job(tiny, tmp_path, moment):
    """Killed just before, or just after the scheduler took the job and before its id was written down."""
    real = command("which", "sbatch")
    standin = tmp_path / "bin" / "sbatch"
    standin.parent.mkdir()
    text = STANDIN.format(
        real=real,
        before="kill -9 $PPID; exit 1" if moment == "before" else "",
        after="kill -9 $PPID" if moment == "after" else "",
    )
    standin.write_text(text)
    standin.chmod(0o755)
    path = f"{standin.parent}:{os.environ['PATH']}"
    safetynet("submit", tiny, "--scheduler", "slurm", "--queue", "work", code=-9, PATH=path)
    (record,) = RUN.glob("jobs/*.json")
    assert json.loads(record.read_text())["id"] is None
    said = safetynet("status", RUN)
    if moment == "before":
        assert "its submission was interrupted, and the scheduler does not know it: submit again" in said
        assert submitted(tiny)
    else:
        id_ = json.loads(record.read_text())["id"]
        assert f"job {id_} (slurm" in said
        assert "is for this run already" in safetynet("submit", tiny, code=2)
        assert f"Cancelled: {id_}" in safetynet("cancel", RUN)


def test_a_dry_run_prints_the_script_and_leaves_nothing(tiny):
    words = ("--dry-run", "--account", "lab", "--gpus", "2", "--walltime", "02:00:00")
    said = safetynet("submit", tiny, *words, SAFETYNET_SCRATCH="/fast/mine")
    assert "SAFETYNET_SCRATCH=/fast/mine\n" in said
    assert "#PBS -l select=1:ncpus=2:ngpus=2:mem=8gb" in said
    assert "#PBS -A lab" in said
    assert "sbatch --parsable" in said
    assert not Path("results").exists()
    assert not Path("logs").exists()


def test_without_a_scheduler_the_command_says_so(tiny):
    assert "there is no scheduler here" in safetynet("submit", tiny, code=2, PATH="/nonexistent")


def test_a_recipe_is_submitted_as_it_is_now(tiny):
    from safetynet import recipe as recipes

    meant = recipes.load(tiny, overrides=["training.max_steps=3"])
    safetynet("submit", tiny, "--set", "training.max_steps=3", "--walltime", "99:00:00")
    (snapshot,) = Path("logs", "qwen-miniature").glob("*.yaml")
    assert recipes.load(snapshot) == meant
