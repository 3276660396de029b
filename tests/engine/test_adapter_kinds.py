"""Other people's adapters under the engine: sites hold, and updates are places of their own or absent."""

import pytest
import torch
from tests.models import variants

from safetynet.engine.batch import Batch
from safetynet.engine.edits import Edit, replace, zero
from safetynet.engine.hooks import intervening
from safetynet.engine.sites import Architecture, Site
from safetynet.engine.trace import trace
from safetynet.errors import InputError

IDS = [5, 6, 7, 300, 22, 17, 90]


@torch.no_grad()
def logits(model):
    return model(torch.tensor([IDS])).logits


@pytest.mark.parametrize(
    "name",
    [
        "lora", "dora", "lora_bias", "pissa", "all biases", "repeated layers", "saved head", "token rows",
        "IA3", "OFT",
    ],
)  # fmt: skip
def test_a_sites_own_values_change_nothing(name):
    model = variants.made(name)
    architecture, expected = Architecture.of(model), logits(model)
    components = ("resid_pre", "attn_out", "resid_mid", "mlp_out", "head", "query", "value")
    assert set(components) <= set(architecture.components())
    sites = [Site(component, layer) for component in components for layer in range(architecture.shape.layers)]
    own = trace(model, Batch.of([IDS]), sites)
    with intervening(model, [Edit(site, replace(own.value(site)[0])) for site in sites]):
        torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["lora", "patterns", "dora", "lora_bias"])
def test_with_all_updates_at_zero_the_model_is_its_base(name):
    model = variants.made(name)
    edits = [Edit(site, zero()) for site in Architecture.of(model).sites("adapter")]
    with intervening(model, edits):
        torch.testing.assert_close(logits(model), logits(variants.base_of("qwen")), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("biases of adapted modules", "it also trains biases of the base"),
        ("kasa", "it replaces the weights that it is put on"),
        ("IA3", "it is no LoRA"),
        ("ADALORA", "it is no LoRA"),
    ],
)
def test_updates_that_are_no_place_of_their_own_are_absent_with_a_reason(name, message):
    architecture = Architecture.of(variants.made(name))
    assert "adapter" not in architecture.components()
    with pytest.raises(
        InputError, match=f"no component 'adapter'.* adapter sites is refused, since {message}"
    ):
        architecture.check(Site("adapter", 0))


@pytest.mark.parametrize("name", ["PROMPT_TUNING", "PREFIX_TUNING"])
def test_a_soft_prompt_is_refused(name):
    with pytest.raises(
        InputError, match=r"soft prompts .* intervene is refused, since it puts virtual tokens"
    ):
        trace(variants.made(name), Batch.of([IDS]))


def test_the_update_of_a_router_is_no_place():
    architecture = Architecture.of(variants.made("fused experts and routers", "mixtral"))
    with pytest.raises(InputError, match=r"no component 'adapter'.*The update of mlp\.gate\.weight is added"):
        architecture.check(Site("adapter", 0))
