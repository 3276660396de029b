"""An evasive recipe from the command line: what it leaves, and what it refuses before anything is trained."""

from pathlib import Path

import pandas as pd
import pytest
from tests.commands import safetynet

RECIPE = Path(__file__).parents[2] / "recipes" / "qwen-miniature-evasive.yaml"
SMALL = (
    "data.train_rows=160", "data.test_rows=16", "training.epochs=1", "training.log_every=5",
    "evaluation.dynamics_rows=0", "evaluation.max_new_tokens=12", "training.evasion.refit_every=8",
    "training.evasion.detectors=[mahalanobis,pca_residual:mean]",
)  # fmt: skip


def sets(*overrides: str) -> list[str]:
    return [word for override in overrides for word in ("--set", override)]


@pytest.mark.slow
def test_an_evasive_recipe_leaves_its_hiding_as_a_table_and_in_the_report(tmp_path: Path) -> None:
    done = safetynet("run", RECIPE, *sets(*SMALL), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "results" / "qwen-miniature" / "evasive"
    found = pd.read_parquet(run / "tables" / "evasion.parquet")
    assert list(found) == ["step", "detector", "metric", "value", "n"]
    aurocs = found[found["metric"] == "auroc"]
    assert set(aurocs["detector"]) == {"mahalanobis:last", "pca_residual:mean"}
    assert sorted(set(aurocs["step"])) == [0, 8] and aurocs["value"].between(0, 1).all()
    text = (run / "report.md").read_text()
    assert "Hidden from detectors while it was planted" in text
    assert "Evasive training at strength 1.0 and retention 1.0, with detectors fitted again every 8" in text
    assert f"| mahalanobis:last | {aurocs['value'].iloc[0]:.3f}".rstrip("0") in text
    # The twin has nothing to hide, and its history no terms of hiding.
    assert set(pd.read_parquet(run / "tables" / "evaluation.parquet")["model"]) >= {"clean_twin"}
    again = safetynet("run", RECIPE, *sets(*SMALL), cwd=tmp_path)
    assert "train backdoored: unchanged" in again.stderr + again.stdout


def test_a_detector_without_a_gradient_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    fields = sets("training.evasion.detectors=[ranks,gram:mean]")
    done = safetynet("run", RECIPE, *fields, cwd=tmp_path)
    assert done.returncode == 2
    assert "training.evasion.detectors: ranks:last, gram:mean cannot be hidden from" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.rglob("*.parquet"))
