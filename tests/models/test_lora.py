"""`LoraUpdate` against PEFT's own merge, for every kind of adapter and every architecture."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests.models import architectures, variants
from transformers.pytorch_utils import Conv1D

from safetynet import recipe
from safetynet.errors import InputError
from safetynet.models import adapters, loading
from safetynet.models.lora import LoraUpdate, adapted_modules, put_update, update_of, updates

EVERY_LORA = variants.LORA | variants.EXPERTS
HEADS = ("lm_head", "embed_out", "decoder")


def lora_modules(model: Any) -> dict[str, Any]:
    """Every LoRA module, on embeddings and head too, by the path of its weight in the base model."""
    name, found = model.active_adapter, {}
    for path, module in model.named_modules():
        if hasattr(module, "lora_A") and (name in module.lora_A or name in module.lora_embedding_A):
            plain = path.removeprefix("base_model.model.").replace(".base_layer", "")
            found[f"{plain}.{getattr(module, 'parameter_name', 'weight')}"] = module
    return found


def as_stored(module: Any, update: LoraUpdate) -> torch.Tensor:
    """The dense update in the orientation of the weight that it is added to."""
    dense = update.product()
    if hasattr(module, "parameter_name"):
        dense = dense if module.get_param().ndim == 3 else dense[0]
        return dense if len(dense) == 1 or dense.ndim == 2 or module._did_swap_in_out_features else dense.mT
    return dense[0].T if module.lora_embedding_A or module.fan_in_fan_out else dense[0]


def check_against_merge(model: Any, base: dict[str, torch.Tensor]) -> int:
    """Compare each update with W(merged) - W(base); returns how many weights were compared.

    Whatever else the merge changes has to be known to `base_counterparts`.
    """
    modules, name = lora_modules(model), model.active_adapter
    counterparts = [
        path.removeprefix("base_model.model.")
        for path in (adapters.base_counterparts(model) if hasattr(model, adapters.RECORD) else ())
    ]
    merged = copy.deepcopy(model).merge_and_unload().state_dict()
    changed = {weight for weight, value in base.items() if not torch.equal(value, merged[weight])}
    for weight, module in modules.items():
        update = update_of(module, name)
        assert update.product().shape[0] == getattr(module, "num_experts", 1)
        torch.testing.assert_close(
            merged[weight] - base[weight], as_stored(module, update), rtol=1e-3, atol=2e-5
        )
        changed.discard(weight)
        if update.bias is not None:
            bias = weight.replace(".weight", ".bias")
            torch.testing.assert_close(merged[bias] - base[bias], update.bias, rtol=1e-3, atol=2e-5)
            changed.discard(bias)
    tied = [base[weight] for weight in modules if "embed" in weight]
    changed = {weight for weight in changed if not any(torch.equal(base[weight], value) for value in tied)}
    known = {part for path in counterparts for part in path.split(".")[-4:]}
    assert not {weight for weight in changed if not known & set(weight.split(".")[-2:])}
    return len(modules)


@pytest.mark.parametrize("family", ["qwen", "llama2", "gemma", "mixtral"])
@pytest.mark.parametrize("name", EVERY_LORA)
def test_an_update_is_what_peft_s_merge_adds_or_is_refused_by_name(name, family, tmp_path: Path):
    if name in variants.EXPERTS and family != "mixtral":
        pytest.skip("this family has no experts")
    try:
        variants.saved(name, tmp_path, family)
    except ValueError as error:  # such as target modules that Mixtral does not have
        pytest.skip(str(error))
    loaded = loading.load(recipe.Model(family=family, id="miniature"), "fp32")
    base = {key: value.clone() for key, value in loaded.model.state_dict().items()}
    model = adapters.attach(loaded, tmp_path)
    if name == "kasa":
        with pytest.raises(InputError, match=r"KaSA: it replaces the weights that it is put on\. Merge it"):
            list(updates(model))
    elif name in ("repeated layers", "lora_bias"):
        # PEFT merges no adapter whose layers share weights, and no bias into modules that have none: what it
        # adds in a forward pass is the reference.
        for _, module, update in updates(model):
            x = torch.randn(3, module.in_features)
            added = module(x) - module.base_layer(x)
            expected = x @ update.product()[0].T + (0.0 if update.bias is None else update.bias)
            torch.testing.assert_close(added, expected, rtol=1e-3, atol=1e-4)
            assert (update.bias is not None) == (name == "lora_bias")
    else:
        assert check_against_merge(model, base)


@pytest.mark.parametrize("name", architectures.ARCHITECTURES)
@pytest.mark.parametrize(
    "variant",
    ["plain", pytest.param("dora", marks=pytest.mark.slow), pytest.param("bias", marks=pytest.mark.slow)],
)
def test_an_update_is_what_peft_s_merge_adds_in_every_architecture(name, variant):
    base = architectures.build(name)
    weights = {key: value.clone() for key, value in base.state_dict().items()}
    targets = {
        path.rpartition(".")[2]
        for path, module in base.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D) and path.rpartition(".")[2] not in HEADS
    }
    experts = [path for path, p in base.named_parameters() if p.ndim == 3 and "expert" in path]
    options: dict[str, Any] = {
        "plain": {"target_parameters": experts or None},
        "dora": {"use_dora": True},
        "bias": {"lora_bias": True},
    }[variant]
    config = LoraConfig(r=2, lora_alpha=3, use_rslora=True, target_modules=sorted(targets), **options)
    try:
        model = get_peft_model(base, config).eval()
        copy.deepcopy(model).merge_and_unload()
    except (ValueError, TypeError, RuntimeError, AttributeError) as error:
        pytest.skip(f"PEFT does not make or merge it: {error}")
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    assert check_against_merge(model, weights)


def test_weights_that_a_start_has_replaced_and_nobody_kept_are_refused():
    model = get_peft_model(variants.base_of("qwen"), variants.LORA["pissa"]())
    with pytest.raises(
        InputError, match=r"replaces the weights .*\(pissa\), and what they were is not known"
    ):
        list(updates(model))


def test_merged_dora_is_refused():
    model = variants.made("dora")
    model.merge_adapter()
    with pytest.raises(InputError, match=r"DoRA is merged into its weights. Call unmerge_adapter\(\) first"):
        list(updates(model))


@pytest.mark.parametrize(("name", "family"), [("lora", "qwen"), ("fused experts and routers", "mixtral")])
def test_an_update_that_is_put_back_is_the_same(name, family):
    model = variants.made(name, family)
    for _, module, update in list(updates(model)):
        components = LoraUpdate.of_components(*update.decomposed())
        assert components.product().allclose(update.product(), atol=1e-5)
        put_update(module, "default", components)
        assert update_of(module, "default").product().allclose(update.product(), atol=1e-5)
    assert [place for place, _ in adapted_modules(model)] == [place for place, _, _ in updates(model)]


def test_an_update_of_higher_rank_than_its_weight_is_put_back():
    config = variants.lora(r=80, target_modules=["k_proj"])
    model = get_peft_model(variants.base_of("qwen"), config()).eval()
    ((_, first, _), *_) = updates(model)
    first.lora_B["default"].weight.data.normal_(std=0.1)
    update = update_of(first, "default")
    assert update.down.shape[1] > min(update.product().shape[1:])
    put_update(first, "default", LoraUpdate.of_components(*update.decomposed()))
    assert update_of(first, "default").product().allclose(update.product(), atol=1e-4)
