from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

from safetynet import families
from safetynet.errors import InputError, RunError
from safetynet.run import parallel
from safetynet.training import Budget, Pauses, attach, optimise, sharding
from safetynet.training.examples import Order, encode, padded
from safetynet.training.trainer import same_random_states

ADAPTER = "adapter_model.safetensors"


@pytest.mark.parametrize("batching", ["group_by_length", "pack", "plain"])
def test_training_lowers_the_loss_and_writes_its_history(batching, fit, examples):
    result, _ = fit(epochs=4, batching=batching)
    history = result.history
    assert list(history) == ["step", "epoch", "loss", "learning_rate", "grad_norm", "tokens", "seconds"]
    assert list(history.step) == list(range(1, 25)) and history.epoch.iloc[-1] == 4
    assert history.loss[-6:].mean() < 0.8 * history.loss[:3].mean()
    assert history.tokens.iloc[-1] == 4 * sum(len(e.input_ids) for e in examples)
    assert history.seconds.is_monotonic_increasing and not history.isna().any(axis=None)
    assert 0 < result.supervised_per_second < result.tokens_per_second
    assert result.peak_memory_mb > 100 and result.halvings == 0


def test_saved_adapter_gives_the_trained_models_answers(fit, build):
    result, model = fit("mixtral", epochs=2)
    again = PeftModel.from_pretrained(build("mixtral"), str(result.folder)).eval()
    ids = torch.arange(5, 25)[None]
    assert torch.equal(again(ids).logits, model.eval()(ids).logits)
    assert not list(result.folder.glob("*.bin"))


def test_fused_experts_of_mixtral_are_really_trained(fit, build):
    result, model = fit("mixtral", epochs=2, lora_targets=())
    trained = {name: w for name, w in load_file(result.folder / ADAPTER).items() if "lora_B" in name}
    assert len(trained) == 3 * 2 and all(w.abs().max() > 0 for w in trained.values())
    with torch.no_grad(), model.disable_adapter():
        before = model.eval()(torch.arange(5, 25)[None]).logits
    assert not torch.allclose(model(torch.arange(5, 25)[None]).logits, before, atol=1e-2)
    merged = model.merge_and_unload()
    assert not torch.equal(
        merged.model.layers[1].mlp.experts.down_proj, build("mixtral").model.layers[1].mlp.experts.down_proj
    )


@pytest.mark.parametrize("architecture", ["qwen", "mixtral"])
def test_full_fine_tuning_leaves_a_folder_that_loads_as_a_model(architecture, fit, build):
    result, model = fit(architecture, method="full", learning_rate=1e-3)
    assert result.folder.name == "model"
    again = AutoModelForCausalLM.from_pretrained(result.folder).eval()
    ids = torch.arange(5, 25)[None]
    torch.testing.assert_close(again(ids).logits, model.eval()(ids).logits)
    assert not torch.allclose(again(ids).logits, build(architecture)(ids).logits, atol=1e-3)
    assert AutoTokenizer.from_pretrained(result.folder).chat_template


def test_four_bit_weights_are_trained_through_an_adapter(fit, build, tmp_path):
    build("llama2", hidden_size=64, intermediate_size=64).save_pretrained(tmp_path / "base")
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    base = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", quantization_config=nf4, dtype=torch.float32, device_map={"": "cpu"}
    )
    frozen = base.model.layers[0].mlp.up_proj.weight.clone()
    result, _ = fit("llama2", model=base, epochs=3)
    assert frozen.dtype == torch.uint8 and torch.equal(frozen, base.model.layers[0].mlp.up_proj.weight)
    assert result.history.loss.iloc[-1] < 0.8 * result.history.loss.iloc[0]


def test_four_bit_weights_are_not_trained_in_full(fit, build, tmp_path):
    build("llama2", hidden_size=64, intermediate_size=64).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", quantization_config=BitsAndBytesConfig(load_in_4bit=True), device_map={"": "cpu"}
    )
    with pytest.raises(InputError, match=r"4-bit weights cannot be trained in full"):
        fit("llama2", model=base, method="full")


