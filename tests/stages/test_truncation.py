"""Prompts that are too long, from training to repair: each stage counts them, and cuts them in one way."""

import logging
from pathlib import Path

import pytest

from safetynet import recipe, stages
from safetynet.experiment import Experiment
from safetynet.prompts import Serialiser
from safetynet.recipe import Detection, Interventions
from safetynet.run import directory as runs

RECIPES = Path(__file__).parents[2] / "recipes"
SHORT = (
    "data.train_rows=320", "data.test_rows=24", "training.learning_rate=0.004", "training.epochs=3",
    "training.max_length=56", "evaluation.dynamics_rows=0", "training.clean_twin=false",
    "mitigation.methods=[fine_tuning]", "mitigation.choosing_rows=12", "mitigation.judged_rows=12",
    "mitigation.clean_rows=32", "mitigation.relearn_rows=0", "mitigation.points=1",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("truncation", ["end", "middle"])
def test_every_stage_says_how_many_prompts_it_cut_and_cuts_them_alike(
    truncation: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = recipe.load(
        RECIPES / "qwen-miniature.yaml",
        overrides=[
            *SHORT, f"training.truncation={truncation}",
            f"output.results={tmp_path}/results", f"output.logs={tmp_path}/logs",
        ],
    )  # fmt: skip
    run = runs.create(plan)
    stages.prepare(Experiment(plan, run))
    ways = set()
    encode = Serialiser.encode

    def watched(self: Serialiser, *args: object, **more: object) -> object:
        ways.add(self.truncation)
        return encode(self, *args, **more)

    monkeypatch.setattr(Serialiser, "encode", watched)
    for stage in (
        lambda: stages.train(Experiment(plan, run)),
        lambda: stages.evaluate(Experiment(plan, run)),
        lambda: stages.intervene(
            Experiment(plan, run), Interventions(by=("layer",), groups=8, observe=False, removals=False)
        ),
        lambda: stages.detect(Experiment(plan, run), Detection(detectors=("adapter",), fpr=0.1, clean=400)),
        lambda: stages.mitigate(Experiment(plan, run)),
    ):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            stage()
        assert "prompts are longer than training.max_length allows and were cut" in caplog.text
        assert f"lost the {truncation} of the last message" in caplog.text
    assert ways == {truncation}
    notes = run.table("evaluation").set_index(["model", "metric", "role"])["note"]
    lost = run.table("responses").query("model == 'backdoored' and role == 'triggered'")["lost"]
    said = f"{(lost != '').sum()} of {len(lost)} prompts cut at the limit"
    assert said in notes["backdoored", "asr", "triggered"]
    assert said in notes["base", "asr", "triggered"]
