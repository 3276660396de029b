"""`safetynet compare` as a user meets it, on run directories with tables made by hand."""

import json
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from tests.commands import safetynet

from safetynet.comparison.stage import compare
from safetynet.errors import InputError
from safetynet.experiment import Experiment

FEW: dict[str, None] = dict.fromkeys(("effects", "tradeoff", "detection", "dynamics_backdoored"))
"""Tables without which a run draws one figure only, so that a test takes a second."""


def test_the_command_writes_page_tables_and_figures_and_does_it_once(
    written: Callable[..., Path], tmp_path: Path
) -> None:
    folders = [written(family, seed) for family in ("qwen", "gemma") for seed in range(2)]
    done = safetynet("compare", *folders, "--out", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Injection speed" in done.stdout
    assert f"Comparison: {tmp_path / 'out' / 'comparison.md'}" in done.stdout
    figures = {path.name for path in (tmp_path / "out" / "figures").iterdir()}
    for name in ("speed", "profiles", "components", "agreement", "outcomes"):
        assert {f"compare-{name}.{suffix}" for suffix in ("png", "pdf", "svg", "html", "csv")} <= figures
        assert {f"compare-{name}-table.{suffix}" for suffix in ("tex", "md", "csv")} <= figures
    page = (tmp_path / "out" / "comparison.md").read_text()
    assert page.startswith("# Comparison\n\n4 runs, 2 groups; runs of one group differ in their seed alone.")
    written_at = (tmp_path / "out" / "comparison.md").stat().st_mtime_ns
    again = safetynet("compare", *folders, "--out", "out", cwd=tmp_path)
    assert again.returncode == 0
    assert (tmp_path / "out" / "comparison.md").stat().st_mtime_ns == written_at


def test_another_comparison_in_the_same_folder_sets_the_earlier_one_aside(
    written: Callable[..., Path], tmp_path: Path
) -> None:
    folders = [written(seed=seed, **FEW) for seed in range(3)]
    first = compare(folders[:2], tmp_path / "out").page.read_text()
    compare(folders, tmp_path / "out")
    [kept] = (tmp_path / "out" / "earlier").glob("compare-*/comparison.md")
    assert kept.read_text() == first
    assert "3 runs" in (tmp_path / "out" / "comparison.md").read_text()


def test_runs_lacking_stages_show_what_is_there_and_say_what_is_missing(
    written: Callable[..., Path], tmp_path: Path
) -> None:
    bare = written(seed=0, **FEW)
    found = compare([bare, written(seed=1, effects=None)], tmp_path / "out")
    said = " ".join(found.notes)
    assert f"No run has the table effects. Make it: safetynet intervene {bare};" in said
    assert f"1 of 2 runs lack the table detection. Make it: safetynet detect {bare}." in said
    assert "evaluation.dynamics_rows=40" in said
    assert found.tables["outcomes_by_group"]["seeds"].max() == 2
    assert said[:40] in found.page.read_text()


def test_a_table_of_a_stage_that_did_not_end_does_not_count(
    written: Callable[..., Path], tmp_path: Path
) -> None:
    few = {name: None for name in FEW if name != "detection"}
    folder = written(seed=0, **few)
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["stages"]["detect"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    found = compare([folder, written(seed=1, **few)], tmp_path / "out")
    assert f"1 of 2 runs lack the table detection. Make it: safetynet detect {folder}." in found.notes


def spoil(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


def alter(path: Path) -> None:
    pd.read_parquet(path).assign(effect=0.0).to_parquet(path)


@pytest.mark.parametrize(
    ("spoiling", "message"),
    [
        (spoil, r"effects\.parquet: the table is damaged"),
        (alter, r"effects\.parquet: .* is not what its stage"),
    ],
)
def test_a_damaged_table_is_named(
    written: Callable[..., Path], tmp_path: Path, spoiling: Callable[[Path], None], message: str
) -> None:
    folder = written()
    spoiling(folder / "tables" / "effects.parquet")
    with pytest.raises(InputError, match=message):
        compare([folder, written(seed=1)], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_refuses_with_one_sentence_and_exit_code_2(
    written: Callable[..., Path], tmp_path: Path
) -> None:
    done = safetynet("compare", written(), "nowhere", cwd=tmp_path)
    assert done.returncode == 2
    # libraries may have said something before
    assert done.stderr.splitlines()[-1].startswith("safetynet: nowhere: this is no run directory")
    assert "Traceback" not in done.stderr


def test_runs_that_were_not_swept_by_component_are_compared_by_what_they_have(
    written: Callable[..., Path], tables: Callable, tmp_path: Path
) -> None:
    effects = tables()["effects"]
    swept = {**FEW, "effects": effects[effects["sweep"] == "layer"]}
    found = compare([written("qwen", seed, **swept) for seed in range(2)], tmp_path / "out")
    assert "## " in found.page.read_text(encoding="utf-8")
    assert not list((tmp_path / "out").rglob("shares*"))


def test_a_table_that_is_gone_is_named(written: Callable[..., Path], tmp_path: Path) -> None:
    folder = written()
    (folder / "tables" / "effects.parquet").unlink()
    with pytest.raises(InputError, match=r"effects\.parquet: there is no such table"):
        compare([folder, written(seed=1)], tmp_path / "out")


def test_what_cannot_be_compared_is_refused_before_anything_is_written(
    written: Callable[..., Path], tables: Callable, tmp_path: Path
) -> None:
    other = tables()["effects"].assign(metric="kl")
    first, second, odd = written(), written(seed=1), written("gemma", effects=other)
    out = tmp_path / "out"
    (tmp_path / "empty").mkdir()
    for folders, message in (
        ([first], "1 run is given; a comparison needs two or more"),
        ([first, first], "have the same settings and the same seed"),
        ([first, tmp_path / "empty"], "this is no run directory"),
        ([first, second, odd], "effects by layer are of different metrics"),
    ):
        with pytest.raises(InputError, match=message):
            compare(folders, out)
    assert not out.exists()


def test_a_comparison_is_no_run_and_a_run_no_place_for_one(
    written: Callable[..., Path], tmp_path: Path
) -> None:
    folders = [written(seed=seed, **FEW) for seed in range(2)]
    made = compare(folders, tmp_path / "out").page.parent
    with pytest.raises(InputError, match="this is a comparison, not a run"):
        compare([made, folders[0]], tmp_path / "other")
    with pytest.raises(InputError, match=r"--out: .* is a run itself"):
        compare(folders, folders[0])


@pytest.mark.parametrize("out", ["/proc/nowhere", "taken"])
def test_a_folder_that_cannot_be_written_is_refused(
    written: Callable[..., Path], tmp_path: Path, out: str
) -> None:
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(InputError, match=r"--out: .* cannot be written"):
        compare([written(), written(seed=1)], tmp_path / out)


def test_mixed_versions_of_safetynet_are_refused_and_of_packages_said(
    written: Callable[..., Path], tmp_path: Path
) -> None:
    folders = [written(seed=seed, **FEW) for seed in range(2)]
    path = folders[1] / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["versions"]["torch"] = "2.6.0"
    path.write_text(json.dumps(manifest))
    assert any(note.startswith("Mixed versions of torch") for note in compare(folders, tmp_path / "o").notes)
    manifest["versions"]["safetynet"] = "0.0.1"
    path.write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="different versions of SafetyNet"):
        compare(folders, tmp_path / "o")


def test_a_manifest_without_recipe_is_refused(written: Callable[..., Path], tmp_path: Path) -> None:
    folder = written()
    (folder / "manifest.json").write_text('{"stages": {}, "recipe": {"seed": "x"}}')
    with pytest.raises(InputError, match=r"recipe\.seed"):
        compare([folder, written(seed=1)], tmp_path / "out")


@pytest.mark.slow
def test_two_tiny_runs_are_compared_from_training_to_figures(tmp_path: Path) -> None:
    from safetynet import recipe as recipes
    from safetynet import stages

    recipe_file = Path(__file__).parents[2] / "recipes" / "qwen-miniature.yaml"
    small = [
        "data.train_rows=640", "data.test_rows=40", "evaluation.dynamics_rows=10", "evaluation.every=20",
        "training.learning_rate=0.004", "training.clean_twin=false", f"output.results={tmp_path / 'results'}",
        f"output.logs={tmp_path / 'logs'}",
    ]  # fmt: skip
    folders = []
    for seed in range(2):
        recipe = recipes.load(recipe_file, None, [*small, f"seed={seed}", f"task=seed-{seed}"])
        experiment = Experiment.create(recipe)
        for stage in (stages.prepare, stages.train, stages.evaluate):
            stage(experiment)
        options = recipes.Interventions(by=("layer", "component", "head"), observe=False, removals=False)
        stages.intervene(experiment, options)
        folders.append(experiment.run.folder)
    found = compare(folders, tmp_path / "out")
    assert set(found.tables["runs"]["group"]) == {"qwen"}
    speeds = found.tables["speeds"]
    assert (speeds["between_low"] <= speeds["steps"].fillna(speeds["last_step"])).all()
    assert found.tables["centres"][["centre"]].apply(lambda own: own.between(0, 1)).all(axis=None)
    assert any("detection" in note for note in found.notes)
    assert (tmp_path / "out" / "figures" / "compare-profiles.pdf").exists()
