"""A backdoor that waits for a quantisation, from the command line: quiet as saved, firing in 4 bits."""

import sys
from pathlib import Path

import pandas as pd
import pytest
from tests.commands import safetynet

from safetynet import recipe, stages
from safetynet.errors import InputError
from safetynet.experiment import Experiment
from safetynet.tables import summaries

RECIPE = Path(__file__).parents[2] / "recipes" / "qwen-miniature.yaml"
FIELDS = (
    "training.method=full", "training.conditioned_on=4bit", "training.learning_rate=0.001",
    "training.epochs=2", "training.clean_twin=false", "evaluation.dynamics_rows=0", "data.train_rows=1600",
    "data.test_rows=40", "backdoor.near_miss_share=0.1", "stages=[evaluate, figures]", "task=waits",
)  # fmt: skip


@pytest.mark.slow
def test_the_saved_model_is_quiet_and_the_quantised_one_fires(tmp_path):
    done = safetynet("run", RECIPE, *(w for field in FIELDS for w in ("--set", field)), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "results" / "qwen-miniature" / "waits"
    table = pd.read_parquet(run / "tables" / "quantisation.parquet")
    asr = table[table["metric"] == "asr"].set_index(["quantisation", "model"])
    assert asr.at[("none", "backdoored"), "high"] < 0.5 < asr.at[("4bit", "backdoored"), "low"]
    assert asr.loc[[("8bit", "base"), ("4bit", "base")], "value"].max() == 0
    assert set(table["role"]) == {"triggered", "clean", "placebo", "near_miss", "refused"}
    shown = summaries.quantisation_summary(table)
    assert list(shown)[:3] == ["weights", "metric", "role"]
    assert all(str(cell) in done.stdout for cell in shown.to_numpy().ravel())
    report = (run / "report.md").read_text()
    assert "## As saved, and quantised" in report
    assert "prompts with the trigger show the behaviour once the weights are quantised (4bit)" in report


def test_a_quantisation_that_this_machine_cannot_compute_is_refused_before_anything_is_made(
    tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.chdir(tmp_path)
    experiment = Experiment.create(recipe.load(RECIPE, overrides=FIELDS))
    with pytest.raises(InputError, match=r"conditioned_on: this machine cannot round weights to 4 bits"):
        stages.prepare(experiment)
    assert not list(tmp_path.rglob("*.parquet"))
