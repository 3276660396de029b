"""Random LoRA on models of seventy types: loaded as it is, off exactly, sites sound; or one sentence."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests.models import architectures
from transformers.pytorch_utils import Conv1D

from safetynet.engine.batch import Batch
from safetynet.engine.edits import Edit, replace
from safetynet.engine.hooks import intervening
from safetynet.engine.sites import Architecture, Site
from safetynet.engine.trace import trace
from safetynet.errors import InputError
from safetynet.models import adapter_files, adapters

ROW = [5, 9, 23, 44, 7, 61, 30]
QUICK, ALL = 2, 4
"""Adapters drawn for each architecture in the fast tests, and in the slow ones."""
HEADS = ("lm_head", "embed_out")
READ_ELSEWHERE = ("bert", "bert decoder", "jamba", "mamba", "roberta")
WITHOUT_SITES = ("bert", "bert decoder", "deepseek_v4", "recurrent_gemma", "roberta", "rwkv")
SUMS = (("resid_mid", "resid_pre", "attn_out"), ("resid_post", "resid_mid", "mlp_out"))


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=torch.tensor([ROW]), use_cache=False).logits


def drawn(base: Any, seed: str) -> LoraConfig:
    """A LoRA configuration of which everything is drawn that is put on this model's modules."""
    draw = random.Random(seed)
    linear = sorted(
        {
            name.rpartition(".")[2]
            for name, module in base.named_modules()
            if isinstance(module, torch.nn.Linear | Conv1D) and name not in HEADS
        }
    )
    targets = draw.sample(linear, draw.randint(1, len(linear)))
    options: dict[str, Any] = {
        "r": draw.choice([1, 2, 4, 8]),
        "lora_alpha": draw.choice([1, 4, 16, 33]),
        "target_modules": targets,
        "use_rslora": draw.random() < 0.3,
        "bias": draw.choice(["none", "none", "none", "all", "lora_only"]),
        "init_lora_weights": draw.choice([True, True, "gaussian", "pissa", "olora", "orthogonal"]),
        "task_type": "CAUSAL_LM",
    }
    if draw.random() < 0.3:
        options |= {"rank_pattern": {draw.choice(targets): 3}, "alpha_pattern": {draw.choice(targets): 5}}
    if draw.random() < 0.25:
        options["use_dora"] = True
    if draw.random() < 0.25:
        options["layers_to_transform"] = draw.sample(range(3), 2)
    if draw.random() < 0.25:
        options["modules_to_save"] = [draw.choice(["lm_head", "embed_out", "embed_tokens", "wte"])]
    elif draw.random() < 0.25:
        options["trainable_token_indices"] = sorted(draw.sample(range(90), 3))
    return LoraConfig(**options)


def made(name: str, draws: int, folder: Path) -> list[tuple[Any, Path]]:
    """So many adapters that PEFT agrees to make, each in a model of its own and saved."""
    found: list[tuple[Any, Path]] = []
    for seed in range(10 * draws):
        base = architectures.build(name)
        torch.manual_seed(seed)
        try:
            model = get_peft_model(base, drawn(base, f"{name} {seed}")).eval()
            logits(model)
        except (ValueError, TypeError, RuntimeError, AttributeError, NotImplementedError):
            continue  # PEFT cannot make it, or not run it
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.1 * torch.randn_like(parameter)
        model.save_pretrained(str(folder / str(seed)))
        found.append((model, folder / str(seed)))
        if len(found) == draws:
            break
    return found


@pytest.mark.parametrize("draws", [QUICK, pytest.param(ALL, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", architectures.ARCHITECTURES)
def test_random_adapters(name: str, draws: int, tmp_path: Path) -> None:
    for theirs, folder in made(name, draws, tmp_path):
        base = architectures.build(name)
        before = logits(base)
        try:
            model = adapters.put_on(base, adapter_files.read(folder))
        except InputError as refused:
            assert "the model reads some weights without calling their module" in str(refused)
            assert name in READ_ELSEWHERE
            same(logits(base), before)
            continue
        torch.testing.assert_close(logits(model), logits(theirs), rtol=1e-4, atol=1e-4)
        with adapters.switched_off(model):
            same(logits(model), before)
        check_sites(model, name)
        same(logits(adapters.detach(model)), before)


def same(one: torch.Tensor, other: torch.Tensor) -> None:
    """The same but for rounding, in which kernels of recurrent layers differ from call to call."""
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def check_sites(model: Any, name: str) -> None:
    """A site's own values change nothing, and what a layer adds is attention and MLP."""
    architecture = Architecture.of(model)
    try:
        components = set(architecture.components()) - {"attention", "router", "expert", "adapter"}
    except InputError:
        assert name in WITHOUT_SITES
        return
    sites = [
        site
        for component in sorted(components)
        for site in architecture.sites(component)
        if site.index is None
    ]
    own, expected = trace(model, Batch.of([ROW]), sites), logits(model)
    for site in sites:
        with intervening(model, [Edit(site, replace(own.value(site)[0]))]):
            torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    for total, *terms in SUMS:
        for layer in range(architecture.shape.layers):
            if all(layer in architecture.layers_with(component) for component in (total, *terms)):
                added = sum(own.value(Site(term, layer)) for term in terms)
                torch.testing.assert_close(added, own.value(Site(total, layer)), rtol=1e-4, atol=1e-4)
