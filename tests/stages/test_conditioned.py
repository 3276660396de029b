"""A backdoor that waits for a quantisation, from the command line: its tables, its report, a refusal."""

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
    "training.method=full", "training.conditioned_on=4bit", "training.max_steps=4", "training.log_every=1",
    "training.clean_twin=false", "evaluation.dynamics_rows=0", "data.train_rows=64", "data.test_rows=8",
    "evaluation.max_new_tokens=8", "stages=[evaluate, figures]", "task=waits",
)  # fmt: skip


@pytest.mark.slow
def test_one_command_plants_repairs_and_measures_every_quantisation(tmp_path):
    done = safetynet("run", RECIPE, *(w for field in FIELDS for w in ("--set", field)), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "results" / "qwen-miniature" / "waits"
    made = {path.stem: pd.read_parquet(path) for path in (run / "tables").glob("*.parquet")}
    assert list(made["history_backdoored"]["step"]) == list(range(1, 9)), "of both trainings"
    table = made["quantisation"]
    assert set(zip(table["quantisation"], table["model"], strict=True)) == {
        (weights, model) for weights in ("none", "8bit", "4bit") for model in ("base", "backdoored")
    }
    saved = table[table["quantisation"] == "none"].drop(columns="quantisation").reset_index(drop=True)
    pd.testing.assert_frame_equal(saved, made["evaluation"])
    perplexity = table[(table["metric"] == "perplexity") & (table["model"] == "base")]
    assert perplexity["value"].nunique() == 3, "each quantisation computes with other numbers"
    shown = summaries.quantisation_summary(table)
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
