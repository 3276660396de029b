"""A run is where it lies: copied, moved, with and without a scratch folder, opened from elsewhere."""

import json
import logging
import os
import shutil
import sys
from pathlib import Path

import pytest

from safetynet import recipe
from safetynet.cli.app import main
from safetynet.cluster import records
from safetynet.experiment import Experiment
from safetynet.recipe import Recipe
from safetynet.run import directory as runs
from safetynet.run import lock as locking
from safetynet.run.directory import Run
from safetynet.run.logs import logging_to
from safetynet.run.places import MARK

PLACE = ("qwen-miniature", "t")


def plan(project: Path, *more: str) -> Recipe:
    """A recipe whose results and logs lie in `project`."""
    output = [f"output.results={project}/results", f"output.logs={project}/logs"]
    return recipe.load(overrides=["model.id=miniature", "task=t", *output, *more])


def project_of(project: Path, *more: str) -> Run:
    """A run with one finished stage, whose large output is a file in its scratch."""
    made = runs.create(plan(project, *more))
    made.describe(plan(project, *more))
    train(made, 1)
    with logging_to(made.log):
        logging.getLogger("safetynet").info("trained")
    return made


def train(run: Run, seed: int) -> None:
    with run.stage("train backdoored", {"seed": seed}) as outputs:
        path = run.scratch / "training" / "weights"
        runs.write_text(path, f"weights {seed}")
        outputs.file(path, "model")


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, and what it holds."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def as_before_places_were_kept(run: Run) -> None:
    """Give a run the manifest that it would have had in earlier versions."""
    path = run.folder / "manifest.json"
    fields = json.loads(path.read_text()) | {"scratch": str(run.scratch), "log": str(run.log)}
    path.write_text(
        json.dumps({k: v for k, v in fields.items() if k not in ("folder", "paths", "read_only")})
    )


@pytest.fixture(params=["now", "before"])
def original(request: pytest.FixtureRequest, tmp_path: Path) -> Run:
    """A run without a scratch, with the manifest of this version or of an earlier one."""
    made = project_of(tmp_path / "lab")
    if request.param == "before":
        as_before_places_were_kept(made)
    return made


def test_a_copied_run_works_on_itself_and_leaves_the_original_as_it_was(
    original: Run, tmp_path: Path
) -> None:
    copy = runs.find(shutil.copytree(original.folder, tmp_path / "mine"))
    before = contents(tmp_path / "lab")
    assert copy.finished("train backdoored", {"seed": 1})
    with copy.lock(), logging_to(copy.log):
        train(copy, 2)
        logging.getLogger("safetynet").info("trained again")
    assert contents(tmp_path / "lab") == before
    assert (copy.folder / "training" / "weights").read_text() == "weights 2"
    assert "trained again" in (copy.folder / "run.log").read_text()


def test_a_run_whose_original_is_gone_makes_it_not_anew(original: Run, tmp_path: Path) -> None:
    moved = runs.find(shutil.move(original.folder, tmp_path / "mine"))
    with moved.lock(), logging_to(moved.log):
        train(moved, 2)
        logging.getLogger("safetynet").info("trained again")
    assert not original.folder.exists()
    assert moved.scratch == moved.folder


def test_results_and_logs_that_move_together_stay_together(original: Run, tmp_path: Path) -> None:
    shutil.move(tmp_path / "lab", tmp_path / "office")
    moved = runs.find(tmp_path.joinpath("office", "results", *PLACE))
    assert moved.log == tmp_path / "office" / "logs" / PLACE[0] / "t.log"
    assert moved.log.exists()


def test_a_copy_beside_the_original_has_a_log_of_its_own(original: Run, tmp_path: Path) -> None:
    copy = shutil.copytree(tmp_path / "lab" / "results", tmp_path / "lab" / "copy")
    assert runs.find(copy.joinpath(*PLACE)).log == copy.joinpath(*PLACE, "run.log")
    beside = shutil.copytree(original.folder, original.folder.with_name("t2"))
    assert runs.find(beside).log == beside / "run.log"


def test_a_copied_project_runs_its_recipe_again_in_its_own_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "lab").mkdir()
    monkeypatch.chdir(tmp_path / "lab")
    as_it_was = recipe.load(overrides=["model.id=miniature", "task=t"])
    made = runs.create(as_it_was)
    made.describe(as_it_was)
    train(made, 1)
    shutil.copytree(tmp_path / "lab", tmp_path / "mine")
    before = contents(tmp_path / "lab")
    monkeypatch.chdir(tmp_path / "mine")
    copy = runs.create(as_it_was)
    copy.describe(as_it_was)
    assert copy.finished("train backdoored", {"seed": 1})
    train(copy, 2)
    assert contents(tmp_path / "lab") == before
    assert runs.find(copy.folder) == copy


def test_no_scratch_is_recorded_where_none_was_set(tmp_path: Path) -> None:
    made = project_of(tmp_path / "lab")
    assert "scratch" not in made.manifest
    assert runs.find(made.folder) == made


