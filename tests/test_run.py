"""The run directory: atomic writes, stages that are skipped or set aside, folders that cannot be used."""

import json
from pathlib import Path

import pandas as pd
import pytest

from safetynet import recipe
from safetynet.errors import InputError, RunError
from safetynet.recipe import Recipe
from safetynet.run import directory as runs
from safetynet.run.directory import Run


@pytest.fixture
def plan(tmp_path: Path) -> Recipe:
    return recipe.load(
        family="qwen",
        overrides=[f"output.results={tmp_path}/results", f"output.logs={tmp_path}/logs", "task=t"],
    )


@pytest.fixture
def run(plan: Recipe) -> Run:
    made = runs.create(plan)
    made.describe(plan)
    return made


def finish(run: Run, inputs: dict[str, object], value: int) -> None:
    with run.stage("s", inputs) as outputs:
        outputs.table("t", pd.DataFrame({"value": [value]}))


def test_results_lie_under_model_and_task(run: Run, tmp_path: Path) -> None:
    assert run.folder == tmp_path / "results" / "qwen" / "t"
    assert run.log == tmp_path / "logs" / "qwen" / "t.log"
    manifest = json.loads((run.folder / "manifest.json").read_text())
    assert manifest["recipe"]["model"]["family"] == "qwen"
    assert manifest["versions"]["torch"]
    assert manifest["hardware"]["cores"] >= 1


def test_scratch_takes_large_artefacts(plan: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAFETYNET_SCRATCH", str(tmp_path / "scratch"))
    assert runs.create(plan).scratch == tmp_path / "scratch" / "qwen" / "t"


def test_a_finished_stage_is_known_by_its_inputs_and_outputs(run: Run) -> None:
    finish(run, {"a": 1}, 1)
    assert run.finished("s", {"a": 1})
    assert not run.finished("s", {"a": 2})
    run.write_table("t", pd.DataFrame({"value": [9]}))
    assert not run.finished("s", {"a": 1}), "an output that was changed by hand has to be made again"


def test_outputs_of_a_stage_with_other_inputs_are_set_aside_not_overwritten(run: Run) -> None:
    finish(run, {"a": 1}, 1)
    finish(run, {"a": 2}, 2)
    (kept,) = (run.folder / "earlier").iterdir()
    assert pd.read_parquet(kept / "t.parquet")["value"].tolist() == [1]
    assert run.table("t")["value"].tolist() == [2]


def test_a_stage_that_fails_is_not_recorded(run: Run) -> None:
    with pytest.raises(RuntimeError, match="no"), run.stage("s", {"a": 1}):
        raise RuntimeError("no")
    assert not run.finished("s", {"a": 1})


def test_a_stage_that_fails_before_it_writes_leaves_the_outputs_of_before_in_place(run: Run) -> None:
    finish(run, {"a": 1}, 1)
    before = run.manifest
    with pytest.raises(InputError, match="no such trigger"), run.stage("s", {"a": 2}):
        raise InputError("no such trigger")
    assert run.finished("s", {"a": 1})
    assert run.table("t")["value"].tolist() == [1]
    assert run.manifest == before
    assert not list((run.folder / "earlier").iterdir())


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "file"
    runs.write_text(path, "first")

    def full(temporary: Path) -> None:
        temporary.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(RunError, match=r"No space left on device.*untouched"):
        runs.write_atomically(path, full)
    assert path.read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]


def test_a_second_process_on_the_same_run_is_refused(run: Run) -> None:
    with run.lock(), pytest.raises(InputError, match="another process works on this run"), run.lock():
        pass


def test_a_results_root_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    plan = recipe.load(family="qwen", overrides=[f"output.results={blocked}"])
    with pytest.raises(InputError, match=r"output\.results: .* cannot be written"):
        runs.create(plan)


def test_a_full_disk_is_refused_before_anything_starts(plan: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "LEAST_FREE_BYTES", 2**62)
    with pytest.raises(InputError, match=r"output\.results: .* MB free, a run wants"):
        runs.create(plan)


def test_a_missing_table_names_those_that_exist(run: Run) -> None:
    finish(run, {}, 1)
    with pytest.raises(InputError, match=r"no such table \(there are: t\)"):
        run.table("evaluation")


def test_a_damaged_table_and_a_damaged_manifest_are_named(run: Run) -> None:
    finish(run, {}, 1)
    (run.folder / "tables" / "t.parquet").write_bytes(b"broken")
    with pytest.raises(InputError, match=r"t\.parquet: the table is damaged"):
        run.table("t")
    (run.folder / "manifest.json").write_text("{")
    with pytest.raises(InputError, match=r"manifest\.json: the manifest is damaged"):
        run.finished("s", {})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1]", "it holds no stages"),
        ('{"stages": 3}', "it holds no stages"),
        ("{}", "recipe: Input should be a valid dictionary"),
        (
            '{"recipe": {"training": {"method": "qlora"}}}',
            r"recipe\.training\.method: Input should be 'lora'",
        ),
    ],
)
def test_a_manifest_of_another_version_is_refused_by_file_and_field(
    run: Run, content: str, message: str
) -> None:
    (run.folder / "manifest.json").write_text(content)
    with pytest.raises(InputError, match=rf"manifest\.json: .*{message}"):
        _ = runs.find(run.folder).recipe


def test_a_run_is_found_with_its_scratch_and_its_log(run: Run) -> None:
    assert runs.find(run.folder) == run


def test_a_run_that_cannot_be_locked_is_refused(run: Run) -> None:
    (run.folder / ".lock").mkdir()
    with pytest.raises(InputError, match=r"cannot be written .* Copy the run"), run.lock():
        pass


def test_a_folder_without_manifest_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="this is no run directory"):
        runs.find(tmp_path)


def test_a_table_that_lacks_a_column_is_refused_with_the_command_that_makes_it(run):
    lens = {"run": ["placebo"], "layer": [0], "value": [-1.0], "low": [-2.0], "high": [0.0], "n": [8]}
    path = run.write_table("lens", pd.DataFrame(lens))
    pd.DataFrame(lens).drop(columns="layer").to_parquet(path)
    match = r"lens\.parquet: .* another version \(lens: column layer is missing; .* safetynet intervene "
    with pytest.raises(InputError, match=match):
        run.table("lens")
