"""Adapters that bring embeddings, heads and added tokens in the many ways in which PEFT writes them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from tests.models import variants
from tests.models.test_adapters import base_of, logits

from safetynet.errors import InputError
from safetynet.models import adapters

MORE = 8


def lora(*more: str, **options: Any) -> LoraConfig:
    return LoraConfig(r=4, target_modules=["q_proj", *more], task_type="CAUSAL_LM", **options)


def resized(family: str, more: int) -> Any:
    base = variants.base_of(family)
    if more:
        base.resize_token_embeddings(base.config.vocab_size + more, mean_resizing=False)
    return base


def saved(folder: Path, family: str, config: Any, more: int, **options: Any) -> None:
    torch.manual_seed(0)
    model = get_peft_model(resized(family, more), config).eval()
    for parameter in (p for p in model.parameters() if p.requires_grad):
        parameter.data += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(folder, **options)


KINDS = {
    "tied, saved modules, added tokens": (
        "qwen", lora(modules_to_save=["embed_tokens", "lm_head"]), MORE, {}
    ),
    "untied, saved modules, added tokens": (
        "llama2", lora(modules_to_save=["embed_tokens", "lm_head"]), MORE, {}
    ),
    "saved embeddings, saved twice": (
        "qwen", lora(modules_to_save=["embed_tokens"]), 0, {"save_embedding_layers": True}
    ),
    "token rows of a tied head": (
        "qwen", lora(trainable_token_indices=[5, 6]), 0, {"save_embedding_layers": True}
    ),
    "token rows": ("llama2", lora(trainable_token_indices=[5, 6]), 0, {"save_embedding_layers": True}),
    "an update of a tied head, added tokens": ("qwen", lora("lm_head"), MORE, {}),
    "a start within the head": ("llama2", lora("lm_head", init_lora_weights="pissa"), 0, {}),
    "a soft prompt, added tokens": (
        "qwen", PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"), MORE, {}
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_they_are_loaded_as_peft_loads_them_and_come_off_without_a_trace(kind: str, tmp_path: Path) -> None:
    family, config, more, options = KINDS[kind]
    saved(tmp_path, family, config, more, **options)
    theirs = PeftModel.from_pretrained(resized(family, more), tmp_path).eval()
    base = base_of(family)
    before = logits(base.model)
    model = adapters.attach(base, tmp_path)
    torch.testing.assert_close(logits(model), logits(theirs), rtol=0, atol=1e-4)
    with adapters.switched_off(model):
        torch.testing.assert_close(logits(model)[..., : before.shape[-1]], before, rtol=0, atol=0)
    assert torch.equal(logits(adapters.detach(model)), before)


@pytest.mark.parametrize("where", ["lm_head", "embed_tokens"])
def test_rows_of_added_tokens_that_are_not_in_the_file_are_missed(where: str, tmp_path: Path) -> None:
    """Of an untied model PEFT saves the side alone that the update is on."""
    saved(tmp_path, "llama2", lora(where), MORE)
    base = base_of("llama2")
    before = logits(base.model)
    with pytest.raises(InputError, match=r"a base with 1288 tokens, this one has 1280, and its file lacks"):
        adapters.attach(base, tmp_path)
    assert torch.equal(logits(base.model), before)
