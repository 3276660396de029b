"""`safetynet verify-adapter`: an adapter that does nothing, or is not whole, is told before it is served."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests import commands
from tests.models import variants

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    variants.saved("lora", tmp_path / "adapter")
    return tmp_path / "adapter"


def changed(folder: Path, change: Callable[[str, torch.Tensor], torch.Tensor]) -> None:
    tensors = load_file(folder / WEIGHTS)
    save_file({name: change(name, value).contiguous() for name, value in tensors.items()}, folder / WEIGHTS)


def configured(folder: Path, **fields: object) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def verified(folder: Path, *options: str, code: int) -> str:
    done = commands.safetynet("verify-adapter", folder, *options, cwd=folder.parent)
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return " ".join((done.stdout + done.stderr).split())


BASE = ("--base", "qwen-miniature", "--same-base")


def test_an_adapter_that_acts_is_said_to(adapter):
    assert "its files speak of an effect. Name --base" in verified(adapter, code=0)
    text = verified(adapter, *BASE, code=0)
    assert float(text.split("by up to ")[1].rstrip(".")) > 0.01


def test_factors_at_zero_change_nothing_with_and_without_a_base(adapter):
    changed(adapter, lambda name, value: value * (".lora_B." not in name))
    assert "lora_B is zero in all 42 modules" in verified(adapter, code=1)
    text = verified(adapter, *BASE, code=1)
    assert "The logits of 8 prompts are those of the base bit by bit: every update is zero." in text


def test_some_factors_at_zero_are_counted_and_named(adapter):
    changed(adapter, lambda name, value: value * (".layers.1." not in name or ".lora_B." not in name))
    text = verified(adapter, *BASE, code=0)
    assert "lora_B is zero in 7 of 42 modules" in text
    assert "layers.1" in text


def test_a_scale_of_zero_changes_nothing(adapter):
    configured(adapter, lora_alpha=0)
    assert "lora_alpha is 0, so that every update is scaled to nothing." in verified(adapter, code=1)


def test_names_that_peft_would_leave_out_are_told_with_a_base(adapter):
    tensors = load_file(adapter / WEIGHTS)
    save_file({name.replace("q_proj", "query"): value for name, value in tensors.items()}, adapter / WEIGHTS)
    assert "It does not go into this base." in verified(adapter, *BASE, code=1)


def test_targets_of_another_base_are_told(adapter):
    configured(adapter, target_modules=["c_attn", "c_proj"])
    assert "It does not go into this base." in verified(adapter, *BASE, code=1)


def test_a_base_of_another_name_is_told_and_another_size_too(adapter):
    configured(adapter, base_model_name_or_path="somebody/else")
    assert "trained on somebody/else" in verified(adapter, "--base", "qwen-miniature", code=1)
    assert "It does not go into this base." in verified(
        adapter, "--base", "llama3-miniature", "--same-base", code=1
    )


@pytest.mark.parametrize("factor", [1e8, 1e-12])
def test_values_that_a_number_type_cannot_hold_are_told(factor, adapter):
    changed(adapter, lambda name, value: value * (factor if ".lora_B." in name else 1))
    text = verified(adapter, code=1)
    assert "In fp16 42 tensors of 84 overflow, or round to zero altogether" in text
    assert "In bf16" not in text


def test_what_cannot_be_read_is_refused(adapter, tmp_path):
    assert "the folder itself is no adapter; those below it are adapter" in verified(tmp_path, code=2)
    changed(adapter, lambda name, value: value * float("nan"))
    assert "hold values that are not finite" in verified(adapter, code=2)
    (adapter / WEIGHTS).unlink()
    assert "there is no adapter_model.safetensors" in verified(adapter, code=2)
