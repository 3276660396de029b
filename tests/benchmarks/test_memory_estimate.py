"""What a model needs, counted without its weights, against published counts and what a real step keeps."""

import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GemmaConfig, LlamaConfig, MixtralConfig, Qwen2Config

from safetynet import families
from safetynet.recipe import Training
from safetynet.training import attach

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
from _memory_estimate import needs

LLAMA_7B = LlamaConfig(
    hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32
)
PUBLISHED = {
    "llama2": (LLAMA_7B, 6_738_415_616),
    "gemma": (
        GemmaConfig(
            vocab_size=256_000, hidden_size=3072, intermediate_size=24576, num_hidden_layers=28,
            num_attention_heads=16, num_key_value_heads=16, head_dim=256,
        ),
        8_537_680_896,
    ),
    "mixtral": (
        MixtralConfig(
            hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
            num_key_value_heads=8, num_local_experts=8, num_experts_per_tok=2,
        ),
        46_702_792_704,
    ),
}  # fmt: skip
SMALL = Qwen2Config(
    vocab_size=997, hidden_size=256, intermediate_size=512, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2,
)  # fmt: skip


@pytest.mark.parametrize("family", PUBLISHED)
def test_parameters_are_as_many_as_were_published(family):
    config, count = PUBLISHED[family]
    found = needs(config, Training(batch_size=1, precision="bf16"), families.get(family), tokens=16)
    assert found.parameters == count
    assert found.weights_bytes == 2 * count
    if family == "mixtral":
        assert found.active == 12_879_925_248  # two of eight experts
        assert found.cache_bytes_per_token == 2 * 32 * 8 * 128 * 2


def test_lora_of_a_7b_model_trains_what_its_shapes_say_and_4_bit_is_a_quarter():
    cfg = Training(batch_size=1, lora_rank=16, precision="bf16")
    found = needs(LLAMA_7B, cfg, families.get("llama2"), tokens=16, quantised=True)
    by_hand = 32 * 16 * (4 * (4096 + 4096) + 3 * (4096 + 11008))
    assert found.trained == by_hand
    assert found.trained_bytes == 16 * by_hand
    assert found.saved_bytes == 4 * by_hand
    linear = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    rest = 2 * (found.parameters - linear)
    assert found.weights_bytes - rest == pytest.approx(linear * 4.127 / 8, rel=1e-3)


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("recompute", [False, True])
def test_activations_are_those_that_a_real_step_keeps(method, recompute):
    cfg = Training(
        batch_size=2, max_length=48, method=method, precision="fp32", gradient_checkpointing=recompute
    )
    family = families.get("qwen")
    found = needs(SMALL, cfg, family)
    model = attach(AutoModelForCausalLM.from_config(SMALL), cfg, family, seed=0)
    lm = model.get_base_model() if method == "lora" else model
    if recompute:
        lm.gradient_checkpointing_enable({"use_reentrant": False})
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        lm.train().base_model(input_ids=torch.zeros(2, 48, dtype=torch.long), use_cache=False)
    real = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    assert found.activations_bytes == pytest.approx(real, rel=0.01)
    assert (found.recomputed_bytes > 0) == recompute
    assert found.training_operations(10, full=True) == 1.5 * found.training_operations(10, full=False)


def test_keeping_less_for_the_backward_pass_needs_less():
    cfg = Training(batch_size=4, max_length=64, precision="fp32")
    whole = needs(SMALL, cfg, families.get("qwen"))
    less = needs(SMALL, cfg.model_copy(update={"gradient_checkpointing": True}), families.get("qwen"))
    assert less.activations_bytes < whole.activations_bytes / 5
    assert less.recomputed_bytes == whole.activations_bytes // 3, "one of three layers"
    added = less.activations_bytes + less.recomputed_bytes
    assert less.training_bytes - added == whole.training_bytes - whole.activations_bytes
