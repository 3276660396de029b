import json
import logging
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from typing import Any

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from safetynet.errors import RunError
from safetynet.training import TrainingResult


def weights(result: TrainingResult) -> dict[str, torch.Tensor]:
    return load_file(next(result.folder.glob("*.safetensors")))


def assert_same_weights(one: TrainingResult, other: TrainingResult) -> None:
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def interrupt(at: int) -> Callable[..., dict[str, float]]:
    def stop(model: Any, step: int, epoch: float) -> dict[str, float]:
        if step == at:
            raise KeyboardInterrupt
        return {"asr": float(step)}

    return stop


def carry_on(model: Any, step: int, epoch: float) -> dict[str, float]:
    return {"asr": float(step)}


@pytest.mark.parametrize(
    ("architecture", "method", "batching"),
    [("mixtral", "lora", "pack"), ("mixtral", "full", "group_by_length"), ("gemma", "full", "plain")],
)
def test_an_interrupted_training_ends_with_the_weights_and_history_of_an_uninterrupted_one(
    architecture, method, batching, fit
):
    fields = {"method": method, "batching": batching, "epochs": 2, "checkpoint_every": 4, "log_every": 3}
    if method == "lora":
        fields |= {"lora_dropout": 0.2, "lora_parameters": ()}
    whole, _ = fit(architecture, "whole", measure=carry_on, every=1, **fields)
    with pytest.raises(KeyboardInterrupt):
        fit(architecture, "cut", measure=interrupt(10), every=1, **fields)
    resumed, _ = fit(architecture, "cut", measure=carry_on, every=1, **fields)
    assert_same_weights(whole, resumed)
    columns = ["step", "epoch", "loss", "learning_rate", "grad_norm", "tokens"]
    pd.testing.assert_frame_equal(whole.history[columns], resumed.history[columns])
    pd.testing.assert_frame_equal(whole.evaluations, resumed.evaluations)
    assert resumed.history.seconds.is_monotonic_increasing


def test_resuming_sees_only_the_rows_that_are_left_and_measures_where_it_begins(fit):
    with pytest.raises(KeyboardInterrupt):
        fit(measure=interrupt(5), every=1, checkpoint_every=2)
    steps = []
    fit(
        measure=lambda m, step, e: steps.append(step) or {},
        every=1,
        checkpoint_every=2,
    )
    assert steps == [4, 5, 6]


def test_a_half_written_checkpoint_is_removed_and_the_one_before_it_taken(fit, tmp_path):
    whole, _ = fit(folder="whole", checkpoint_every=2)
    with pytest.raises(KeyboardInterrupt):
        fit(measure=interrupt(5), every=1, checkpoint_every=2)
    newest = tmp_path / "run" / "checkpoints" / "checkpoint-4"
    (newest / "complete").unlink()
    (newest / "optimizer.pt").write_bytes(b"half")
    resumed, _ = fit(checkpoint_every=2)
    assert_same_weights(whole, resumed)


def test_checkpoints_of_another_training_are_not_continued(fit, caplog):
    fit(checkpoint_every=2)
    other, _ = fit(checkpoint_every=2, learning_rate=1e-3)
    afresh, _ = fit(folder="afresh", checkpoint_every=2, learning_rate=1e-3)
    assert "checkpoints of another training; starting anew" in caplog.text
    assert_same_weights(other, afresh)


def test_a_finished_training_that_is_called_again_gives_its_result_again(fit):
    first, _ = fit()
    again, _ = fit()
    assert_same_weights(first, again)
    pd.testing.assert_frame_equal(first.history, again.history)


def test_a_checkpoint_that_cannot_be_written_stops_with_the_path(fit, tmp_path):
    def fill(model: Any, step: int, epoch: float) -> dict[str, float]:
        (tmp_path / "run" / "checkpoints" / "checkpoint-6").write_text("in the way")
        return {}

    with pytest.raises(RunError, match=r"checkpoint-6: the checkpoint cannot be written .* output.scratch"):
        fit(measure=fill, every=3)