def test_a_run_has_its_own_scratch_back(tmp_path: Path) -> None:
    made = project_of(tmp_path / "lab", f"output.scratch={tmp_path}/fast")
    assert made.scratch == tmp_path.joinpath("fast", *PLACE)
    assert runs.find(made.folder) == made
    shutil.rmtree(tmp_path / "fast")
    assert runs.find(made.folder) == made, "whatever cleans scratch folders does not take the place away"


def test_a_copy_reads_the_scratch_of_its_original_and_writes_into_itself(tmp_path: Path) -> None:
    made = project_of(tmp_path / "lab", f"output.scratch={tmp_path}/fast")
    copy = runs.find(shutil.copytree(made.folder, tmp_path / "mine"))
    before = contents(tmp_path / "fast"), contents(tmp_path / "lab")
    assert copy.finished("train backdoored", {"seed": 1})
    assert copy.path_of("scratch:training/weights").read_text() == "weights 1"
    with copy.lock():
        train(copy, 2)
    assert (contents(tmp_path / "fast"), contents(tmp_path / "lab")) == before
    again = runs.find(copy.folder)
    assert again.finished("train backdoored", {"seed": 2})
    assert again.path_of("scratch:training/weights") == copy.folder / "training" / "weights"


def test_a_copy_takes_nothing_that_its_original_has_made_anew_since(tmp_path: Path) -> None:
    made = project_of(tmp_path / "lab", f"output.scratch={tmp_path}/fast")
    copy = runs.find(shutil.copytree(made.folder, tmp_path / "mine"))
    train(made, 2)
    assert not copy.finished("train backdoored", {"seed": 1})
    assert not copy.path_of("scratch:training/weights").exists()
    with pytest.raises(
        runs.InputError, match=r"weights are not in .*fast.* Copy what lay there into the run"
    ):
        Experiment.find(copy.folder).model_folder("backdoored")


def test_a_scratch_that_was_copied_into_the_copy_is_found_there(tmp_path: Path) -> None:
    made = project_of(tmp_path / "lab", f"output.scratch={tmp_path}/fast")
    copy = runs.find(shutil.copytree(made.folder, tmp_path / "mine"))
    shutil.copytree(made.scratch, copy.folder, dirs_exist_ok=True)
    shutil.rmtree(made.scratch)
    assert copy.finished("train backdoored", {"seed": 1})


def test_a_moved_run_keeps_its_scratch_and_the_second_copy_does_not_get_it(tmp_path: Path) -> None:
    made = project_of(tmp_path / "lab", f"output.scratch={tmp_path}/fast")
    second = shutil.copytree(made.folder, tmp_path / "second")
    moved = runs.find(shutil.move(made.folder, tmp_path / "moved"))
    assert moved.scratch == made.scratch
    with moved.lock():
        train(moved, 2)
    assert runs.find(second).scratch == second
    assert runs.find(moved.folder).scratch == made.scratch


def test_a_project_that_moves_with_its_scratch_goes_on_in_both(tmp_path: Path) -> None:
    made = project_of(tmp_path / "lab", f"output.scratch={tmp_path}/lab/scratch")
    shutil.copytree(tmp_path / "lab", tmp_path / "mine")
    before = contents(tmp_path / "lab")
    copy = runs.find(tmp_path.joinpath("mine", "results", *PLACE))
    assert copy.scratch == tmp_path.joinpath("mine", "scratch", *PLACE)
    assert copy.finished("train backdoored", {"seed": 1})
    with copy.lock():
        train(copy, 2)
    assert contents(tmp_path / "lab") == before
    assert (
        runs.create(plan(tmp_path / "mine", f"output.scratch={tmp_path}/mine/scratch")).scratch
        == copy.scratch
    )
    shutil.move(tmp_path / "lab", tmp_path / "office")
    moved = runs.find(tmp_path.joinpath("office", "results", *PLACE))
    assert moved.scratch == tmp_path.joinpath("office", "scratch", *PLACE)
    assert moved.finished("train backdoored", {"seed": 1})
    assert not made.folder.exists()


def test_nobody_can_tell_whether_a_run_of_another_machine_is_gone(tmp_path: Path) -> None:
    made = project_of(tmp_path / "lab", f"output.scratch={tmp_path}/fast")
    mark = json.loads((made.scratch / MARK).read_text())
    (made.scratch / MARK).write_text(json.dumps(mark | {"folder": "/home/ann/results/t", "host": "another"}))
    shutil.move(made.folder, tmp_path / "mine")
    assert runs.find(tmp_path / "mine").scratch == tmp_path / "mine"


def test_two_projects_with_one_scratch_do_not_share_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAFETYNET_SCRATCH", str(tmp_path / "fast"))
    one = project_of(tmp_path / "lab")
    other = project_of(tmp_path / "office")
    assert one.scratch != other.scratch
    assert one.scratch.parent == other.scratch.parent
    for made, project in ((one, "lab"), (other, "office")):
        assert runs.create(plan(tmp_path / project)) == made
        assert runs.find(made.folder) == made


