"""The live check of a model: one pass for each, whatever adapters come and go, and nothing left changed."""

import copy
import gc

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, GraniteConfig, LlamaConfig, OPTConfig

from safetynet.engine import sitecheck
from safetynet.engine.batch import Batch
from safetynet.engine.edits import Edit, zero
from safetynet.engine.hooks import intervening
from safetynet.engine.sites import Architecture, Site
from safetynet.engine.trace import trace
from safetynet.errors import InputError

SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
ROW = [5, 9, 23, 44, 7, 61]


def llama(**more):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(LlamaConfig(**SMALL, **more)).eval()


@pytest.fixture
def passes():
    """`passes(model)` is a list that grows by the number of tokens of each pass of the model."""
    handles = []

    def count(model):
        seen = []
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        handles.append(
            inner.register_forward_pre_hook(
                lambda _m, _a, kwargs: seen.append(kwargs["input_ids"].numel()), with_kwargs=True
            )
        )
        return seen

    yield count
    for handle in handles:
        handle.remove()


def test_a_model_is_checked_by_one_short_pass_however_often_it_is_opened(passes):
    model = llama()
    seen = passes(model)
    for _ in range(3):
        assert "head" in Architecture.of(model).components()
        Architecture.of(model).check(Site("mlp_out", 1))
    assert seen == [10]


def test_adapters_that_come_change_or_go_ask_for_no_other_check(passes):
    model = llama()
    seen = passes(model)
    plain = Architecture.of(model).components()
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "o_proj", "down_proj"]))
    adapted.add_adapter("second", LoraConfig(r=3, target_modules=["v_proj", "o_proj"]))
    assert Architecture.of(adapted).components() == [*plain, "adapter"]
    adapted.set_adapter("second")
    # Layers are looked up anew: what an adapter has taken the place of is not what is hooked.
    assert Architecture.of(adapted).layers[0].output is model.model.layers[0].self_attn.o_proj
    assert Architecture.of(adapted.unload()).components() == plain
    assert seen == [10]


def test_other_modules_in_a_layers_place_are_checked_again(passes):
    model = llama()
    assert "attn_out" in Architecture.of(model).components()

    class Scaled(type(model.model.layers[1])):
        def forward(self, hidden_states, **kwargs):
            return 2 * super().forward(hidden_states, **kwargs)

    other = copy.deepcopy(model.model.layers[1])
    other.__class__ = Scaled
    model.model.layers[1] = other
    seen = passes(model)
    architecture = Architecture.of(model)
    assert architecture.layers_with("attn_out") == [0, 1, 2] and architecture.layers_with("mlp_out") == [0, 2]
    with pytest.raises(InputError, match="mlp_out 1: what the MLP reads and returns does not add up"):
        architecture.check(Site("mlp_out", 1))
    assert seen == [10]


def test_a_verdict_goes_with_its_model():
    before = len(sitecheck._CHECKED)
    model = llama()
    assert Architecture.of(model).components() and len(sitecheck._CHECKED) == before + 1
    del model
    gc.collect()
    assert len(sitecheck._CHECKED) <= before


def test_the_check_leaves_a_model_as_it_was():
    model = llama(attention_dropout=0.5)
    model.train()
    model.model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    weights = {name: parameter.clone() for name, parameter in model.named_parameters()}
    state = torch.random.get_rng_state()
    assert "resid_mid" in Architecture.of(model).components()
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(weights[name], parameter) for name, parameter in model.named_parameters())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_within_rounding_are_sums_and_others_are_not(dtype):
    model = llama().to(dtype)
    assert Architecture.of(model).components() == Architecture.of(llama()).components()
    other = llama().to(dtype)
    for layer in other.model.layers:
        layer.register_forward_hook(lambda _module, _args, output: output * 1.1)
    assert "does not add up to the layer's output" in Architecture.of(other).why_absent("mlp_out")


def test_a_residual_multiplier_belongs_to_what_is_added():
    config = GraniteConfig(**SMALL, residual_multiplier=0.25, logits_scaling=3.0)
    model = AutoModelForCausalLM.from_config(config).eval()
    kept = {}
    handle = model.model.layers[1].self_attn.register_forward_hook(
        lambda _m, _a, output: kept.update(bare=output[0])
    )
    with torch.no_grad():
        found = trace(model, Batch.of([ROW]), [Site("attn_out", 1)])
    handle.remove()
    torch.testing.assert_close(found.value(Site("attn_out", 1)), 0.25 * kept["bare"])


def test_weights_that_are_not_in_memory_are_refused(tmp_path):
    from accelerate import cpu_offload, disk_offload

    for offload in (lambda model: cpu_offload(model), lambda model: disk_offload(model, str(tmp_path))):
        model = llama()
        offload(model)
        for refused in (
            lambda model=model: Architecture.of(model).components(),
            lambda model=model: intervening(model, [Edit(Site("mlp_out", 0), zero())]).__enter__(),
        ):
            with pytest.raises(InputError, match="weights are offloaded or on the meta device"):
                refused()


def test_an_adapter_of_an_mlp_that_is_no_module_can_be_switched_off():
    torch.manual_seed(0)
    config = OPTConfig(vocab_size=97, hidden_size=32, num_hidden_layers=3, ffn_dim=48, num_attention_heads=4)
    model = AutoModelForCausalLM.from_config(
        OPTConfig(**config.to_dict() | {"word_embed_proj_dim": 32})
    ).eval()
    ids = torch.tensor([ROW, ROW[::-1]])
    with torch.no_grad():
        base = model(ids).logits
        adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "fc1", "fc2"])).eval()
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.3)
        assert not torch.allclose(adapted(ids).logits, base, atol=1e-3)
        off = [Edit(Site("adapter", layer), zero()) for layer in range(3)]
        with intervening(adapted, off):
            torch.testing.assert_close(adapted(ids).logits, base)


@pytest.fixture
def dynamo():
    yield
    torch._dynamo.reset()


def compiled_models():
    def layers(model):
        for layer in model.model.layers:
            layer.compile(backend="eager")
        return model

    def inside(model):
        for layer in model.model.layers:
            layer.mlp.compile(backend="eager")
        return model

    def itself(model):
        model.compile(backend="eager")
        return model

    def function(model):
        model.forward = torch.compile(model.forward, backend="eager")
        return model

    return {
        "layers": layers,
        "modules": inside,
        "itself": itself,
        "forward": function,
        "wrapped": lambda model: torch.compile(model, backend="eager"),
    }


@pytest.mark.parametrize("how", compiled_models())
def test_edits_and_readers_of_a_compiled_model_are_heard(how, dynamo):
    plain, ids = llama(), torch.tensor([ROW])
    model = compiled_models()[how](copy.deepcopy(plain))
    edits = [Edit(Site("mlp_out", layer), zero()) for layer in range(3)]
    with torch.no_grad():
        unedited = model(input_ids=ids).logits
        torch.testing.assert_close(unedited, plain(input_ids=ids).logits)
        with intervening(plain, edits):
            expected = plain(input_ids=ids).logits
            answer = plain.generate(ids, max_new_tokens=5, do_sample=False)
        with intervening(model, edits):
            torch.testing.assert_close(model(input_ids=ids).logits, expected)
            assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False), answer)
        assert (expected - unedited).abs().max() > 0.1
        torch.testing.assert_close(model(input_ids=ids).logits, unedited)
    site = Site("mlp_out", 1)
    read = [trace(one, Batch.of([ROW]), [site]).value(site) for one in (plain, model)]
    torch.testing.assert_close(*read)