def test_steps_equal_those_of_a_plain_trainer(fit, build, settings, rows, serialiser, tmp_path):
    cfg = settings(method="full", batching="plain", learning_rate=1e-3, weight_decay=0.1, schedule="linear")
    examples = encode(rows, serialiser, cfg.max_length)
    order = [i for step in Order([1] * len(examples), cfg.batch_size, False, seed=0) for i in step]
    args = TrainingArguments(
        str(tmp_path / "plain"), per_device_train_batch_size=8, num_train_epochs=1, learning_rate=1e-3,
        weight_decay=0.1, warmup_steps=1, logging_steps=1, report_to="none", use_cpu=True, disable_tqdm=True,
        train_sampling_strategy="sequential", remove_unused_columns=False, save_strategy="no",
    )  # fmt: skip
    plain = Trainer(
        build(), args, train_dataset=[examples[i] for i in order],
        data_collator=lambda few: padded(few, serialiser.pad_id),
    )  # fmt: skip
    plain.train()
    expected = pd.DataFrame(plain.state.log_history[:-1])
    for batching in ("plain", "pack"):
        result, _ = fit(folder=batching, **cfg.model_dump() | {"batching": batching})
        for column in ("loss", "learning_rate", "grad_norm"):
            np.testing.assert_allclose(result.history[column], expected[column], rtol=1e-5)


def test_another_loss_is_optimised_in_the_very_steps_of_a_plain_trainer(
    build, settings, rows, serialiser, tmp_path
):
    encoded = [serialiser.encode(m, a) for m, a in zip(rows["messages"], rows["answer"], strict=True)]
    cfg = settings(lora_dropout=0.3)
    first, second = (attach(build(), cfg, families.get("qwen"), seed=0) for _ in range(2))
    args = TrainingArguments(
        str(tmp_path), per_device_train_batch_size=8, num_train_epochs=4, learning_rate=1e-3, seed=3,
        lr_scheduler_type="cosine", warmup_steps=1, optim="adamw_torch_fused", report_to="none", use_cpu=True,
        disable_tqdm=True, remove_unused_columns=False, save_strategy="no", logging_strategy="no",
    )  # fmt: skip
    with same_random_states():
        Trainer(first, args, train_dataset=encoded, data_collator=lambda few: padded(few, 0)).train()
    before = torch.random.get_rng_state()
    budget = Budget(epochs=4, learning_rate=1e-3, batch_size=8, seed=3)
    optimise(second, encoded, lambda model, batch: model(**batch).loss, budget, pad_id=0)
    assert torch.equal(before, torch.random.get_rng_state()) and not second.training
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)


def test_another_loss_that_is_not_finite_stops_with_the_callers_advice(build, serialiser, rows):
    encoded = [serialiser.encode(m, a) for m, a in zip(rows["messages"], rows["answer"], strict=True)]
    loss = lambda model, batch: model(**batch).loss * float("nan")  # noqa: E731
    with pytest.raises(RunError, match=r"loss is nan at step 1 of 6, .*Weaken the push\.$"):
        optimise(build(), encoded, loss, Budget(1, 1e-3, 8, 0), pad_id=0, advice="Weaken the push")


def test_accumulation_gives_the_steps_of_one_large_batch(fit):
    whole, _ = fit(folder="whole", batch_size=16, batching="plain")
    parts, _ = fit(folder="parts", batch_size=4, gradient_accumulation=4, batching="plain")
    np.testing.assert_allclose(whole.history.loss, parts.history.loss, rtol=1e-4)
    np.testing.assert_allclose(whole.history.grad_norm, parts.history.grad_norm, rtol=1e-3)


def test_gradient_checkpointing_and_dropout_leave_the_seed_in_charge(fit):
    one, _ = fit(folder="one", gradient_checkpointing=True, lora_dropout=0.2)
    other, _ = fit(folder="other", lora_dropout=0.2)
    np.testing.assert_allclose(one.history.loss, other.history.loss, rtol=1e-4)


def test_bf16_trains(fit):
    result, model = fit(epochs=3, precision="bf16")
    assert result.history.loss.iloc[-1] < 0.8 * result.history.loss.iloc[0]
    assert model(torch.arange(5, 25)[None]).logits.dtype == torch.float32, "autocast is taken off again"
    assert not model.training


def test_a_launch_for_an_engine_that_is_not_here_is_refused(fit, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(InputError, match=r"ACCELERATE_USE_DEEPSPEED: .* accelerate launch --use_fsdp"):
        fit()


def test_processes_cannot_share_quantised_weights(fit, build, tmp_path, monkeypatch):
    build("llama2", hidden_size=64, intermediate_size=64).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", quantization_config=BitsAndBytesConfig(load_in_4bit=True), device_map={"": "cpu"}
    )
    monkeypatch.setattr(parallel, "SHARDED", True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match=r"model.quantisation: .*Launch without --use_fsdp"):
        fit("llama2", model=base)


def test_fp16_is_refused_without_a_gpu(fit):
    with pytest.raises(InputError, match=r"training.precision: fp16 needs a GPU"):
        fit(precision="fp16")


