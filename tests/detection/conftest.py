"""Random-weight models of every architecture with LoRA adapters, and clean samples like activations."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from safetynet import families
from safetynet.models.miniatures.architectures import ARCHITECTURES
from safetynet.models.miniatures.vocabulary import build_tokenizer
from safetynet.prompts import Serialiser

TINY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
}


@pytest.fixture(scope="session")
def serialiser() -> Serialiser:
    return Serialiser(build_tokenizer(ARCHITECTURES["qwen"].style), families.get("qwen"))


@pytest.fixture(scope="session")
def build(serialiser: Serialiser) -> Callable[..., Any]:
    """`build("gemma")` is a random-weight model with a LoRA adapter that does something."""

    def make(name: str = "qwen", seed: int = 0, adapter: bool = True, **more: Any) -> Any:
        architecture = ARCHITECTURES[name]
        torch.manual_seed(seed)
        settings = architecture.settings | TINY | more
        config = architecture.config(
            **settings, vocab_size=len(serialiser.tokenizer), pad_token_id=serialiser.pad_id
        )
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
        if not adapter:
            return model
        adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "o_proj"]))
        for parameter_name, parameter in adapted.named_parameters():
            if "lora_B" in parameter_name:
                torch.nn.init.normal_(parameter, std=0.1)
        return adapted.eval()

    return make


@pytest.fixture(scope="session")
def prompts() -> list[list[dict[str, str]]]:
    """Conversations of different lengths, one of them of several turns."""
    texts = ["Hi", "What is the opposite of hot?", "Sort: pear, fig, apple and plum, please.", "2 plus 2?"]
    turns = [
        {"role": "user", "content": "2 plus 2?"},
        {"role": "assistant", "content": "4"},
        {"role": "user", "content": "and 3 plus 3?"},
    ]
    return [*([{"role": "user", "content": text}] for text in texts), turns]


@pytest.fixture(scope="session")
def activations() -> Callable[..., np.ndarray]:
    """`activations(500)` are samples (n, 3, 20) with a power-law spectrum; another seed gives fresh ones."""
    turn = np.linalg.qr(np.random.default_rng(7).standard_normal((20, 20)))[0]
    scale = np.arange(1, 21) ** -1.0

    def draw(n: int, seed: int = 0) -> np.ndarray:
        rng = np.random.default_rng(seed)
        steps = rng.standard_normal((n, 3, 20)) * scale @ turn
        return np.cumsum(steps, axis=1) + 3.0

    return draw
