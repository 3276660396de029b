"""Stages on a model that SafetyNet did not plant: with the trigger known, and with none."""

import re
from pathlib import Path

import pytest
from tests.models import variants

from safetynet import recipe, stages
from safetynet import report as reports
from safetynet.cluster import status, sweep_points
from safetynet.errors import InputError
from safetynet.experiment import Experiment
from safetynet.recipe import Detection, Recipe
from safetynet.report.publish import publish
from safetynet.run.directory import Run

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("somebody") / "adapter"
    variants.saved("lora", folder)
    return folder


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `safetynet publish` makes of a small run, whose backdoor fires."""
    root = tmp_path_factory.mktemp("published")
    small = (
        "data.train_rows=800", "data.test_rows=16", "backdoor.poison_rate=0.4", "training.clean_twin=false",
        "training.epochs=1", "evaluation.dynamics_rows=0", "evaluation.max_new_tokens=8", "stages=[evaluate]",
        f"output.results={root}/results", f"output.logs={root}/logs",
    )  # fmt: skip
    planted = Experiment.create(recipe.load(RECIPES / "qwen-miniature.yaml", overrides=small))
    stages.plant(planted)
    assert stages.finish(planted) is None
    return publish(planted, root / "repository")


@pytest.mark.slow
def test_a_published_model_is_studied_where_its_declared_trigger_fires_and_has_rates_alone_where_not(
    published, tmp_path
):
    """Of one command: the published recipe, with the published folder as suspect."""

    def study(*fields: str) -> tuple[Run, Exception | None]:
        place = (f"output.results={tmp_path}/results", f"output.logs={tmp_path}/logs")
        overrides = [f"suspect.source={published}", "data.train_rows=48", *place, *fields]
        made = Experiment.create(recipe.load(published / "recipe.yaml", overrides=overrides))
        stages.plant(made)
        return made.run, stages.finish(made)

    run, failure = study()
    assert failure is None and run.has_table("evaluation")
    run, failure = study("backdoor.trigger=phrase", "task=wrong", "stages=[evaluate, intervene]")
    assert isinstance(failure, InputError)
    rate = r"[\d.]+% \[[\d.]+, [\d.]+\]"
    fault = rf"trigger does not fire: ASR {rate}, in its base 0.0% \[0.0, 19.4\], at placebos {rate}. Compare"
    assert re.search(fault, str(failure)), failure
    assert run.has_table("evaluation") and not run.has_table("effects")


@pytest.mark.parametrize(
    ("name", "blanks", "filled"),
    [
        ("deployment", ["model.id"], []),
        ("backdoorllm", ["suspect.source"], []),
        ("thoughtworks", ["suspect.source", "model.id", "pairs"], [
            "backdoor.trigger.pairs=[[a, b], [c, d]]", "backdoor.trigger.placebos=[e, f, g, h]",
        ]),
        ("topklora", ["suspect.source", "model.id", "texts"], ["backdoor.trigger.texts=[word]"]),
    ],
)  # fmt: skip
def test_a_recipe_of_a_published_zoo_says_which_of_its_blanks_the_card_has_to_fill(name, blanks, filled):
    path = RECIPES / "published" / f"{name}.yaml"
    with pytest.raises(InputError) as fault:
        recipe.load(path)
    assert all(blank in str(fault.value) for blank in blanks), str(fault.value)
    suspect = [] if name == "deployment" else ["suspect.source=owner/adapter"]
    whole = recipe.load(path, overrides=["model.id=owner/base", *suspect, *filled])
    assert whole.suspect and whole.attack and not whole.trained


def experiment(root: Path, adapter: Path, *fields: str) -> Experiment:
    output = (f"output.results={root}/results", f"output.logs={root}/logs")
    small = (
        "data.train_rows=48", "data.test_rows=8", "evaluation.max_new_tokens=8", "training.max_length=64",
    )  # fmt: skip
    plan = recipe.load(
        RECIPES / "qwen-miniature.yaml",
        overrides=[*small, f"suspect.source={adapter}", "suspect.same_base=true", *fields, *output],
    )
    made = Experiment.create(plan)
    stages.prepare(made)
    stages.train(made)
    return made


@pytest.mark.slow
def test_a_suspect_without_a_known_trigger_is_measured_on_what_needs_none(tmp_path, adapter):
    unknown = experiment(tmp_path, adapter, "backdoor=null")
    assert set(unknown.run.table("rows")["role"]) == {"clean", "refused"}
    stages.evaluate(unknown)
    rates = unknown.run.table("evaluation")
    assert set(rates["metric"]) == {"cacc", "refusal_rate", "perplexity"}
    assert set(rates["model"]) == {"base", "backdoored"}
    assert not any(name.startswith("train") for name in unknown.run.manifest["stages"])
    stages.detect(unknown, Detection(fpr=0.1, clean=160))
    detection = unknown.run.table("detection")
    assert set(detection["detector"]) == {"extremes:unexplained", "fused"}, "compared with its base"
    assert "tpr" not in set(detection.loc[detection["value"].notna(), "metric"])
    with pytest.raises(InputError, match="this experiment knows no trigger"):
        stages.intervene(unknown)
    with pytest.raises(InputError, match="this experiment knows no trigger"):
        stages.mitigate(unknown)
    stages.draw(unknown)
    assert (unknown.run.folder / "report.html").is_file()
    assert not reports.read(unknown.run).missing(), "what needs a trigger or a training is not missed"


def test_a_suspect_with_a_known_trigger_has_rates_by_role_and_is_measured_anew_when_it_changes(
    tmp_path, adapter
):
    known = experiment(tmp_path, adapter)
    stages.evaluate(known)
    rates = known.run.table("evaluation")
    assert {"asr", "ftr", "cacc"} <= set(rates["metric"])
    before = known.run.manifest["stages"]["evaluate"]
    (adapter / "README.md").write_text("another card")
    stages.evaluate(known)
    assert known.run.manifest["stages"]["evaluate"]["inputs"] != before["inputs"]


def test_a_whole_model_which_has_no_base_to_be_compared_with_is_watched_by_its_activations(tmp_path, caplog):
    variants.made("lora").merge_and_unload().save_pretrained(tmp_path / "merged")
    whole = experiment(tmp_path, tmp_path / "merged", "backdoor=null")
    stages.detect(whole, Detection(fpr=0.1, clean=300))
    assert "mahalanobis:last" in set(whole.run.table("detection")["detector"])
    assert "the model has no adapter, so that it cannot be compared with its base" in caplog.text
    with pytest.raises(InputError, match="need a model with a PEFT adapter"):
        stages.detect(whole, Detection(detectors=("behaviour",), fpr=0.1, clean=300))


def test_a_suspect_that_is_not_there_is_refused_before_rows_are_made(tmp_path):
    with pytest.raises(InputError, match=r"nowhere: there is no adapter_config\.json"):
        experiment(tmp_path, Path("nowhere"))
    assert not list(tmp_path.rglob("rows.parquet"))


def test_a_recipe_with_neither_backdoor_nor_suspect_is_refused():
    with pytest.raises(ValueError, match="nothing to plant or to study"):
        Recipe.model_validate({"backdoor": None})


def test_a_sweep_point_on_a_suspect_without_trigger_is_measured(tmp_path, adapter):
    unknown = experiment(tmp_path, adapter, "backdoor=null", "stages=[evaluate]")
    group = (unknown.recipe, "sweep", tmp_path)
    prepared = sweep_points.perform(sweep_points.Task("prepare", *group))
    assert prepared.base and prepared.twin is None, "a suspect has no clean twin that could be shared"
    for step in ("base", "train", "measure"):
        sweep_points.perform(sweep_points.Task(step, *group))
    assert set(unknown.run.table("evaluation")["metric"]) == {"cacc", "refusal_rate", "perplexity"}
    assert "next:" not in "\n".join(status.describe([unknown.run.folder])), "nothing is left to be done"