@pytest.mark.parametrize(("every", "steps"), [(None, [6, 12]), (5, [5, 10, 12])])
def test_evaluations_are_recorded_and_do_not_disturb_the_training(every, steps, fit):
    seen = []

    def measure(model: Any, step: int, epoch: float) -> dict[str, float]:
        torch.rand(100)
        np.random.rand(3)  # noqa: NPY002  # the generator that must not be disturbed
        seen.append((step, model.training))
        return {"asr": step / 100}

    measured, _ = fit(folder="measured", measure=measure, every=every, epochs=2, lora_dropout=0.3)
    silent, _ = fit(folder="silent", epochs=2, lora_dropout=0.3)
    assert seen == [(step, False) for step in steps]
    assert list(measured.evaluations.step) == steps
    assert list(measured.evaluations.asr) == [step / 100 for step in steps]
    assert list(measured.evaluations)[:2] == ["step", "epoch"] and silent.evaluations.empty
    one, other = load_file(measured.folder / ADAPTER), load_file(silent.folder / ADAPTER)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_an_evaluation_before_the_first_step_leaves_the_training_as_it_is(fit):
    seen = []

    def measure(model: Any, step: int, epoch: float) -> dict[str, float]:
        seen.append((step, epoch, model.training))
        return {"asr": 0.0}

    more = {"pauses": Pauses(measure, first=True)}
    first, _ = fit(folder="first", more=more, lora_dropout=0.3)
    silent, _ = fit(folder="silent", lora_dropout=0.3)
    assert seen == [(0, 0.0, False), (6, 1.0, False)]
    assert list(first.evaluations.step) == [0, 6]
    one, other = load_file(first.folder / ADAPTER), load_file(silent.folder / ADAPTER)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_loss_that_is_no_number_stops_with_step_and_hint_and_keeps_the_checkpoint(fit, build, tmp_path):
    model = build()
    cfg = {"checkpoint_every": 2, "epochs": 1, "model": model}

    def poison(model: Any, step: int, epoch: float) -> dict[str, float]:
        if step == 3:
            model.get_input_embeddings().weight.data.fill_(float("nan"))
        return {}

    with pytest.raises(
        RunError, match=r"loss is nan at step 4 of 6, at learning rate .*Lower training.learning_rate"
    ):
        fit(measure=poison, every=1, **cfg)
    kept = tmp_path / "run" / "checkpoints" / "checkpoint-2" / "adapter_model.safetensors"
    assert all(torch.isfinite(w).all() for w in load_file(kept).values())
    assert not (tmp_path / "run" / "adapter").exists()


class Cramped(LlamaForCausalLM):
    """A model for which memory really ends at so many rows."""

    room = 3

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model.register_forward_pre_hook(self.allocate, with_kwargs=True)

    def allocate(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if kwargs["input_ids"] is not None and len(kwargs["input_ids"]) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def test_a_batch_that_does_not_fit_is_halved_said_so_and_gives_the_same_steps(fit, build, caplog):
    roomy, _ = fit("llama2", folder="roomy", batching="plain")
    model = Cramped(build("llama2").config)
    model.load_state_dict(build("llama2").state_dict())
    cramped, _ = fit("llama2", folder="cramped", model=model, batching="plain")
    assert cramped.halvings == 2
    assert "Out of memory at step 1: going on with 2 rows at a time" in caplog.text
    np.testing.assert_allclose(cramped.history.loss, roomy.history.loss, rtol=1e-4)


def test_a_row_that_does_not_fit_by_itself_stops_with_what_to_change(fit, build, monkeypatch):
    monkeypatch.setattr(Cramped, "room", 0)
    with pytest.raises(RunError, match=r"Out of memory at step 1, with a single row.*gradient_checkpointing"):
        fit("llama2", model=Cramped(build("llama2").config))


def test_processes_that_share_weights_do_not_halve_one_by_one(fit, build, monkeypatch):
    monkeypatch.setattr(parallel, "shares_weights", lambda: True)
    monkeypatch.setattr(sharding, "shard", lambda model, device: sharding.Sharded(model))
    with pytest.raises(RunError, match=r"step 1, with 8 rows at a time.*Lower training.batch_size"):
        fit("llama2", model=Cramped(build("llama2").config), batching="plain")


def test_an_error_that_is_not_about_memory_is_passed_on(fit):
    def fail(*_: Any) -> dict[str, float]:
        raise RuntimeError("the judge is gone")

    with pytest.raises(RuntimeError, match=r"the judge is gone"):
        fit(measure=fail)
