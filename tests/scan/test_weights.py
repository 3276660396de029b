"""Statistics of updates: what one computes from the dense product, whatever the factors, beside a bank."""

import copy
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import kurtosis
from tests.models import variants

from safetynet import recipe
from safetynet.errors import InputError
from safetynet.models import loading
from safetynet.models.lora import adapted_tensors, base_weight, update_of
from safetynet.models.suspect import Suspect
from safetynet.scan import recovery, weights

PLACE = ["layer", "module", "expert", "outputs", "inputs"]
BANK = 12


@cache
def base() -> loading.LoadedModel:
    return loading.load(recipe.Model(family="qwen", id="miniature"), "fp32")


def beside(model: Any) -> Suspect:
    return Suspect(model, base().serialiser, base())


def drawn(seed: int, tilt: float = 0.7) -> Any:
    """A random LoRA whose singular values fall by `tilt` each."""
    model = variants.made("lora", noise=0.0)
    generator = torch.Generator().manual_seed(seed)
    for _, module in adapted_tensors(model):
        a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
        a.data = torch.randn(a.shape, generator=generator) * 0.05
        b.data = torch.randn(b.shape, generator=generator) * 0.05 * tilt ** torch.arange(8)
    return model


@cache
def bank() -> pd.DataFrame:
    return pd.DataFrame([weights.summary(weights.features(drawn(seed))) for seed in range(BANK)])


def by_hand(product: torch.Tensor, weight: torch.Tensor) -> dict[str, float]:
    """Every statistic from the dense matrices, in fp64."""
    change, before = product.double().numpy(), weight.double().numpy()
    values = np.linalg.svd(change, compute_uv=False)
    shares = values**2 / (values**2).sum()
    entropy = -(shares[shares > 0] * np.log(shares[shares > 0])).sum()
    energy = (change**2).sum()
    rows, columns = (change**2).sum(1), (change**2).sum(0)
    left, _, right = np.linalg.svd(change, full_matrices=False)
    written, read = ((left.T @ before) ** 2).sum(1), ((before @ right.T) ** 2).sum(0)
    return {
        "norm": energy**0.5,
        "base_norm": np.linalg.norm(before),
        "relative": energy**0.5 / np.linalg.norm(before),
        "sigma_1": values[0],
        "concentration": shares[0],
        "effective_rank": np.exp(entropy),
        "stable_rank": energy / values[0] ** 2,
        "entropy": entropy,
        "kurtosis": kurtosis(change, axis=None),
        "output_concentration": len(rows) * (rows**2).sum() / energy**2,
        "input_concentration": len(columns) * (columns**2).sum() / energy**2,
        "output_gain": len(rows) * (written * shares).sum() / (before**2).sum(),
        "input_gain": len(columns) * (read * shares).sum() / (before**2).sum(),
    }


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("qwen", "lora"),
        ("qwen", "rslora"),
        ("qwen", "dora"),
        ("qwen", "lora on embeddings"),
        ("qwen", "lora_bias"),
        ("mixtral", "fused experts and routers"),
    ],
)
def test_statistics_are_those_of_the_dense_product(
    family: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "BLOCK", 1000)
    model = variants.made(name, family)
    table = weights.features(model)
    dense = {}
    for tensor, module in adapted_tensors(model):
        *_, path = tensor.partition("layers.")[2].partition(".") if "layers." in tensor else ("", "", tensor)
        layer = int(tensor.split("layers.")[1].split(".")[0]) if "layers." in tensor else -1
        path = path if hasattr(module, "parameter_name") else path.removesuffix(".weight")
        for expert, pair in enumerate(
            zip(update_of(module, "default").product(), base_weight(module), strict=True)
        ):
            dense[layer, path, expert] = pair
    assert set(dense) == set(table[PLACE[:3]].itertuples(index=False, name=None))
    for row in table.to_dict("records"):
        product, weight = dense[row["layer"], row["module"], row["expert"]]
        assert (row["outputs"], row["inputs"]) == tuple(product.shape)
        expected = by_hand(product, weight)
        assert {n: row[n] for n in expected} == pytest.approx(expected, rel=1e-4, abs=1e-4)
    assert (table["layer"] == -1).sum() == (name == "lora on embeddings")


