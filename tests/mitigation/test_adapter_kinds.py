"""Repairs of adapters that are more than two factors: all that belongs to them is scaled, or refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.models import variants

from safetynet import recipe
from safetynet.errors import InputError
from safetynet.mitigation import METHODS, Defender, repair
from safetynet.mitigation.relearning import plain_copy
from safetynet.mitigation.tuning import base_of
from safetynet.models import adapters, loading

IDS = torch.tensor([[5, 6, 7, 300, 22, 17, 90]])
SCALED = (
    "lora",
    "all biases",
    "pissa",
    "saved head",
    "saved head and embeddings",
    "saved norms",
    "token rows",
)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(IDS).logits


def saved(name: str, folder: Path) -> tuple[Defender, torch.Tensor]:
    """A suspect, and the logits of its base before anything was attached to it."""
    variants.saved(name, folder)
    base = loading.load(recipe.Model(family="qwen", id="miniature"), "fp32")
    before = logits(base.model)
    return Defender(model=adapters.attach(base, folder), serialiser=base.serialiser), before


@pytest.mark.parametrize("name", SCALED)
def test_nothing_of_an_adapter_is_left_when_it_is_scaled_to_nothing(name: str, tmp_path: Path) -> None:
    suspect, base = saved(name, tmp_path)
    whole = logits(suspect.model)
    for keep, expected in ((0.0, base), (1.0, whole)):
        with repair(METHODS["adapter_scaling"], suspect, {"keep": keep}, 0).open() as model:
            torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(logits(suspect.model), whole)
    with base_of(suspect) as model:
        assert torch.equal(logits(model), base)
        torch.testing.assert_close(logits(plain_copy(model)), base)


@pytest.mark.parametrize("name", ["all biases", "saved head"])
def test_half_of_an_adapter_is_half_of_all_that_it_changes(name: str, tmp_path: Path) -> None:
    suspect, _ = saved(name, tmp_path)
    base = adapters.base_counterparts(suspect.model)
    before = {n: p.detach().clone() for n, p in suspect.model.named_parameters() if n in base}
    assert before
    with repair(METHODS["adapter_scaling"], suspect, {"keep": 0.5}, 0).open() as model:
        now = dict(model.named_parameters())
        for parameter, value in before.items():
            torch.testing.assert_close(now[parameter].detach(), (value + base[parameter]) / 2)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("dora", "DoRA: mitigate is refused, since its update is no product of two factors"),
        ("lora_bias", "lora_bias.*mitigate is refused, since its update has a bias beside the two factors"),
        ("repeated layers", "mitigate is refused, since its layers share weights"),
        ("IA3", "mitigate is refused, since it is no LoRA. Merge it"),
        ("PROMPT_TUNING", "soft prompts .*mitigate is refused"),
    ],
)
def test_what_cannot_be_taken_apart_is_refused_by_name(name: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        saved(name, tmp_path)


def test_rows_of_embeddings_that_a_repair_would_lose_are_refused(tmp_path: Path) -> None:
    theirs = variants.made("lora", "llama2")
    theirs.get_base_model().model.embed_tokens.weight.data += 0.1
    theirs.save_pretrained(str(tmp_path), save_embedding_layers=True)
    base = loading.load(recipe.Model(family="llama2", id="miniature"), "fp32")
    with pytest.raises(InputError, match=r"also replaces .*embed_tokens\.weight.* PEFT would not save"):
        Defender(model=adapters.attach(base, tmp_path), serialiser=base.serialiser)
