"""Random-weight models of every architecture with LoRA adapters, and prompts of different lengths."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma3TextConfig

from safetynet.models.miniatures.architectures import ARCHITECTURES

TINY = {
    "vocab_size": 60,
    "pad_token_id": 0,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
GEMMA2 = {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 4, "final_logit_softcapping": 3.0}
GEMMA3 = {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 4}
CONFIGS = {name: (a.config, a.settings) for name, a in ARCHITECTURES.items()} | {
    "gemma2": (Gemma2Config, GEMMA2),
    "gemma3": (Gemma3TextConfig, GEMMA3),
}
FAMILIES = ["llama2", "qwen", "gemma", "gemma2", "gemma3", "mixtral"]


@pytest.fixture(scope="session")
def build() -> Callable[..., Any]:
    """`build("gemma")` is a new random-weight model with a LoRA adapter that does something."""

    def make(name: str = "qwen", seed: int = 0, adapter: bool = True, **more: Any) -> Any:
        kind, settings = CONFIGS[name]
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(kind(**settings | TINY | more)).eval()
        for key, parameter in model.named_parameters():
            if "norm" in key:  # norms whose weights are all alike would hide mistakes
                torch.nn.init.normal_(parameter, mean=parameter.mean().item(), std=0.2)
        if not adapter:
            return model
        fused = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"] if name == "mixtral" else None
        targets = ["q_proj", "o_proj"] if fused else ["q_proj", "o_proj", "down_proj"]
        adapted = get_peft_model(
            model, LoraConfig(r=4, lora_alpha=8, target_modules=targets, target_parameters=fused)
        )
        for key, parameter in adapted.named_parameters():
            if "lora_B" in key:
                torch.nn.init.normal_(parameter, std=0.1)
        return adapted.eval()

    return make


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest, build: Callable[..., Any]) -> Any:
    """A model of each family in turn."""
    return build(request.param)


def draw(lengths: list[int], seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(5, 60, (n,), generator=generator).tolist() for n in lengths]


@pytest.fixture(scope="session")
def rows() -> list[list[int]]:
    """Six prompts of different lengths."""
    return draw([7, 12, 9, 5, 12, 10])


@pytest.fixture(scope="session")
def swapped() -> Callable[..., list[list[int]]]:
    """`swapped(rows, 1)` are the rows with other tokens at positions 1 and 2: a trigger, or a placebo."""

    def make(rows: list[list[int]], seed: int) -> list[list[int]]:
        return [[row[0], *two, *row[3:]] for row, two in zip(rows, draw([2] * len(rows), seed), strict=True)]

    return make