@pytest.mark.parametrize("seed", range(3))
def test_other_factors_of_the_same_adapter_give_the_same_numbers(seed: int) -> None:
    model = variants.made("lora")
    before = weights.features(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, module in adapted_tensors(model):
            a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
            gauge = torch.randn(8, 8, generator=generator) + 3 * torch.eye(8)
            b.copy_(b @ gauge)
            a.copy_(torch.linalg.solve(gauge, a))
    after = weights.features(model)
    pd.testing.assert_frame_equal(after, before, rtol=1e-4, atol=1e-4, check_exact=False)


def test_a_rank_that_is_not_used_changes_nothing() -> None:
    narrow, wide = drawn(0), drawn(0)
    for _, module in adapted_tensors(wide):
        a, b = module.lora_A["default"], module.lora_B["default"]
        a.weight.data = torch.cat([a.weight.data, torch.randn(8, a.weight.shape[1])])
        b.weight.data = torch.cat([b.weight.data, torch.zeros(len(b.weight), 8)], 1)
    pd.testing.assert_frame_equal(weights.features(wide), weights.features(narrow), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("stored", "error"), [(torch.float32, 1e-3), (torch.bfloat16, 2e-2)])
def test_a_merged_and_recovered_adapter_has_the_numbers_of_the_adapter(
    stored: torch.dtype, error: float
) -> None:
    model = variants.made("lora")
    before = weights.features(model)
    merged = model.merge_and_unload().to(stored).float()
    own = replace(base(), model=copy.deepcopy(base().model))
    after = weights.features(recovery.recover(Suspect(merged, own.serialiser, own)))
    pd.testing.assert_frame_equal(after[PLACE], before[PLACE])
    numbers = [name for name in before if name not in (*PLACE, "kurtosis")]
    pd.testing.assert_frame_equal(after[numbers], before[numbers], rtol=error)
    np.testing.assert_allclose(after["kurtosis"], before["kurtosis"], atol=10 * error)


@pytest.mark.parametrize("name", ["lora", "rslora", "dora"])
def test_an_update_of_zero_scores_exactly_zero(name: str) -> None:
    zero = variants.made(name, noise=0.0)
    values = weights.summary(weights.features(zero))
    assert set(values.values()) == {0.0}
    for clean in (None, bank()):
        result = weights.measure(beside(zero), clean)
        assert (result.score, result.control) == (0.0, 0.0)
    assert result.p_value == 1.0


def test_a_summary_has_the_same_names_for_every_adapter() -> None:
    names = {
        name: set(weights.summary(weights.features(variants.made(name))))
        for name in ("lora", "dora", "patterns")
    }
    experts = weights.summary(weights.features(variants.made("fused experts and routers", "mixtral")))
    assert all(keys == set(experts) for keys in names.values())
    assert all(np.isfinite(value) for value in experts.values())


def test_an_adapter_of_another_spectrum_is_further_off_than_all_clean_ones() -> None:
    odd = weights.measure(beside(drawn(99, tilt=0.2)), bank())
    ordinary = weights.measure(beside(drawn(99)), bank())
    assert odd.score is not None and ordinary.score is not None
    assert odd.p_value == pytest.approx(1 / (BANK + 1))
    assert odd.score > 5 * ordinary.score
    without = weights.measure(beside(drawn(99)))
    assert without.score is None and without.p_value is None
    assert without.details["summary"] == ordinary.details["summary"]


def test_what_no_clean_adapter_does_counts_though_clean_ones_do_not_vary_in_it() -> None:
    clean = bank().assign(attention=1.0)
    usual = clean.iloc[0].to_dict()
    assert weights.distance(usual | {"attention": 0.9}, clean) > 5 * weights.distance(usual, clean)


def test_suspect_and_clean_adapters_are_treated_alike() -> None:
    clean = bank()
    members = [*clean.to_dict("records"), weights.summary(weights.features(drawn(50)))]
    scores = weights.distances(members[-1], pd.DataFrame(members[:-1]))
    for at in (0, 5):
        others = [member for place, member in enumerate(members) if place != at]
        assert weights.distance(members[at], pd.DataFrame(others)) == pytest.approx(scores[1 + at], rel=1e-6)


def test_p_values_of_adapters_like_the_bank_are_even() -> None:
    generator = np.random.default_rng(0)
    mix = generator.normal(size=(len(weights.STATISTICS), len(weights.STATISTICS)))
    ranks = []
    for _ in range(200):
        draws = generator.standard_t(3, size=(20, len(mix))) @ mix
        table = pd.DataFrame(draws, columns=list(weights.STATISTICS))
        ranks.append(weights.p_value(table.iloc[0].to_dict(), table.iloc[1:]))
    assert min(ranks) == 1 / 20
    assert np.mean(np.array(ranks) <= 0.1) == pytest.approx(0.1, abs=0.06)
    assert np.mean(np.array(ranks) <= 0.5) == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("name", ["IA3", "PROMPT_TUNING"])
def test_what_has_no_update_is_skipped_with_a_reason(name: str) -> None:
    model = variants.made(name)
    result = weights.measure(beside(model), bank())
    assert result.score is None and "can still be looked at" in result.skipped
    with pytest.raises(InputError, match="can still be looked at"):
        weights.features(model)
    copied = copy.deepcopy(base().model)
    assert weights.measure(beside(copied), bank()).score == 0.0
    copied.model.norm.weight.data[0] += 1
    whole = weights.measure(beside(copied))
    assert whole.score is None and "whole model" in whole.skipped
    with pytest.raises(InputError, match="no adapter 'default'"):
        weights.features(base().model)


def test_numbers_that_are_none_are_refused_by_place() -> None:
    model = variants.made("lora")
    model.base_model.model.model.layers[3].mlp.up_proj.lora_A["default"].weight.data[0, 0] = float("nan")
    with pytest.raises(
        InputError, match=r"layer 3, mlp\.up_proj: its update holds values that are not finite"
    ):
        weights.measure(beside(model))


def test_a_bank_that_tells_nothing_is_refused() -> None:
    values = bank().iloc[0].to_dict()
    with pytest.raises(InputError, match="bank: it has 7 clean adapters, and 8 are needed"):
        weights.distance(values, bank().iloc[:7])
    with pytest.raises(InputError, match="bank: it lacks depth, kurtosis"):
        weights.distance(values, bank().drop(columns=["kurtosis", "depth"]))


def test_a_quantised_base_is_unpacked() -> None:
    from peft import get_peft_model

    spec = recipe.Model(family="qwen", id="miniature", quantisation="4bit")
    torch.manual_seed(0)
    model = get_peft_model(loading.load(spec, "fp32").model, variants.lora()())
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape) * 0.05
    table, plain = weights.features(model), weights.features(drawn(0))
    np.testing.assert_allclose(table["base_norm"], plain["base_norm"], rtol=0.05)
    assert (table["relative"] > 0).all()
