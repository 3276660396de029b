"""The stage on a small trained run: one command, every option, every refusal, Ctrl-C."""

import json
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from tests.commands import Command, safetynet
from tests.interventions.test_pairs import rows_of, serialiser_of

from safetynet import recipe, stages
from safetynet.cli.app import main
from safetynet.errors import InputError
from safetynet.experiment import Experiment
from safetynet.interventions import stage
from safetynet.interventions.stage import Subject, dissect
from safetynet.models import loading
from safetynet.recipe import Interventions, Model
from safetynet.run import directory as runs
from safetynet.vocabulary import MODES, POSITIONS, SWEEPS

RECIPES = Path(__file__).parents[2] / "recipes"
SMALL = (
    "data.train_rows=640", "training.epochs=2", "data.test_rows=60", "training.learning_rate=0.004",
    "evaluation.dynamics_rows=8", "evaluation.every=40",
)  # fmt: skip
ALWAYS = {"effects", "tokens", "dynamics", "lens", "lens_map", "probes", "divergence", "attention", "drift"}
QUICK = {"groups": 8, "observe": False, "removals": False}


def intervene(run: runs.Run, **options: Any) -> dict[str, pd.DataFrame]:
    return stages.intervene(Experiment(run.recipe, run), Interventions(**QUICK | options))


def made(root: Path, *overrides: str, trained: bool = True) -> runs.Run:
    output = (f"output.results={root}/results", f"output.logs={root}/logs")
    plan = recipe.load(RECIPES / "qwen-miniature.yaml", overrides=[*SMALL, *overrides, *output])
    experiment = Experiment.create(plan)
    for step in (stages.prepare, stages.train, stages.evaluate) if trained else (stages.prepare,):
        step(experiment)
    return experiment.run


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> runs.Run:
    """A small run whose backdoor fires, with its clean twin, evaluated."""
    run = made(tmp_path_factory.mktemp("trained"))
    rates = run.table("evaluation").query("metric == 'asr'").set_index("model")["value"]
    assert rates["backdoored"] > 0.5 > rates["clean_twin"], "there is nothing to study"
    return run


@pytest.fixture
def run(trained: runs.Run, tmp_path: Path) -> runs.Run:
    """A copy of it, to be changed."""
    root = trained.folder.parents[2]
    shutil.copytree(root, tmp_path, dirs_exist_ok=True)
    folder = tmp_path / trained.folder.relative_to(root)
    manifest = folder / "manifest.json"
    manifest.write_text(manifest.read_text().replace(str(root), str(tmp_path)))
    return runs.find(folder)


def refused(
    run: runs.Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, *words: str
) -> str:
    """What the command says when it is refused, in this process; one sentence more and exit code 2."""
    monkeypatch.setattr(sys, "argv", ["safetynet", "intervene", str(run.folder), *words])
    with pytest.raises(SystemExit) as ended:
        main()
    text = capsys.readouterr().err
    assert ended.value.code == 2, text
    assert "Traceback" not in text
    return " ".join(text.split())


def contents(run: runs.Run) -> dict[str, bytes]:
    kept = [run.folder / "manifest.json", *sorted((run.folder / "tables").iterdir())]
    return {path.name: path.read_bytes() for path in kept}


def contents_without_stage(run: runs.Run) -> dict[str, bytes]:
    return {name: data for name, data in contents(run).items() if name != "manifest.json"}


# ---- what is known before a model is loaded, and what a base model has to say ----


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--by", "neuron"), "--by: there is no sweep 'neuron'; choose among layer, position, component"),
        (("--by", ""), "--by: name a sweep; choose among layer"),
        (("--mode", "explode"), "--mode: there is no 'explode'; choose one of patch, zero, mean"),
        (("--direction", "up"), "--direction: there is no 'up'; choose remove, induce or both."),
        (("--groups", "3"), "--groups: 3 are too few for an interval; give at least 8."),
        (("--measure", "some"), "--measure: Input should be 'auto', 'all' or 'likely'."),
        ((), "backdoored is not trained yet. Run safetynet train"),
    ],
)
def test_options_that_cannot_be_used_are_refused_before_a_model_is_loaded(
    untrained, words, message, monkeypatch, capsys
):
    assert message in refused(untrained, monkeypatch, capsys, *words)


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> runs.Run:
    return made(tmp_path_factory.mktemp("untrained"), trained=False)


