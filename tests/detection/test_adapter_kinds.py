"""Features of adapters that are more than two factors: refused by name, never of the smaller part."""

from pathlib import Path

import pytest
from tests.models import variants

from safetynet import recipe
from safetynet.detection.capture import capture
from safetynet.detection.features import FeatureSpec
from safetynet.detection.readers import adapted_modules
from safetynet.errors import InputError
from safetynet.interventions.drift import updates
from safetynet.models import adapters, loading

PROMPTS = [[{"role": "user", "content": "What is the opposite of hot?"}]]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("dora", "its update is no product of two factors"),
        ("lora_bias", "its update has a bias beside the two factors"),
        ("biases of adapted modules", "it also trains biases of the base"),
        ("kasa", "it replaces the weights that it is put on"),
        ("IA3", "it is no LoRA"),
    ],
)
def test_what_is_more_than_two_factors_has_no_energy_and_no_drift(name: str, message: str) -> None:
    model = variants.made(name)
    with pytest.raises(InputError, match=f"adapter views is refused, since {message}"):
        adapted_modules(model)
    with pytest.raises(InputError, match=f"drift is refused, since {message}"):
        updates(model)


def test_a_rewritten_start_has_the_energy_of_the_whole_change(tmp_path: Path) -> None:
    theirs = variants.saved("pissa", tmp_path)
    base = loading.load(recipe.Model(family="qwen", id="miniature"), "fp32")
    before = {name: p.detach().clone() for name, p in base.model.named_parameters()}
    model = adapters.attach(base, tmp_path)
    for (layer, name), update in updates(model).items():
        module = theirs.get_base_model().model.layers[layer].get_submodule(name)
        now = module.base_layer.weight + module.get_delta_weight("default")
        change = (now - before[f"model.layers.{layer}.{name}.weight"]).norm()
        assert update.norm() == pytest.approx(float(change), rel=1e-3)


@pytest.mark.parametrize("name", ["PROMPT_TUNING", "PREFIX_TUNING"])
def test_a_soft_prompt_is_refused_before_a_wrong_token_is_read(name: str, tmp_path: Path) -> None:
    variants.saved(name, tmp_path)
    base = loading.load(recipe.Model(family="qwen", id="miniature"), "fp32")
    model = adapters.attach(base, tmp_path)
    with pytest.raises(InputError, match=r"soft prompts .*detect is refused"):
        capture(model, base.serialiser, PROMPTS, FeatureSpec(("last",)))


def test_updates_of_different_ranks_make_no_table_and_the_head_is_no_module_of_a_layer() -> None:
    with pytest.raises(InputError, match=r"updates of one rank, and this adapter.s are of ranks 2, 4, 8"):
        adapted_modules(variants.made("patterns"))
    model = variants.made("lora on head")
    modules = adapted_modules(model)
    assert len(modules) == 6 * len(variants.TARGETS)
    spec = FeatureSpec(("energy", "direction"))
    base = loading.load(recipe.Model(family="qwen", id="miniature"), "fp32")
    for view in capture(model, base.serialiser, PROMPTS, spec).arrays.values():
        assert view.shape == (1, len(modules), 8)


def test_states_of_repeated_layers_are_not_compared_with_the_bases(tmp_path: Path) -> None:
    variants.saved("repeated layers", tmp_path)
    base = loading.load(recipe.Model(family="qwen", id="miniature"), "fp32")
    model = adapters.attach(base, tmp_path)
    with pytest.raises(InputError, match=r"repeated layers .*detect is refused, since its layers are not"):
        capture(model, base.serialiser, PROMPTS, FeatureSpec(("last", "divergence")))
