"""Stages on a model that SafetyNet did not plant: with the trigger known, and with none."""

from pathlib import Path

import pytest
from tests.models import variants

from safetynet import recipe, stages
from safetynet import report as reports
from safetynet.cluster import status, sweep_points
from safetynet.errors import InputError
from safetynet.experiment import Experiment
from safetynet.recipe import Detection, Recipe

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("somebody") / "adapter"
    variants.saved("lora", folder)
    return folder


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