def test_a_copied_project_with_a_scratch_repeats_no_stage_and_writes_beside_the_original(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAFETYNET_SCRATCH", str(tmp_path / "fast"))
    made = project_of(tmp_path / "lab")
    shutil.copytree(tmp_path / "lab", tmp_path / "mine")
    before = contents(made.scratch)
    copy = runs.create(plan(tmp_path / "mine"))
    copy.describe(plan(tmp_path / "mine"))
    assert copy.finished("train backdoored", {"seed": 1})
    assert runs.find(copy.folder).finished("train backdoored", {"seed": 1})
    train(copy, 2)
    assert contents(made.scratch) == before
    assert (copy.scratch / "training" / "weights").read_text() == "weights 2"


@pytest.mark.parametrize("path", ["/proc/1/nope/run.log", "/dev/full"])
def test_a_log_that_cannot_be_written_stops_nothing_and_is_told_once(
    path: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with logging_to(Path(path)):
        for word in ("one", "two"):
            logging.getLogger("safetynet").info(word)
    said = capsys.readouterr().err
    assert said.count(f"The log {path} cannot be written (") == 1
    assert "one\n" in said and "two\n" in said
    assert "Traceback" not in said


def test_a_recipe_whose_logs_cannot_be_written_is_run_all_the_same(tmp_path: Path) -> None:
    made = runs.create(plan(tmp_path, "output.logs=/proc/1/nope"))
    assert made.folder.is_dir()


def test_tasks_that_differ_behind_a_dot_have_logs_of_their_own(tmp_path: Path) -> None:
    logs = {runs.place(plan(tmp_path, f"task=rate.{n}")).log.name for n in (1, 2)}
    assert logs == {"rate.1.log", "rate.2.log"}


def test_relative_paths_of_a_recipe_begin_where_the_run_was_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab, elsewhere = tmp_path / "lab", tmp_path / "elsewhere"
    (lab / "models" / "tiny").mkdir(parents=True)
    elsewhere.mkdir()
    for folder, text in ((lab, "the run's"), (elsewhere, "another")):
        (folder / "labelled.csv").write_text(text)
    monkeypatch.chdir(lab)
    typed = recipe.load(
        overrides=[
            "task=t",
            "model.id=models/tiny",
            "evaluation.labelled=labelled.csv",
            "data.path=gone.json",
        ]
    )
    made = runs.create(typed)
    made.describe(typed)
    assert made.recipe == typed, "opened where it was made, it is what was typed"
    monkeypatch.chdir(elsewhere)
    opened = runs.find(made.folder).recipe
    assert opened.model.id == str(lab / "models" / "tiny")
    assert opened.evaluation.labelled is not None
    assert opened.evaluation.labelled.read_text() == "the run's"
    assert opened.data.path == "gone.json", "what never was a file here may be a name on the hub"
    assert runs.find(made.folder).recorded_recipe == typed
    shutil.move(lab, tmp_path / "office")
    moved = runs.find(tmp_path / "office" / "results" / "qwen" / "t").recipe
    assert moved.model.id == str(tmp_path / "office" / "models" / "tiny")
    shutil.rmtree(tmp_path / "office" / "models")
    lost = runs.find(tmp_path / "office" / "results" / "qwen" / "t").recipe.model.id
    assert lost == str(tmp_path / "office" / "models" / "tiny"), "a folder that is lost is no name on the hub"


def test_a_copy_of_a_run_that_is_worked_on_is_free(tmp_path: Path) -> None:
    made = project_of(tmp_path / "lab")
    with made.lock():
        copy = runs.find(shutil.copytree(made.folder, tmp_path / "mine"))
        assert locking.holder(copy.folder) is None
        with copy.lock():
            assert locking.holder(copy.folder) is not None
        assert locking.holder(made.folder) is not None


def test_jobs_of_the_original_are_no_jobs_of_its_copy(tmp_path: Path) -> None:
    made = project_of(tmp_path / "lab")
    records.write(made.folder, records.Job("qwen-1", "slurm", "", "", "", id="7"))
    copy = shutil.copytree(made.folder, tmp_path / "mine")
    assert records.read(copy) == []
    assert [job.id for job in records.read(made.folder)] == ["7"]
    moved = shutil.move(made.folder, tmp_path / "moved")
    assert [job.id for job in records.read(Path(moved))] == ["7"]


def test_a_run_that_nobody_may_write_to_is_named_by_what_writes_and_read_by_what_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = project_of(tmp_path / "lab")
    (made.folder / ".lock").mkdir()  # as where a lock cannot be made

    def said(*words: str) -> str:
        monkeypatch.setattr(sys, "argv", ["safetynet", words[0], str(made.folder), *words[1:]])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 2
        return capsys.readouterr().err

    assert "cannot be written (Is a directory). Copy the run to where it can." in said("plot")
    assert "there is no adapter_config.json" in said("evaluate", "--adapter", "nowhere"), (
        "it reads the run only"
    )


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_run_folder_that_is_read_only_is_named(tmp_path: Path) -> None:
    made = project_of(tmp_path / "lab")
    made.folder.chmod(0o555)
    with pytest.raises(runs.InputError, match=r"cannot be written .* Copy the run"), made.lock():
        pass
