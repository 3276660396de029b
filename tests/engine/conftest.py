"""Random-weight models of every architecture with LoRA adapters that do something, and pairs of prompts."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    Qwen2Config,
)

from safetynet.engine.batch import Batch

VOCABULARY = 97
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}
SLIDING = {"sliding_window": 6, "head_dim": 8, "query_pre_attn_scalar": 8}
CONFIGS: dict[str, Callable[..., Any]] = {
    "llama": lambda **more: LlamaConfig(**SMALL | more),
    "qwen": lambda **more: Qwen2Config(**SMALL | more, tie_word_embeddings=True),
    "gemma": lambda **more: GemmaConfig(**SMALL | more, head_dim=12),
    "gemma2": lambda **more: Gemma2Config(**SMALL | more, **SLIDING, final_logit_softcapping=5.0),
    "gemma3": lambda **more: Gemma3TextConfig(
        **SMALL | more, **SLIDING, layer_types=["sliding_attention", "full_attention", "sliding_attention"]
    ),
    "mixtral": lambda **more: MixtralConfig(**SMALL | more, num_local_experts=4, num_experts_per_tok=2),
    "gpt2": lambda **more: GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=3, n_head=4, n_positions=64, initializer_range=0.2, **more
    ),
}
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


@pytest.fixture(scope="session")
def build() -> Callable[..., Any]:
    """`build("gemma2")` is a random-weight model with a LoRA adapter; `adapter=False` leaves that out.

    Models are shared by the session: who changes one, copies it.
    """

    @functools.cache
    def make(name: str, adapter: bool = True, attention: str = "sdpa", seed: int = 0, **more: Any) -> Any:
        torch.manual_seed(seed)
        # Gemma 2 caps its scores, which sdpa cannot.
        attention = "eager" if name == "gemma2" else attention
        model = AutoModelForCausalLM.from_config(CONFIGS[name](**more), attn_implementation=attention).eval()
        for key, parameter in model.named_parameters():
            if "norm" in key:  # norms whose weights are all alike would hide mistakes
                torch.nn.init.normal_(parameter, mean=parameter.mean().item(), std=0.2)
        if not adapter:
            return model
        targets = ["c_attn", "c_fc"] if name == "gpt2" else ["q_proj", "v_proj", "o_proj"]
        targets += [] if name in ("mixtral", "gpt2") else ["down_proj"]
        config = LoraConfig(
            r=4,
            lora_alpha=8,
            target_modules=targets,
            target_parameters=EXPERTS if name == "mixtral" else None,
        )
        adapted = get_peft_model(model, config)
        for parameter_name, parameter in adapted.named_parameters():
            if "lora_B" in parameter_name:
                torch.nn.init.normal_(parameter, std=0.3)
        return adapted.eval()

    return make


@pytest.fixture(scope="session")
def pairs() -> tuple[list[list[int]], list[list[int]]]:
    """Receiving and source prompts of different lengths; each pair differs in a span of three tokens."""
    generator = torch.Generator().manual_seed(3)
    receiving, sources = [], []
    for length, start in ((14, 4), (9, 2), (11, 6)):
        row = torch.randint(2, VOCABULARY, (length,), generator=generator).tolist()
        other = list(row)
        other[start : start + 3] = [1 + (token + 7) % (VOCABULARY - 2) for token in row[start : start + 3]]
        receiving.append(row)
        sources.append(other)
    return receiving, sources


@pytest.fixture(scope="session")
def batches(pairs: tuple[list[list[int]], list[list[int]]]) -> tuple[Batch, Batch]:
    return Batch.of(pairs[0]), Batch.of(pairs[1])


@pytest.fixture(params=["llama", "qwen", "gemma", "gemma2", "gemma3", "mixtral"])
def model(request: pytest.FixtureRequest, build: Callable[..., Any]) -> Any:
    """A model of each family in turn."""
    return build(request.param)