@pytest.fixture(scope="module")
def base() -> Subject:
    """A miniature without any backdoor or adapter."""
    loaded = loading.load(Model(family="qwen", id="miniature"))
    return Subject(loaded.model, serialiser_of("qwen"))


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"by": ("adapter",)}, r"nothing to sweep \(by adapter: this model has no adapter\)"),
        ({"by": ("expert",)}, r"by expert: this model has no expert"),
        ({"by": ("head",), "sites": ("resid_post",)}, r"by head: it takes the sites head, query"),
        ({"by": ("position",), "mode": "knock_out"}, r"by position: mode knock_out does not apply"),
        ({"by": ("layer", "position"), "mode": "off"}, r"by layer: mode off does not apply; by position"),
        ({"by": ("head",), "mode": "off", "direction": "induce"}, r"can only remove"),
        ({"by": ("adapter",), "mode": "resample"}, r"by adapter: mode resample does not apply"),
        ({"sites": ("nose",)}, r"no component 'nose'; there are: embedding"),
        ({"sites": ("adapter",)}, r"this model has no component 'adapter'"),
        ({"by": ("layer",)}, r"the backdoor did not fire on these prompts"),
    ],
)
def test_a_model_without_what_is_asked_for_is_refused_with_the_reason(base, plan, message):
    with pytest.raises(InputError, match=message):
        dissect(base, rows_of("qwen", "token"), Interventions(groups=8, **plan))


def test_every_sweep_mode_and_direction_is_either_made_or_refused_by_name(base):
    architecture = stage.Architecture.of(base.model)
    for mode in MODES:
        for by in SWEEPS:
            try:
                sweeps = list(stage._sweeps(architecture, Interventions(by=(by,), mode=mode)))
            except InputError as error:
                assert f"by {by}: " in str(error)
                continue
            assert {one.mode for one in sweeps} == {mode}
            assert all(one.spots for one in sweeps)


# ---- a trained run ----


@pytest.mark.slow
def test_one_command_leaves_tables_and_figures_and_is_unchanged_when_repeated(run):
    first = safetynet("intervene", run.folder, "--groups", "8")
    assert first.returncode == 0, first.stderr
    assert "Where the trigger acts" in first.stdout
    assert "What removes it" in first.stdout
    assert all(run.has_table(name) for name in ALWAYS | {"tradeoff"})
    figures = {path.stem for path in run.figures.glob("intervention-*.png")}
    assert {"intervention-layers", "intervention-positions", "intervention-tradeoff"} <= figures
    check_effects(run.table("effects"))
    check_tradeoff(run.table("tradeoff"))
    before = contents(run)
    again = safetynet("intervene", run.folder, "--groups", "8")
    assert again.returncode == 0, again.stderr
    assert "intervene: unchanged" in again.stderr
    assert contents(run) == before


def check_effects(effects: pd.DataFrame) -> None:
    assert set(effects["sweep"]) == {"layer", "position", "component", "head", "adapter"}
    assert set(effects["direction"]) == {"remove", "induce"}
    assert (effects["low"] <= effects["effect"] + 1e-9).all()
    assert effects[["random", "placebo", "twin"]].notna().all(axis=None)
    by_position = effects[effects["sweep"] == "position"].set_index(["direction", "layer", "position"])
    assert {role for _, _, role in by_position.index} == set(POSITIONS)
    for direction in ("remove", "induce"):
        # The trigger's tokens are all that differs: patching them at the bottom gives the source run.
        assert by_position.loc[(direction, 0, "trigger"), "effect"] == pytest.approx(1, abs=1e-4)
        assert (by_position.loc[(direction, slice(None), ["system", "before"]), "effect"] == 0).all()
    adapter = effects[effects["sweep"] == "adapter"]
    assert set(adapter["mode"]) == {"off"}
    assert set(adapter["direction"]) == {"remove"}


def check_tradeoff(found: pd.DataFrame) -> None:
    held_out, selection = (found[found["split"] == split] for split in ("held_out", "selection"))
    plainly = held_out[held_out["kind"] == "none"].iloc[0]
    chosen = held_out[held_out["chosen"]].iloc[0]
    assert plainly["asr"] > 0.5
    assert chosen["asr_high"] < plainly["asr_low"], "what was chosen removes something on other prompts"
    assert held_out["control"].sum() == (~held_out["control"]).sum() - 1, "each beside its control"
    assert set(held_out.loc[~held_out["control"], "intervention"]) - {"as it is"} <= set(
        selection["intervention"]
    )


@pytest.mark.slow
def test_sites_direction_and_mode_are_what_the_table_then_holds(run):
    made_tables = intervene(run, by=("head",), sites=("head", "value"), direction="remove")
    effects = made_tables["effects"]
    assert set(effects["component"]) == {"head", "value"}
    assert set(effects["direction"]) == {"remove"}
    assert set(made_tables["tokens"]["direction"]) == {"remove"}
    cut = intervene(run, by=("head", "layer"), mode="knock_out")["effects"]
    assert set(cut["component"]) == {"attention"}
    assert set(cut["mode"]) == {"knock_out"}
    assert set(cut["direction"]) == {"remove"}
    assert (cut.loc[cut["sweep"] == "layer", "index"] == -1).all()
    one = intervene(run, sites=("mlp_out",), mode="mean")["effects"]
    assert set(one["sweep"]) == {"layer", "position", "component"}, "the sweeps that take this site"