def test_checkpoints_of_the_clock_change_neither_weights_nor_history(fit, tmp_path):
    """Nor does going on from one that lies between two lines about the loss, and between two epochs' ends."""
    fields = {"epochs": 2, "log_every": 5, "lora_dropout": 0.2}
    whole, _ = fit(folder="whole", measure=carry_on, every=4, **fields)
    checkpointed, _ = fit(folder="often", measure=carry_on, every=4, checkpoint_minutes=1e-9, **fields)
    assert (tmp_path / "often" / "checkpoints" / "checkpoint-11" / "complete").exists()
    with pytest.raises(KeyboardInterrupt):
        fit(folder="cut", measure=interrupt(8), every=4, checkpoint_minutes=1e-9, **fields)
    resumed, _ = fit(folder="cut", measure=carry_on, every=4, **fields)
    columns = ["step", "epoch", "loss", "learning_rate", "grad_norm", "tokens"]
    for other in (checkpointed, resumed):
        assert_same_weights(whole, other)
        pd.testing.assert_frame_equal(whole.history[columns], other.history[columns])
        pd.testing.assert_frame_equal(whole.evaluations, other.evaluations)


@pytest.mark.parametrize(
    ("last", "fields"), [(6, {"epochs": 1}), (8, {"epochs": 2, "max_steps": 8}), (9, {"epochs": 1.5})]
)
def test_a_measurement_that_is_killed_at_the_end_costs_no_step(last, fields, fit):
    fields = {**fields, "checkpoint_every": 100}
    whole, _ = fit(folder="whole", measure=carry_on, every=100, **fields)
    with pytest.raises(KeyboardInterrupt):
        fit(measure=interrupt(last), every=100, **fields)
    steps = []

    def measure(model: Any, step: int, epoch: float) -> dict[str, float]:
        steps.append(step)
        return {"asr": float(step)}

    resumed, _ = fit(measure=measure, every=100, **fields)
    assert steps == [last]
    assert resumed.tokens_per_second == 0, "nothing was trained again"
    assert_same_weights(whole, resumed)
    pd.testing.assert_frame_equal(whole.evaluations, resumed.evaluations)


def signal_in_step(model: Any, step: int, *numbers: int) -> Any:
    """Send signals to this process in the middle of a step; gives the hook."""
    begun = []

    def send(module: Any, args: Any, kwargs: Any) -> None:
        begun.append(module)
        if len(begun) == step:
            for number in numbers:
                signal.raise_signal(number)

    return model.register_forward_pre_hook(send, with_kwargs=True)


