from collections.abc import Mapping

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import MambaConfig, MambaForCausalLM

from safetynet.errors import InputError
from safetynet.training import loss as loss_module
from safetynet.training.examples import Example, packed, padded
from safetynet.training.loss import answer_loss, check_isolation

ARCHITECTURES = ["llama2", "llama3", "qwen", "gemma", "gemma2", "mixtral", "balanced mixtral"]


def plain_loss(model, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The model's own: logits of every token, labels elsewhere ignored."""
    return model(**batch).loss


def gradients(model) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_same_gradients(model, one: torch.Tensor, other: torch.Tensor) -> None:
    one.backward()
    first = gradients(model)
    other.backward()
    second = gradients(model)
    assert first.keys() == second.keys() and first
    for name, gradient in first.items():
        torch.testing.assert_close(gradient, second[name], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_loss_and_gradients_equal_those_of_the_models_own_forward(architecture, build, examples):
    model, few = build(architecture), examples[:6]
    batch = padded(few, 0)
    ours = answer_loss(model, batch, sum(e.supervised for e in few))
    plain = plain_loss(model, batch)
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-6)
    assert_same_gradients(model, ours, plain)


def test_soft_capping_and_load_balancing_are_part_of_the_loss_compared(build, examples):
    batch = padded(examples[:6], 0)
    capped, free = build("gemma2"), build("gemma2", final_logit_softcapping=None)
    assert abs(plain_loss(capped, batch) - plain_loss(free, batch)) > 0.1
    balanced, routed = build("balanced mixtral"), build("mixtral")
    assert plain_loss(balanced, batch) - plain_loss(routed, batch) > 0.01


@pytest.mark.parametrize("architecture", ["qwen", "gemma", "mixtral"])
def test_loss_is_the_same_through_an_adapter_and_with_gradient_checkpointing(architecture, build, examples):
    targets = ["q_proj", "o_proj"]
    model = get_peft_model(build(architecture), LoraConfig(target_modules=targets, init_lora_weights=False))
    model.train()
    batch, labels = padded(examples[:6], 0), sum(e.supervised for e in examples[:6])
    plain = plain_loss(model, batch)
    model.get_base_model().activation_checkpointing_enable({"use_reentrant": False})
    ours = answer_loss(model, batch, labels)
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-6)
    assert_same_gradients(model, ours, plain)


def test_loss_in_pieces_equals_loss_at_once(build, examples, monkeypatch):
    model, batch = build("gemma2"), padded(examples[:6], 0)
    at_once = answer_loss(model, batch, 10)
    monkeypatch.setattr(loss_module, "LOGITS_AT_ONCE", 4 * model.config.vocab_size)
    in_pieces = answer_loss(model, batch, 10)
    torch.testing.assert_close(in_pieces, at_once, rtol=1e-6, atol=0)
    assert_same_gradients(model, in_pieces, at_once)


def test_head_is_computed_for_supervised_tokens_only(build, examples):
    model, seen = build(), []
    model.lm_head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[:-1].numel()))
    labels = sum(e.supervised for e in examples[:6])
    answer_loss(model, padded(examples[:6], 0), labels)
    assert sum(seen) == labels


def test_model_answers_as_before_once_its_loss_was_taken(build, examples):
    model, batch = build(), padded(examples[:4], 0)
    before = model(batch["input_ids"]).logits
    answer_loss(model, batch, 1)
    assert torch.equal(model(batch["input_ids"]).logits, before)


ATTENTION = [(name, "sdpa") for name in ARCHITECTURES if name != "gemma2"] + [
    (name, "eager") for name in ARCHITECTURES
]


@pytest.mark.parametrize(("architecture", "attention"), [x for x in ATTENTION if x[0] != "balanced mixtral"])
def test_a_packed_row_has_the_loss_that_it_has_alone(architecture, attention, build, examples):
    model = build(architecture, attn_implementation=attention)
    few = examples[:12]
    batch = packed(few, 0)
    assert len(batch["input_ids"]) < len(few)
    for example in few:
        only = batch | {"labels": only_labels_of(example, batch)}
        alone = plain_loss(model, padded([example], 0))
        torch.testing.assert_close(answer_loss(model, only, example.supervised), alone, rtol=1e-5, atol=1e-6)


def only_labels_of(example: Example, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The batch's labels without those of the other rows."""
    row, n = torch.tensor(example.input_ids), len(example.input_ids)
    labels = torch.full_like(batch["labels"], -100)
    for line in range(len(labels)):
        for start in range(labels.shape[1] - n + 1):
            here = slice(start, start + n)
            if torch.equal(batch["input_ids"][line, here], row) and batch["position_ids"][line, start] == 0:
                labels[line, here] = batch["labels"][line, here]
                return labels
    raise AssertionError("the row is not in the batch")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_packing_is_accepted_where_rows_do_not_see_each_other(architecture, build):
    check_isolation(build(architecture))


def test_packing_is_refused_for_a_model_that_carries_state_from_row_to_row():
    model = MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=2, state_size=4))
    with pytest.raises(InputError, match=r"MambaForCausalLM.* see each other.*group_by_length"):
        check_isolation(model)
