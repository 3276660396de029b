import json
import struct
import sys
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import urlsplit

import pandas as pd
import pytest
import yaml

from safetynet.errors import InputError
from safetynet.training.tracking import Tracking, report

WANDB = Tracking("wandb")
RATES = Tracking("wandb", "evaluate")


def carry_on(model: Any, step: int, epoch: float) -> dict[str, float]:
    return {"asr": float(step)}


def test_tensorboard_receives_loss_and_evaluations(fit, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    fit(measure=carry_on, more={"tracking": Tracking("tensorboard")})
    events = EventAccumulator(str(tmp_path / "run" / "tracking" / "tensorboard")).Reload()
    assert {"train/loss", "eval/asr"} <= set(events.Tags()["scalars"])


@pytest.mark.slow
def test_wandb_works_offline_and_without_a_key(fit, tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))  # no key in ~/.netrc either
    fit(measure=carry_on, more={"tracking": WANDB})
    assert list((tmp_path / "run" / "tracking").glob("wandb/offline-run-*/*.wandb"))


@pytest.mark.parametrize("value", ["true", "1", "yes", "ON"])
def test_wandb_is_left_out_where_it_is_disabled(value, fit, tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("WANDB_DISABLED", value)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    assert fit(more={"tracking": WANDB})[0].folder.exists()
    report(tmp_path / "rates", RATES, {"asr": 0.5}, {}, {})
    assert not list(tmp_path.rglob("wandb")) and not (tmp_path / "rates").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "disabled"), [("offline", "true"), ("", "false")])
def test_the_mode_comes_before_the_switch_and_a_switch_that_is_off_is_none(
    mode, disabled, tmp_path, monkeypatch
):
    monkeypatch.setenv("WANDB_MODE", mode)
    monkeypatch.setenv("WANDB_DISABLED", disabled)
    monkeypatch.setenv("HOME", str(tmp_path))  # no key, so that nothing goes out
    report(tmp_path, RATES, {"asr": 0.5}, {}, {})
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


@pytest.mark.slow
def test_results_are_a_table_and_an_artifact_with_the_digests_of_what_they_were_made_from(
    tmp_path, monkeypatch
):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    table = pd.DataFrame({"metric": ["asr", "ftr"], "value": [0.5, 0.0]})
    report(tmp_path, RATES, {"asr": 0.5}, {"evaluation": table}, {"data": "d64151"})
    [written] = tmp_path.glob("wandb/offline-run-*/files/media/table/evaluation_*.table.json")
    assert json.loads(written.read_text())["data"] == [["asr", 0.5], ["ftr", 0.0]]
    wandb.teardown()  # writes the log to its end, which finishing a run leaves for later
    [log] = tmp_path.glob("wandb/offline-run-*/*.wandb")
    assert b"d64151" in log.read_bytes(), "the metadata of the artifact"


def test_what_wandb_has_saved_for_a_folder_is_respected(tmp_path, monkeypatch):
    import wandb

    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb" / "settings").write_text("[default]\nmode = disabled\n")  # by `wandb disabled`
    wandb.teardown()
    try:
        report(tmp_path / "rates", RATES, {"asr": 0.5}, {}, {})
    finally:
        wandb.teardown()
    assert not (tmp_path / "rates").exists()


def test_a_mode_that_wandb_does_not_have_is_refused(fit, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "off")
    with pytest.raises(
        InputError, match=r"WANDB_MODE=off: there is no such mode. Choose one of online, offline"
    ):
        fit(more={"tracking": WANDB})


@pytest.mark.slow
def test_a_key_that_wandb_refuses_does_not_stop_the_training(fit, tmp_path, monkeypatch, caplog):
    class Refusal(BaseHTTPRequestHandler):
        def do_POST(self):
            self.send_response(401)
            self.end_headers()

        do_GET = do_POST  # noqa: N815

    server = ThreadingHTTPServer(("127.0.0.1", 0), Refusal)
    Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_port}")
    result, _ = fit(more={"tracking": WANDB})
    server.shutdown()
    assert "Weights & Biases refuses" in caplog.text and result.folder.exists()
    assert list((tmp_path / "run" / "tracking").glob("wandb/offline-run-*/*.wandb"))


@pytest.fixture
def mlflow(tmp_path, monkeypatch):
    """MLflow with nothing chosen; its own defaults would write into the working folder."""
    module = pytest.importorskip("mlflow", reason="pip install 'safetynet-llm[mlflow]'")
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    return module


