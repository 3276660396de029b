"""Adapters that are damaged, or of another base: one sentence each, and a base that is as it was."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.models import variants
from tests.models.test_adapters import base_of, logits
from transformers import AutoModelForCausalLM

from safetynet import recipe
from safetynet.errors import InputError
from safetynet.models import adapters, loading, miniatures


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lora_alpha": float("inf")}, "it says Infinity, which is no number"),
        ({"lora_alpha": float("nan")}, "it says NaN, which is no number"),
        ({"lora_alpha": 1e30}, r"says lora_alpha: 1e\+30, which is no number up to"),
        ({"lora_alpha": 10**400}, r"says lora_alpha: 1000.*, which is no number up to"),
        ({"alpha_pattern": {"q_proj": "16"}}, r"says alpha_pattern\.q_proj: '16', which is no number"),
        ({"rank_pattern": {"q_proj": True}}, r"says rank_pattern\.q_proj: True, which is no whole number"),
        ({"rank_pattern": None}, "says rank_pattern: None, which PEFT does not take there"),
        ({"modules_to_save": "lm_head"}, "says modules_to_save: 'lm_head', which PEFT does not take there"),
        ({"bias": "some"}, "says bias: 'some', which PEFT does not take there"),
        ({"bias": None}, "says bias: None, which PEFT does not take there"),
        ({"target_modules": [1, 2]}, r"says target_modules: \[1, 2\], which PEFT does not take there"),
        ({"target_modules": "(q_proj"}, "this adapter does not fit"),
        ({"layer_replication": [[0, 9]]}, "this adapter does not fit"),
        ({"target_parameters": ["mlp.down_proj.weight"]}, r"does not fit|\d+ tensors of the adapter are not"),
        ({"base_model_name_or_path": "x" * 300}, r"this adapter was trained on x+, not on"),
        ({"base_model_name_or_path": "a\nb"}, "which is no name of a model"),
    ],
)  # fmt: skip
def test_a_field_that_says_nothing_is_one_sentence_and_leaves_the_base_alone(
    fields: dict[str, Any], message: str, folder: Path
) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    base = base_of()
    before = logits(base.model)
    with pytest.raises(InputError, match=message):
        adapters.attach(base, folder)
    assert torch.equal(logits(base.model), before)
    assert not adapters.has_adapter(base.model)


def test_a_configuration_nested_without_end_is_one_sentence(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("[" * 100_000)
    with pytest.raises(InputError, match="cannot be read"):
        adapters.attach(base_of(), folder)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_a_folder_in_the_place_of_a_file_is_one_sentence(name: str, folder: Path) -> None:
    (folder / name).unlink()
    (folder / name).mkdir()
    with pytest.raises(InputError, match="adapter"):
        adapters.attach(base_of(), folder)


def test_a_rank_of_other_tensors_is_not_blamed_on_the_base(folder: Path) -> None:
    variants.configured(folder, r=4)
    with pytest.raises(InputError, match=r"by its configuration and this base, which do not go together"):
        adapters.attach(base_of(), folder)


def test_updates_that_overflow_are_not_said_to_be_zero(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = folder / "adapter_model.safetensors"
    save_file({name: 1e25 * tensor for name, tensor in load_file(path).items()}, path)
    adapters.attach(base_of(), folder)
    assert "zero" not in caplog.text


def test_a_start_in_the_weights_is_measured_on_a_base_of_16_bits(tmp_path: Path) -> None:
    variants.saved("pissa", tmp_path)
    exact = logits(adapters.attach(base_of(), tmp_path))
    coarse = loading.load(recipe.Model(family="qwen", id="miniature"), "bf16")
    found = logits(adapters.attach(coarse, tmp_path)).float()
    assert float((found - exact).abs().max()) < 0.05 * float(exact.abs().max())


def test_a_named_base_that_was_never_downloaded_says_nothing(folder: Path, tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    shutil.copytree(miniatures.path("qwen"), clone)
    variants.configured(folder, base_model_name_or_path=str(clone))
    (clone / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(InputError, match=r"Its weights are not here to compare: if so, say --same-base"):
        adapters.attach(base_of(), folder)
    (clone / "model.safetensors").write_bytes(b"{")
    with pytest.raises(InputError, match=r"Its weights are not here to compare: if so, say --same-base"):
        adapters.attach(base_of(), folder)


@pytest.mark.parametrize("how", ["a head beside tied embeddings", "old constants", "no prefix"])
def test_the_same_weights_in_another_layout_are_the_same_base(how: str, folder: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(miniatures.path("qwen"), moved)
    tensors = load_file(moved / "model.safetensors")
    if how == "a head beside tied embeddings":
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    elif how == "old constants":
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    else:
        tensors = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    save_file(tensors, moved / "model.safetensors", {"format": "pt"})
    variants.configured(folder, base_model_name_or_path=str(moved))
    adapters.attach(base_of(), folder)


def test_whole_numbers_are_no_weights_of_the_same_base(folder: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(miniatures.path("qwen"), moved)
    tensors = load_file(moved / "model.safetensors")
    small = {name: tensor.to(torch.int8) for name, tensor in tensors.items()}
    save_file(small, moved / "model.safetensors", {"format": "pt"})
    variants.configured(folder, base_model_name_or_path=str(moved))
    with pytest.raises(InputError, match="whose weights are others"):
        adapters.attach(base_of(), folder)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_a_whole_model_of_packed_numbers_is_refused_without_a_word_in_its_configuration(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(str(miniatures.path("qwen")))
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    packed = {n: (50 * t).to(dtype) if "up_proj" in n else t for n, t in tensors.items()}
    save_file(packed, path, {"format": "pt"})
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(miniatures.path("qwen") / name, tmp_path / name)
    with pytest.raises(InputError, match=r"6 of its tensors hold numbers of type (I8|F8_E4M3)"):
        loading.load(recipe.Model(family="qwen", id=str(tmp_path)))


def test_a_configuration_that_stays_as_peft_writes_it_is_read(folder: Path) -> None:
    fields = json.loads((folder / "adapter_config.json").read_text())
    variants.configured(folder, **fields)
    adapters.attach(base_of(), folder)