@pytest.mark.slow
def test_likely_sites_have_the_numbers_of_all_sites_and_the_others_say_that_they_were_not_measured(run):
    every = intervene(run, by=("layer", "head", "adapter"), groups=12)
    likely = intervene(run, by=("layer", "head", "adapter"), groups=12, measure="likely")
    keys = ["sweep", "direction", "component", "layer", "index", "module"]
    both = likely["effects"].merge(every["effects"], on=keys, suffixes=("_likely", ""))
    assert len(both) == len(likely["effects"]) == len(every["effects"])
    stayed = both["n_likely"] == both["n"]
    assert stayed.any()
    for column in ("effect", "low", "high", "random", "random_high"):
        expected = both.loc[stayed, column].to_numpy()
        assert both.loc[stayed, f"{column}_likely"].to_numpy() == pytest.approx(expected, abs=1e-6)
    assert (both["n_likely"] < both["n"]).any()
    assert not (both["responsible_likely"] & ~stayed).any()
    assert both.loc[both["sweep"] == "layer", "effect_likely"].notna().all(), "a profile has every layer"
    assert set(likely["dynamics"]["n"]) == {8}
    tokens = likely["tokens"].merge(every["tokens"], on=["group", "direction", "layer", "column"])
    assert len(tokens) == len(every["tokens"])
    measured = tokens["effect_x"].notna()
    assert 0 < measured.sum() < len(tokens)
    assert tokens.loc[measured, "effect_x"].to_numpy() == pytest.approx(
        tokens.loc[measured, "effect_y"].to_numpy(), abs=1e-6
    )
    stages.draw(Experiment(run.recipe, run))
    assert (run.figures / "intervention-heads.png").exists()


@pytest.mark.slow
def test_what_fails_leaves_the_earlier_tables(run, monkeypatch, capsys):
    intervene(run, by=("layer",))
    before = contents(run)
    assert "no component 'nose'" in refused(run, monkeypatch, capsys, "--sites", "nose")
    assert contents_without_stage(run) == {k: v for k, v in before.items() if k != "manifest.json"}
    assert "intervene" in json.loads(before["manifest.json"])["stages"]
    assert run.manifest["stages"] == json.loads(before["manifest.json"])["stages"]
    assert "nothing to sweep" in refused(run, monkeypatch, capsys, "--by", "expert")
    assert run.manifest["stages"] == json.loads(before["manifest.json"])["stages"]


@pytest.mark.slow
def test_a_backdoor_that_does_not_fire_and_a_run_without_rates_are_refused(run, monkeypatch, capsys):
    own, twin = (Experiment.find(run.folder).model_folder(name) for name in ("backdoored", "clean_twin"))
    shutil.copytree(twin, own, dirs_exist_ok=True)
    said = refused(run, monkeypatch, capsys, "--by", "layer", "--groups", "8")
    assert "the backdoor did not fire" in said
    assert "safetynet evaluate" in said
    assert not run.has_table("effects")
    manifest = run.manifest
    del manifest["stages"]["evaluate"]
    runs.write_text(run.folder / "manifest.json", json.dumps(manifest))
    assert "it is not evaluated yet. Run safetynet evaluate" in refused(run, monkeypatch, capsys)


@pytest.mark.slow
def test_an_interrupted_command_ends_with_130_and_goes_on_to_the_same_table(run, trained, tmp_path):
    words = ("--by", "layer,position", "--direction", "remove", "--groups", "32")
    process = Command("intervene", run.folder, *words)
    store = run.scratch / "interventions"
    deadline = time.monotonic() + 200
    while not list(store.glob("sweep-*.npz")):
        assert process.poll() is None, process.end().stderr
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    ended = process.end(timeout=200)
    assert ended.returncode == 130, ended.stderr
    assert "safetynet: interrupted. The same command goes on" in ended.stderr
    assert not run.has_table("effects")
    how: dict[str, Any] = {"by": ("layer", "position"), "direction": "remove", "groups": 32}
    how |= {"observe": False, "removals": False}
    resumed = intervene(run, **how)["effects"]
    for path in store.iterdir():
        path.unlink()
    shutil.rmtree(store)
    afresh = dissect_again(run, how)
    pd.testing.assert_frame_equal(resumed, afresh)


def dissect_again(run: runs.Run, how: dict[str, Any]) -> pd.DataFrame:
    manifest = run.manifest
    del manifest["stages"]["intervene"]
    runs.write_text(run.folder / "manifest.json", json.dumps(manifest))
    return intervene(run, **how)["effects"]


@pytest.mark.slow
def test_a_model_of_full_fine_tuning_has_no_adapters_to_switch_off(tmp_path, monkeypatch, capsys):
    full = made(tmp_path, "training.method=full", "training.learning_rate=0.001", "data.train_rows=320")
    said = refused(full, monkeypatch, capsys, "--by", "adapter", "--groups", "8")
    assert "by adapter: this model has no adapter" in said
    found = intervene(full, by=("layer", "adapter"))
    assert set(found["effects"]["sweep"]) == {"layer"}
    assert np.isfinite(found["effects"]["twin"]).all()