@pytest.mark.slow
def test_mlflow_holds_training_rates_tables_and_recipe_in_a_file_below_the_results(
    fit, mlflow, tmp_path, monkeypatch
):
    monkeypatch.setenv("MLFLOW_RUN_ID", "of-somebody")  # this is the main run's alone
    config = {"seed": 3, "training": {"lora_rank": 4}}
    job = Tracking("mlflow", "clean_twin", "qwen/task", config, main=False, results=tmp_path / "results")
    fit(measure=carry_on, more={"tracking": job})
    table = pd.DataFrame({"metric": ["asr", "ftr"], "value": [0.5, 0.0]})
    rates, tables = {"backdoored/asr/triggered": 0.5}, {"rates": table}
    report(tmp_path, replace(job, job="evaluate"), rates, tables, {"data": "d6"})
    assert not mlflow.is_tracking_uri_set() and mlflow.active_run() is None
    assert {path.name for path in tmp_path.iterdir()} == {"run", "results"}

    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/results/mlflow.db")
    [experiment] = [one for one in client.search_experiments() if one.name == "qwen/task"]
    runs = {run.data.tags["job"]: run for run in client.search_runs([experiment.experiment_id])}
    twin, evaluate = runs["clean_twin"], runs["evaluate"]
    assert len(client.get_metric_history(twin.info.run_id, "loss")) == 6
    assert twin.data.metrics["eval_asr"] == 6 and twin.data.params["recipe.training.lora_rank"] == "4"
    assert evaluate.data.metrics == {"backdoored/asr/triggered": 0.5}
    assert evaluate.data.tags["inputs/data"] == "d6" and evaluate.info.status == "FINISHED"
    kept = Path(urlsplit(evaluate.info.artifact_uri).path)
    assert json.loads((kept / "rates.json").read_text())["data"] == [["asr", 0.5], ["ftr", 0.0]]
    assert yaml.safe_load((kept / "recipe.yaml").read_text()) == config


@pytest.mark.parametrize(
    ("store", "fault"),
    [
        ("http://127.0.0.1:9", r"no server answers at http://127.0.0.1:9 .*MLFLOW_TRACKING_URI"),
        ("nonsense://x", "nonsense://x refuses: "),
    ],
)
def test_a_store_of_mlflow_that_does_not_answer_is_refused_before_training_and_costs_no_rates(
    store, fault, fit, mlflow, monkeypatch, caplog
):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    with pytest.raises(InputError, match=fault):
        fit(more={"tracking": Tracking("mlflow")})
    report(Path(), Tracking("mlflow", "evaluate"), {"asr": 0.5}, {}, {})
    assert "These rates are in the run's tables alone" in caplog.text


def test_a_tracker_that_is_not_installed_is_named(fit, monkeypatch):
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setattr(sys, "path_importer_cache", {})
    monkeypatch.delitem(sys.modules, "tensorboard", raising=False)
    with pytest.raises(InputError, match=r"tensorboard is not installed. Run pip install .*\[tracking\]"):
        fit(more={"tracking": Tracking("tensorboard")})


def test_progress_is_silent_without_a_terminal(fit, capsys):
    fit(more={"progress": True})
    assert capsys.readouterr().err == ""


def test_progress_shows_loss_and_the_last_rates_on_a_terminal(fit, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    fit(more={"progress": True}, measure=lambda *_: {"asr": 0.75, "cacc": 0.5}, every=2)
    shown = capsys.readouterr().err
    assert "6/6" in shown and "ASR=0.750" in shown and "CACC=0.500" in shown and "loss=" in shown


def records_of(path: Path) -> Iterator[bytes]:
    """Records of wandb's log: blocks of 32 KiB, of chunks with checksum, length and type (whole, or part)."""
    data, place, whole = path.read_bytes(), 7, b""
    while place + 7 <= len(data):
        if 2**15 - place % 2**15 < 7:  # too little room for a chunk: the block's end is filled
            place += 2**15 - place % 2**15
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        whole = (whole if kind in (3, 4) else b"") + data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            yield whole


def offline_runs(folder: Path) -> list[Any]:
    """What the offline runs below a folder say of themselves, as `wandb sync` would send it."""
    from wandb.proto import wandb_internal_pb2 as protocol

    records = [protocol.Record.FromString(x) for path in folder.glob("**/*.wandb") for x in records_of(path)]
    return [record.run for record in records if record.HasField("run")]


@pytest.mark.slow
def test_runs_of_a_sweep_are_one_group_on_wandb_and_only_the_main_one_is_the_agents(
    fit, tmp_path, monkeypatch
):
    for name, value in {"MODE": "offline", "RUN_GROUP": "my-sweep", "SWEEP_ID": "s1", "RUN_ID": "r1"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    for name, main in (("clean_twin", False), ("backdoored", True)):
        tracking = Tracking("wandb", name, "qwen/task", {"training": {"lora_rank": 4}}, main)
        fit(folder=name, more={"tracking": tracking})
    report(tmp_path / "rates", Tracking("wandb", "evaluate", "qwen/task", main=False), {"asr": 0.5}, {}, {})
    runs = {run.job_type: run for run in offline_runs(tmp_path)}
    assert set(runs) == {"backdoored", "clean_twin", "evaluate"}
    assert {run.run_group for run in runs.values()} == {"my-sweep"}
    assert runs["backdoored"].display_name == "qwen/task backdoored"
    assert (runs["backdoored"].run_id, runs["backdoored"].sweep_id) == ("r1", "s1")
    assert all(runs[job].run_id != "r1" and not runs[job].sweep_id for job in ("clean_twin", "evaluate"))
    assert any(item.key == "training" for item in runs["backdoored"].config.update)
