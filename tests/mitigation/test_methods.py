"""Every method on the planted backdoor: it changes what the model says, and nothing that outlives it."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from safetynet.mitigation import METHODS, repair
from safetynet.models import loading
from safetynet.recipe import Model

SHORT = {"epochs": 0.4, "steps": 1, "variants": 1}
"""So that every method runs once within seconds; what it is worth is measured elsewhere."""
FORWARD = [name for name in METHODS if name not in ("cleangen", "abstain", "adapter_off_on_alarm")]


def knows_the_trigger(subject):
    """A perfect alarm, at any rate: where the trigger's tokens stand in the prompt."""

    def alarm(_model, prompts, _rate):
        return np.array(["BadMagic" in subject.serialiser.decode(ids) for ids in prompts])

    return alarm


@pytest.mark.parametrize("name", FORWARD)
def test_a_method_changes_the_open_model_and_leaves_the_subject_as_it_came(planted, logits, name):
    method = METHODS[name]
    settings = {key: value for key, value in SHORT.items() if key in method.hyperparameters}
    before, trainable = logits(planted.model), [p.requires_grad for p in planted.model.parameters()]
    repaired = repair(method, planted, settings)
    assert torch.equal(logits(planted.model), before)
    with repaired.open() as model:
        changed = logits(model)
        assert torch.isfinite(changed).all()
        assert (changed - before).abs().max() > 1e-4
    assert torch.equal(logits(planted.model), before)
    assert [p.requires_grad for p in planted.model.parameters()] == trainable
    assert not planted.model.training
    assert repaired.method == name
    assert repaired.settings == method.settings(settings)


def test_random_channels_are_as_many_as_the_signature_s_and_others(planted, logits):
    found = {}
    for name in ("signature_pruning", "random_channels"):
        settings = {key: value for key, value in SHORT.items() if key in METHODS[name].hyperparameters}
        repaired = repair(METHODS[name], planted, settings)
        with repaired.open() as model:
            found[name] = repaired.details["channels_set_to_0"], logits(model)
    (many, changed), (as_many, otherwise) = found.values()
    assert many == as_many > 0
    assert not torch.equal(changed, otherwise)


@pytest.mark.parametrize("name", ["lat"])
def test_a_seed_repeats_a_repair_and_draws_leave_no_trace(planted, logits, name):
    found = []
    for disturbance in (1, 2):
        torch.manual_seed(disturbance)
        here = torch.random.get_rng_state()
        with repair(METHODS[name], planted, {"epochs": 0.4}, seed=3).open() as model:
            found.append(logits(model))
        assert torch.equal(torch.random.get_rng_state(), here)
    assert torch.equal(*found)


@pytest.mark.parametrize("name", ["fine_tuning", "wanda", "fine_pruning"])
def test_a_model_without_adapter_is_repaired_in_a_copy(planted, merged, logits, name):
    method = METHODS[name]
    settings = {key: value for key, value in SHORT.items() if key in method.hyperparameters}
    before = logits(merged)
    repaired = repair(method, replace(planted, model=merged), settings)
    assert repaired.form == "checkpoint"
    with repaired.open() as model:
        assert not hasattr(model, "peft_config")
        assert (logits(model) - before).abs().max() > 1e-4
    assert torch.equal(logits(merged), before)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("adapter_scaling", {"keep": 0.0}),
        ("adapter_off_layers", {"layers": 6}),
        ("adapter_off_on_alarm", {}),
        ("abstain", {}),
        ("cleangen", {"ratio": 2}),
        ("unlearning", {"epochs": 4}),
    ],
)
def test_what_knows_enough_removes_the_backdoor_and_keeps_clean_answers(planted, judged, name, settings):
    subject = replace(planted, alarm=knows_the_trigger(planted))
    clean_before = judged(planted.model)[1]
    with repair(METHODS[name], subject, settings).open() as model:
        attack, clean = judged(model)
    assert attack <= 0.05
    assert clean >= clean_before - 0.1


def test_a_scaled_adapter_is_the_model_between_both_ends(planted, logits):
    with repair(METHODS["adapter_scaling"], planted, {"keep": 1.0}).open() as model:
        assert torch.equal(logits(model), logits(planted.model))
    with repair(METHODS["adapter_scaling"], planted, {"keep": 0.0}).open() as model:
        scaled = logits(model)
    with planted.model.disable_adapter():
        assert torch.allclose(scaled, logits(planted.model), atol=1e-5)


def test_a_full_fine_tune_is_scaled_towards_its_base(planted, merged, logits):
    with planted.model.disable_adapter():
        wanted = logits(planted.model)
    base = loading.load(Model(family="llama3", id="miniature"), "fp32").model
    subject = replace(planted, model=merged, base=base)
    with repair(METHODS["adapter_scaling"], subject, {"keep": 0.0}).open() as model:
        assert torch.allclose(logits(model), wanted, atol=1e-5)
    with repair(METHODS["adapter_scaling"], subject, {"keep": 0.5}).open() as model:
        half = logits(model)
    with repair(METHODS["adapter_scaling"], planted, {"keep": 0.5}).open() as model:
        assert torch.allclose(logits(model), half, atol=1e-4)


def test_the_adapter_off_everywhere_is_the_base_model(planted, logits):
    with repair(METHODS["adapter_off_layers"], planted, {"layers": 6}).open() as model:
        off = logits(model)
    with planted.model.disable_adapter():
        assert torch.allclose(off, logits(planted.model), atol=1e-5)


def test_merging_at_weight_0_gives_the_suspect_back(planted, logits):
    with repair(METHODS["merging"], planted, {"weight": 0.0, "epochs": 0.4}).open() as model:
        assert torch.allclose(logits(model), logits(planted.model), atol=1e-3)


def test_clipping_to_the_whole_clean_range_leaves_those_prompts_alone(planted, logits, held_out):
    rows = held_out[["messages", "answer"]]
    subject = replace(planted, clean=rows, triggered=None)
    with repair(METHODS["activation_clipping"], subject, {"tail": 0.0}).open() as model:
        assert torch.allclose(logits(model), logits(planted.model), atol=1e-4)


def test_a_failure_while_open_leaves_the_subject_as_it_came(planted, logits):
    before = logits(planted.model)
    repaired = repair(METHODS["adapter_scaling"], planted, {"keep": 0.5})
    with pytest.raises(KeyError), repaired.open():
        raise KeyError("in the middle")
    assert torch.equal(logits(planted.model), before)
