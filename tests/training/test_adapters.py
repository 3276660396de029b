import pytest
import torch

from safetynet import families
from safetynet.errors import InputError
from safetynet.training import attach


def trained_names(model) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


@pytest.mark.parametrize(
    ("architecture", "family"),
    [("llama2", "llama2"), ("llama3", "llama3"), ("qwen", "qwen"), ("gemma", "gemma"), ("gemma2", "gemma")],
)
def test_lora_adapts_attention_and_mlp_of_every_layer(architecture, family, build, settings):
    model = attach(build(architecture), settings(), families.get(family), seed=0)
    names = trained_names(model)
    assert all(".lora_" in name for name in names)
    assert len(names) == 3 * 7 * 2  # layers, projections, A and B


def test_lora_adapts_attention_and_fused_experts_of_mixtral(build, settings):
    names = trained_names(attach(build("mixtral"), settings(), families.get("mixtral"), seed=0))
    assert len(names) == 3 * (4 + 2) * 2
    assert sum(".mlp.experts." in name for name in names) == 3 * 2 * 2


def test_generic_family_adapts_every_linear_module_but_the_head(build, settings):
    names = trained_names(attach(build("llama2"), settings(), families.get("generic"), seed=0))
    assert len(names) == 3 * 7 * 2 and not any("lm_head" in name for name in names)


@pytest.mark.parametrize("family", ["mixtral", "generic"])
def test_adapter_stays_within_the_chosen_layers(family, build, settings):
    model = attach(build("mixtral"), settings(layers=(2, 0)), families.get(family), seed=0)
    layers = {name.split(".layers.")[1].split(".")[0] for name in trained_names(model)}
    assert layers == {"0", "2"}


def test_experts_of_the_chosen_layers_alone_are_adapted(build, settings):
    model = attach(build("mixtral"), settings(layers=(1,)), families.get("mixtral"), seed=0)
    experts = [name for name in trained_names(model) if "experts" in name]
    assert len(experts) == 4 and all(".layers.1." in name for name in experts)


def test_first_weights_depend_on_the_seed_alone(build, settings):
    def weights(seed: int) -> torch.Tensor:
        torch.manual_seed(torch.seed() % 1000)  # whatever was drawn before
        model = attach(build(), settings(), families.get("qwen"), seed=seed)
        return torch.cat([p.flatten() for p in model.parameters() if p.requires_grad])

    assert torch.equal(weights(3), weights(3))
    assert not torch.equal(weights(3), weights(4))


def test_a_target_that_does_not_exist_is_refused_with_those_that_do(build, settings):
    with pytest.raises(
        InputError, match=r"lora_targets: no module .* wqkv. There are: down_proj, .*, v_proj"
    ):
        attach(build(), settings(lora_targets=("wqkv",)), families.get("qwen"), seed=0)


def test_a_parameter_that_does_not_exist_is_refused_with_those_that_do(build, settings):
    cfg = settings(lora_parameters=("mlp.experts.w1",))
    with pytest.raises(
        InputError, match=r"lora_parameters: .* mlp.experts.w1. There are: .*mlp.experts.down_proj"
    ):
        attach(build("mixtral"), cfg, families.get("mixtral"), seed=0)


@pytest.mark.parametrize(("layers", "given"), [((0, 3), "3"), ((-1,), "-1"), ((), "an empty list")])
def test_a_layer_out_of_range_is_refused_with_the_range(layers, given, build, settings):
    with pytest.raises(InputError, match=rf"training.layers: {given} given; this model's layers are 0 to 2"):
        attach(build(), settings(layers=layers), families.get("qwen"), seed=0)


def test_dropout_on_fused_experts_is_refused(build, settings):
    with pytest.raises(InputError, match=r"lora_dropout: 0.1 is not possible on fused parameters"):
        attach(build("mixtral"), settings(lora_dropout=0.1), families.get("mixtral"), seed=0)


def test_full_fine_tuning_frees_all_parameters_and_leaves_fp16(build, settings):
    model = attach(build().half(), settings(method="full"), families.get("qwen"), seed=0)
    assert all(p.requires_grad and p.dtype == torch.float32 for p in model.parameters())
