"""Loading: families by model type, random-weight models, adapters that fit or do not."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoTokenizer,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    PreTrainedConfig,
    Qwen2Config,
)
from transformers.models.auto import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from safetynet import families, recipe
from safetynet.errors import InputError
from safetynet.models import adapters, loading, miniatures
from safetynet.training import attach

SHAPE: dict[str, Any] = {
    "vocab_size": 1024,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
OTHERS: dict[str, tuple[str, PreTrainedConfig]] = {
    "gemma 2": ("gemma", Gemma2Config(**SHAPE)),
    "gemma 3": ("gemma", Gemma3TextConfig(**SHAPE)),
    "gpt2": ("generic", GPT2Config(vocab_size=1024, n_embd=32, n_layer=2, n_head=4)),
    "generic qwen": ("generic", Qwen2Config(**SHAPE)),
}


def save(folder: Path, config: PreTrainedConfig, tokenizer_of: str, **options: Any) -> Path:
    AutoModelForCausalLM.from_config(config).save_pretrained(folder, **options)
    AutoTokenizer.from_pretrained(miniatures.path(tokenizer_of)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", miniatures.FAMILIES)
def test_every_miniature_loads_and_answers(family: str) -> None:
    base = loading.load(recipe.Model(family=family, id="miniature"), "fp32")
    prompt = base.serialiser.encode([{"role": "user", "content": "What is the opposite of hot?"}])
    with torch.no_grad():
        logits = base.model(torch.tensor([prompt.input_ids])).logits
    assert logits.shape == (1, prompt.prompt_length, len(base.serialiser.tokenizer))
    assert logits.isfinite().all()
    assert not base.model.training


@pytest.mark.parametrize("name", OTHERS)
def test_gemma_2_and_3_and_any_other_causal_model_load(name: str, tmp_path: Path) -> None:
    family, config = OTHERS[name]
    folder = save(tmp_path, config, "gemma" if family == "gemma" else "qwen")
    base = loading.load(recipe.Model(family=family, id=str(folder)), "fp32")
    prompt = base.serialiser.encode([{"role": "user", "content": "Hello"}], "Hi")
    with torch.no_grad():
        assert base.model(torch.tensor([prompt.input_ids])).logits.isfinite().all()


@pytest.mark.parametrize(("quantisation", "stored"), [("8bit", torch.int8), ("4bit", torch.uint8)])
def test_a_miniature_is_quantised_as_it_loads_and_8_bit_weights_are_not_trained(quantisation, stored) -> None:
    spec = recipe.Model(family="qwen", id="miniature", quantisation=quantisation)
    loaded, plain = loading.load(spec), loading.load(recipe.Model(family="qwen", id="miniature"))
    assert loaded.model.model.layers[0].mlp.up_proj.weight.dtype == stored
    ids = torch.tensor([loaded.serialiser.encode([{"role": "user", "content": "Hello"}]).input_ids])
    with torch.no_grad():
        logits, expected = (each.model(ids).logits[0, -1].float() for each in (loaded, plain))
    assert logits.argmax() == expected.argmax() and not torch.equal(logits, expected)
    method = "lora" if quantisation == "8bit" else "full"
    with pytest.raises(
        InputError, match=rf"{quantisation[0]}-bit weights (are for evaluation|cannot be trained)"
    ):
        attach(loaded.model, recipe.Training(method=method), loaded.family, seed=0)


def test_weights_of_another_family_are_refused(tmp_path: Path) -> None:
    folder = save(tmp_path, Qwen2Config(**SHAPE), "qwen")
    with pytest.raises(InputError, match="is of type 'qwen2', family gemma takes gemma, gemma2"):
        loading.load(recipe.Model(family="gemma", id=str(folder)))


def test_a_folder_without_safetensors_is_refused(tmp_path: Path) -> None:
    folder = save(tmp_path, Qwen2Config(**SHAPE), "qwen")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(InputError, match="a pickle checkpoint"):
        loading.load(recipe.Model(family="qwen", id=str(folder)))


def test_a_gpu_that_is_not_there_is_refused() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(InputError, match=r"model\.device: this machine has no CUDA GPU"):
        loading.load(recipe.Model(family="qwen", id="miniature", device="cuda"))


def adapter(folder: Path, base: loading.LoadedModel) -> Path:
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    get_peft_model(base.model, config).save_pretrained(folder)
    return folder


def test_an_adapter_fits_its_own_base_and_comes_off_again(tmp_path: Path) -> None:
    spec = recipe.Model(family="qwen", id="miniature")
    folder = adapter(tmp_path, loading.load(spec))
    base = loading.load(spec)
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        before = base.model(ids).logits
        attached = adapters.attach(base, folder)
        assert torch.allclose(attached(ids).logits, before)
        attached.unload()
        assert torch.equal(base.model(ids).logits, before)


def test_no_loading_bar_is_written_where_no_terminal_shows_it(capfd: pytest.CaptureFixture) -> None:
    enabled = transformers_logging.is_progress_bar_enabled()
    loading.load(recipe.Model(family="qwen", id="miniature"))
    assert "Loading weights" not in capfd.readouterr().err
    assert transformers_logging.is_progress_bar_enabled() == enabled, "the user's own setting stays"


def test_an_adapter_of_another_base_is_refused(tmp_path: Path) -> None:
    folder = adapter(tmp_path, loading.load(recipe.Model(family="qwen", id="miniature")))
    other = loading.load(recipe.Model(family="llama3", id="miniature"))
    with pytest.raises(InputError, match=r"this adapter was trained on .*qwen, not on .*llama3"):
        adapters.attach(other, folder)


def test_a_pickled_adapter_and_an_empty_folder_are_refused(tmp_path: Path) -> None:
    base = loading.load(recipe.Model(family="qwen", id="miniature"))
    with pytest.raises(InputError, match=r"there is no adapter_config\.json"):
        adapters.attach(base, tmp_path)
    folder = adapter(tmp_path, base)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(InputError, match="A pickle"):
        adapters.attach(base, folder)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("adapter_config.json", r"its adapter_config\.json cannot be read .* Save the adapter again"),
        ("adapter_model.safetensors", r"its adapter_model\.safetensors is damaged .* Copy or save it again"),
    ],
)
def test_a_damaged_adapter_is_refused_by_its_file(name: str, message: str, tmp_path: Path) -> None:
    base = loading.load(recipe.Model(family="qwen", id="miniature"))
    folder = adapter(tmp_path, loading.load(recipe.Model(family="qwen", id="miniature")))
    (folder / name).write_text("{")
    with pytest.raises(InputError, match=message):
        adapters.attach(base, folder)


def test_an_adapter_that_names_no_base_is_told_by_its_shapes(tmp_path: Path) -> None:
    folder = adapter(tmp_path, loading.load(recipe.Model(family="qwen", id="miniature")))
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": None}))
    adapters.attach(loading.load(recipe.Model(family="qwen", id="miniature")), folder).unload()
    other = loading.load(recipe.Model(family="gemma", id="miniature"))
    with pytest.raises(
        InputError,
        match=r"does not fit .*gemma: size mismatch of \d+ of its \d+ tensors, .* do not go together\.",
    ):
        adapters.attach(other, folder)


def test_damaged_weights_are_refused(tmp_path: Path) -> None:
    folder = save(tmp_path, Qwen2Config(**SHAPE), "qwen")
    (folder / "model.safetensors").write_bytes(b"{")
    with pytest.raises(InputError, match=r"model\.id: the weights of .* its safetensors are damaged"):
        loading.load(recipe.Model(family="qwen", id=str(folder)))


@pytest.mark.parametrize("name", families.names())
def test_a_family_module_declares_everything(name: str) -> None:
    family = families.get(name)
    assert family.system in ("native", "fold")
    assert family.lora_targets
    assert {"gpus", "cpus", "memory_gb", "walltime"} <= set(family.resources)
    assert recipe.Recipe.model_validate(
        {"model": {"family": name, "id": "x"}, **without_model(family.defaults)}
    )


def without_model(defaults: Any) -> dict[str, Any]:
    return {key: value for key, value in defaults.items() if key != "model"}


def test_an_unknown_family_is_named_with_those_that_exist() -> None:
    with pytest.raises(InputError, match=r"there is no family 'gpt'. Choose one of: gemma, generic, llama2"):
        families.get("gpt")