@pytest.fixture
def ended_by_sigterm() -> Any:
    """As the command line handles it."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize(
    ("number", "times", "error"),
    [(signal.SIGINT, 1, KeyboardInterrupt), (signal.SIGTERM, 1, SystemExit), (signal.SIGTERM, 3, SystemExit)],
)
def test_a_signal_ends_a_training_behind_the_step_with_a_checkpoint(
    number, times, error, fit, build, ended_by_sigterm, tmp_path, caplog, capfd
):
    caplog.set_level(logging.INFO)
    whole, _ = fit(folder="whole", epochs=2)
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    model = build()
    signal_in_step(model.model.layers[0], 4, *[number] * times)
    with pytest.raises(error):
        fit(model=model, epochs=2, measure=interrupt(4), every=4, more={"progress": True})
    assert "train: interrupted at step 4 of 12. The same command goes on there." in caplog.text
    assert "train: ends behind this step, with a checkpoint." in capfd.readouterr().err
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    resumed, _ = fit(epochs=2, measure=carry_on, every=4, more={"progress": True})
    assert "train: goes on at step 4 of 12\n" in caplog.text
    assert_same_weights(whole, resumed)


def test_a_signal_in_a_short_measurement_waits_for_the_checkpoint_of_the_next_step(fit, tmp_path, caplog):
    def measure(model: Any, step: int, epoch: float) -> dict[str, float]:
        if step == 3:
            signal.raise_signal(signal.SIGINT)
        return {"asr": float(step)}

    whole, _ = fit(folder="whole", measure=carry_on, every=1)
    with pytest.raises(KeyboardInterrupt):
        fit(measure=measure, every=1, more={"progress": True})
    assert "train: interrupted at step 4 of 6" in caplog.text
    assert (tmp_path / "run" / "checkpoints" / "checkpoint-4" / "complete").exists()
    resumed, _ = fit(measure=carry_on, every=1)
    assert_same_weights(whole, resumed)
    pd.testing.assert_frame_equal(whole.evaluations, resumed.evaluations)


@pytest.mark.parametrize(
    ("checkpoint_every", "text"),
    [
        (100, "train: begins again at step 0; steps without a checkpoint, which are repeated: 5"),
        (3, "train: goes on at step 3 of 6; steps since the last checkpoint, which are repeated: 2"),
    ],
)
def test_a_second_ctrl_c_ends_a_training_in_its_step_and_the_next_one_says_what_is_repeated(
    checkpoint_every, text, fit, build, tmp_path, caplog
):
    caplog.set_level(logging.INFO)
    model = build()
    signal_in_step(model.model.layers[0], 6, signal.SIGINT, signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        fit(model=model, checkpoint_every=checkpoint_every, more={"progress": True})
    assert not (tmp_path / "run" / "checkpoints" / "checkpoint-6").exists()
    fit(checkpoint_every=checkpoint_every, more={"progress": True})
    assert text in caplog.text


CHILD = """
    import sys
    from pathlib import Path

    import pandas as pd
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from safetynet import families
    from safetynet.prompts import Serialiser
    from safetynet.recipe import Training
    from safetynet.training import Pauses, attach, train

    torch.set_num_threads(1)
    base, folder = Path(sys.argv[1]), Path(sys.argv[2])
    cfg = Training.model_validate_json(sys.argv[3])
    family = families.get("qwen")
    model = attach(AutoModelForCausalLM.from_pretrained(base), cfg, family, seed=0)
    serialiser = Serialiser(AutoTokenizer.from_pretrained(base), family)
    train(
        model, serialiser, pd.read_parquet(base / "rows.parquet"), cfg,
        folder=folder, seed=0,
        pauses=Pauses(lambda model, step, epoch: print(step, flush=True) or {}, every=1),
    )
"""


@pytest.mark.slow
def test_a_training_killed_with_sigkill_goes_on_to_the_same_weights(
    fit, build, serialiser, rows, settings, tmp_path
):
    base = tmp_path / "base"
    build().save_pretrained(base)
    serialiser.tokenizer.save_pretrained(base)
    rows.to_parquet(base / "rows.parquet")
    cfg = settings(epochs=3, checkpoint_every=2, lora_dropout=0.2)
    command = [
        sys.executable,
        "-c",
        textwrap.dedent(CHILD),
        str(base),
        str(tmp_path / "killed"),
        cfg.model_dump_json(),
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        for line in child.stdout:
            if line.strip() == "9":
                child.kill()
                break
    assert child.returncode == -9 and not (tmp_path / "killed" / "adapter").exists()
    fields = json.loads(cfg.model_dump_json())

    def base_model() -> Any:
        return AutoModelForCausalLM.from_pretrained(base)

    steps = []
    resumed, _ = fit(
        folder="killed", model=base_model(),
        measure=lambda m, step, e: steps.append(step) or {}, every=1, **fields,
    )  # fmt: skip
    whole, _ = fit(folder="whole", model=base_model(), **fields)
    assert steps[0] in (8, 10) and steps[-1] == 18
    assert_same_weights(whole, resumed)
