"""An adapter merged for a while: the same logits and answers, and weights that come back bit by bit."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests.models import variants

from safetynet import recipe
from safetynet.evaluation.generation import generate
from safetynet.models import adapters, loading
from safetynet.models.adapters import merged, switched_off

IDS = torch.arange(40, 60)[None]
TOLERANCE = 1e-4
PROMPTS = [[{"role": "user", "content": text}] for text in ("What is the capital of France?", "2 plus 2?")]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Miniatures count as large."""
    monkeypatch.setattr(adapters, "MERGED_FROM", 0)


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def values(model):
    return {name: (p.data_ptr(), p.detach().clone()) for name, p in model.named_parameters()}


def changed(model, before):
    return [n for n, p in model.named_parameters() if not torch.equal(p, before[n][1])]


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("family", ["qwen", "llama3", "gemma"])
def test_a_merged_adapter_gives_the_same_logits_and_its_base_comes_back_bit_by_bit(family):
    model = variants.made("lora", family)
    before, on = values(model), logits(model)
    with switched_off(model):
        off = logits(model)
    with merged(model):
        assert len(changed(model, before)) == sum(".base_layer.weight" in name for name in before)
        torch.testing.assert_close(logits(model), on, atol=TOLERANCE, rtol=0)
    assert float((on - off).abs().max()) > 100 * TOLERANCE, "the adapter does something"
    after = values(model)
    assert changed(model, before) == [] and {n: v[0] for n, v in after.items()} == {
        n: v[0] for n, v in before.items()
    }
    assert torch.equal(logits(model), on)


@pytest.mark.usefixtures("small")
def test_weights_come_back_when_answering_fails():
    model = variants.made("lora")
    before = values(model)
    with pytest.raises(RuntimeError, match="out of memory"), merged(model):
        raise RuntimeError("out of memory")
    assert changed(model, before) == []


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("name", variants.ALL)
def test_every_kind_of_adapter_answers_as_before(name):
    model = variants.made(name)
    before, on = values(model), logits(model)
    with merged(model):
        torch.testing.assert_close(logits(model), on, atol=TOLERANCE, rtol=0)
    assert changed(model, before) == []


@pytest.mark.usefixtures("small")
def test_nothing_is_merged_that_is_off_or_hooked_or_without_adapter():
    model = variants.made("lora")
    before = values(model)
    with switched_off(model), merged(model):
        assert changed(model, before) == []
    handle = model.get_submodule("base_model.model.model.layers.1.mlp.down_proj").register_forward_hook(
        lambda _module, _args, output: output * 0
    )
    with merged(model):
        assert changed(model, before) == [], "what hooks a module may ask for its update alone"
    handle.remove()
    with merged(variants.base_of("qwen")):
        pass


def test_small_models_are_left_as_they_are():
    model = variants.made("lora")
    before = values(model)
    with merged(model):
        assert changed(model, before) == []


def test_a_real_model_answers_the_same_merged_and_not(need, monkeypatch):
    need("smollm2")
    base = loading.load(recipe.Model(id="smollm2"), "fp32")
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = get_peft_model(base.model, LoraConfig(r=8, target_modules=names)).eval()
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.01)
    before, on = values(model), logits(model)
    with merged(model):
        assert changed(model, before)
        torch.testing.assert_close(logits(model), on, atol=TOLERANCE, rtol=0)
    answers = generate(model, base.serialiser, PROMPTS, batch_size=2, max_new_tokens=6)
    assert changed(model, before) == []
    monkeypatch.setattr(adapters, "MERGED_FROM", float("inf"))
    assert answers == generate(model, base.serialiser, PROMPTS, batch_size=2, max_new_tokens=6)
