"""Half precision, 4 bit, merged adapters and bare models: the same numbers as far as they carry."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests.engine.compare import Case, compare, probe
from tests.engine.conftest import CONFIGS, SMALL
from tests.engine.plain import EVERYWHERE, At, Cut, Update
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig

from safetynet.engine import edits
from safetynet.engine.batch import Batch
from safetynet.engine.edits import Edit, KnockOut
from safetynet.engine.runs import EditedRun, run_interventions
from safetynet.engine.sites import Architecture, Site
from safetynet.engine.trace import trace

PLACES = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "query", "key", "value")


def cases_of(model):
    """One of each intervention, at two places of three prompts."""
    cases = []
    for row in range(3):
        for component in (c for c in PLACES if c in Architecture.of(model).components()):
            for positions, change in (((2, 6), edits.zero()), (None, lambda x: 1.5 * x)):
                where = EVERYWHERE if positions is None else list(positions)
                for layer in (0, 2):
                    edit = Edit(Site(component, layer), change, positions)
                    cases.append(Case(row, [edit], [At(component, layer, where, change)]))
        cases.append(Case(row, [KnockOut(1, (7, 8), (1, 2))], [Cut(1, (((7, 8), (1, 2), None),))]))
    return cases


@pytest.mark.parametrize("family", CONFIGS)
def test_bf16_is_as_near_to_plain_hooks_as_bf16_can_tell(build, pairs, family):
    model = copy.deepcopy(build(family))
    for parameter in model.parameters():
        if parameter.ndim > 1:  # logits near 1, of which bf16 holds two digits
            parameter.data *= 0.5
    model = model.to(torch.bfloat16)
    compare(model, pairs[0], cases_of(model), tolerance=2e-2)


@pytest.fixture(scope="module")
def four_bit(tmp_path_factory):
    """A random model in 4 bit with LoRA, as a recipe's `quantisation: 4bit` loads it."""
    pytest.importorskip("bitsandbytes")
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(1)
    config = LlamaConfig(**SMALL | {"hidden_size": 64, "intermediate_size": 128})
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    quantisation = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        use_safetensors=True,
        dtype=torch.float32,
        quantization_config=quantisation,
        device_map={"": "cpu"},
    )
    adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"]))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return adapted.eval()


def test_a_model_in_4_bit_gives_the_numbers_of_plain_hooks(four_bit, pairs):
    assert any(type(module).__name__ == "Linear4bit" for module in four_bit.modules())
    compare(four_bit, pairs[0], cases_of(four_bit), tolerance=2e-2)


def test_the_adapter_on_a_model_in_4_bit_can_be_switched_off(four_bit, pairs):
    cases = []
    for site in Architecture.of(four_bit).sites("adapter"):
        for row in range(3):
            reference = Update(site.layer, [4, 8], torch.zeros_like, site.module)
            cases.append(Case(row, [Edit(site, edits.zero(), (4, 8))], [reference]))
    compare(four_bit, pairs[0], cases, tolerance=2e-2)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "mixtral"])
def test_a_merged_adapter_gives_the_numbers_of_the_adapted_model(build, pairs, family):
    adapted = build(family)
    merged = copy.deepcopy(adapted).merge_and_unload()
    compare(merged, pairs[0], cases_of(merged))
    runs, batch = [EditedRun(case.row, tuple(case.edits)) for case in cases_of(adapted)], Batch.of(pairs[0])
    one, other = (
        run_interventions(trace(model, batch, resume=True), runs, probe(97)) for model in (adapted, merged)
    )
    assert one.numpy() == pytest.approx(other.numpy(), abs=1e-4)


@pytest.mark.parametrize("family", CONFIGS)
def test_a_model_without_an_adapter_gives_the_numbers_of_plain_hooks(build, pairs, family):
    model = build(family, adapter=False)
    compare(model, pairs[0], cases_of(model))
