import numpy as np
import pytest
import torch

from safetynet.errors import InputError
from safetynet.interventions.drift import drift, updates
from safetynet.models.blocks import decoder_layers
from safetynet.models.lora import LoraUpdate
from safetynet.models.parts import adapters


def delta(model, layer, name):
    return adapters(decoder_layers(model)[layer])[name].get_delta_weight("default").detach()


def base(model, layer, name):
    lora = adapters(decoder_layers(model)[layer])[name]
    return (lora.get_param() if hasattr(lora, "parameter_name") else lora.get_base_layer().weight).detach()


def test_energy_and_shape_are_those_of_the_whole_update(model):
    table = drift(model, updates(model), step=30)
    assert len(table) == 3 * len(adapters(decoder_layers(model)[0])) and set(table["step"]) == {30}
    for row in table.itertuples():
        whole, weight = delta(model, row.layer, row.module), base(model, row.layer, row.module)
        np.testing.assert_allclose(row.energy, whole.norm() / weight.norm(), rtol=1e-4)
        values = torch.linalg.svdvals(whole.reshape(-1, *whole.shape[-2:]))
        squared = values.square()
        np.testing.assert_allclose(row.top_share, squared[:, 0].sum() / squared.sum(), rtol=1e-3)
        share = (values / values.sum(1, keepdim=True)).clamp_min(1e-9)
        rank = torch.exp(-(share * share.log()).sum(1))
        expected = (rank * squared.sum(1)).sum() / squared.sum()
        np.testing.assert_allclose(row.effective_rank, expected, rtol=1e-3)
    assert table["overlap"].isna().all()


def test_overlap_with_itself_is_whole_and_with_another_that_of_its_singular_vectors(build):
    one, two = build("llama", seed=0), build("llama", seed=1)
    same = drift(one, updates(one), updates(one))
    np.testing.assert_allclose(same[["overlap", "overlap_input"]], 1, atol=1e-4)
    table = drift(one, updates(one), updates(two), directions=2)
    row = table[(table["layer"] == 1) & (table["module"] == "mlp.down_proj")].iloc[0]
    u, _, v = torch.linalg.svd(delta(one, 1, "mlp.down_proj"))
    x, _, y = torch.linalg.svd(delta(two, 1, "mlp.down_proj"))
    np.testing.assert_allclose(row["overlap"], (u[:, :2].T @ x[:, :2]).square().sum() / 2, atol=1e-5)
    np.testing.assert_allclose(row["overlap_input"], (v[:2] @ y[:2].T).square().sum() / 2, atol=1e-5)
    assert (row["random"], row["random_input"]) == (2 / 32, 2 / 48)


def test_random_overlap_is_what_independent_directions_have():
    draw = torch.Generator().manual_seed(0)

    def made():
        return LoraUpdate(torch.randn(400, 20, 4, generator=draw), torch.randn(400, 4, 30, generator=draw))

    from safetynet.interventions.drift import _overlaps

    found = _overlaps(*made().decomposed(), made(), 2)
    np.testing.assert_allclose(found["overlap"], found["random"], rtol=0.15)
    np.testing.assert_allclose(found["overlap_input"], found["random_input"], rtol=0.15)


@pytest.mark.parametrize("name", ["qwen", "mixtral"])
def test_saved_adapters_are_read_as_they_are_in_the_model(build, name, tmp_path):
    model, other, plain = build(name), build(name, seed=3), build(name, adapter=False)
    model.save_pretrained(tmp_path)
    expected = updates(model)
    before = {key: value.clone() for key, value in plain.state_dict().items()}
    for holder in (other, plain):
        modules = [key for key, _ in holder.named_modules()]
        trained = [key for key, parameter in holder.named_parameters() if parameter.requires_grad]
        found = updates(holder, folder=tmp_path)
        assert found.keys() == expected.keys()
        for place, update in found.items():
            assert torch.equal(update.up, expected[place].up)
            assert torch.equal(update.down, expected[place].down)
        assert [key for key, _ in holder.named_modules()] == modules
        assert [key for key, parameter in holder.named_parameters() if parameter.requires_grad] == trained
    assert other.active_adapters == ["default"]
    assert all(torch.equal(value, before[key]) for key, value in plain.state_dict().items())
    np.testing.assert_allclose(drift(plain, expected)["energy"], drift(model, expected)["energy"])


def test_a_4_bit_weight_is_unpacked_to_find_its_size(build):
    import bitsandbytes as bnb

    model, plain = (build("llama", adapter=own, hidden_size=64, head_dim=16) for own in (True, False))
    for layer in plain.model.layers:
        old = layer.self_attn.q_proj
        packed = bnb.nn.Linear4bit(64, 64, bias=False, quant_type="nf4")
        packed.weight = bnb.nn.Params4bit(old.weight.data, requires_grad=False, quant_type="nf4")
        layer.self_attn.q_proj = packed.to("cpu")
    assert plain.model.layers[0].self_attn.q_proj.weight.dtype == torch.uint8
    exact, found = drift(model, updates(model)), drift(plain, updates(model))
    np.testing.assert_allclose(found["energy"], exact["energy"], rtol=0.05)


def test_an_untrained_adapter_has_no_energy_and_no_direction(build):
    model = build("qwen")
    for key, parameter in model.named_parameters():
        if "lora_B" in key:
            parameter.data.zero_()
    table = drift(model, updates(model), updates(build("qwen")))
    assert (table["energy"] == 0).all()
    assert table[["top_share", "effective_rank", "overlap"]].isna().all().all()


def test_models_without_adapters_and_adapters_of_other_models_are_refused(build, tmp_path):
    plain, model = build("qwen", adapter=False), build("qwen")
    with pytest.raises(InputError, match="no LoRA update of an adapter 'default'"):
        updates(plain)
    with pytest.raises(InputError, match=r"there is no adapter_config\.json"):
        updates(plain, folder=tmp_path)
    with pytest.raises(InputError, match=r"layer 0 of the model has no mlp\.down_proj"):
        drift(build("mixtral", adapter=False), updates(model))
    with pytest.raises(InputError, match="weights of different sizes"):
        drift(model, updates(model), updates(build("qwen", intermediate_size=64)))
    with pytest.raises(InputError, match="directions is 0"):
        drift(model, updates(model), directions=0)
