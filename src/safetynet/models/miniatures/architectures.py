"""The five miniatures: tokenizer style and configuration of each family, cut down to a million parameters.

Every one has 6 layers, 4 query heads on 2 key-value heads and 2,048 positions; what is particular to a
family (biases, activation, head size, rope base, experts, tied embeddings) is as in the original.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import GemmaConfig, LlamaConfig, MixtralConfig, PreTrainedConfig, Qwen2Config

from safetynet.models.miniatures import templates
from safetynet.models.miniatures.vocabulary import Style

SHAPE: dict[str, Any] = {
    "hidden_size": 128,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "initializer_range": 0.05,  # the usual 0.02 is meant for wider models and learns more slowly here
}


def _rope(base: float) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": float(base)}


@dataclass(frozen=True)
class Architecture:
    """How a family's miniature is made."""

    config: Callable[..., PreTrainedConfig]
    settings: dict[str, Any]
    """Configuration beyond `SHAPE`."""
    style: Style
    stop: tuple[str, ...]
    """Tokens at which generation ends."""
    system: bool
    """Whether the chat format has a system role."""
    steps: int = 4500
    """Steps of pretraining that bring it over 97% on held-out phrasings."""


ARCHITECTURES: dict[str, Architecture] = {
    "llama2": Architecture(
        LlamaConfig,
        {"intermediate_size": 240, "rms_norm_eps": 1e-5, "rope_parameters": _rope(10_000)},
        Style(
            kind="sentencepiece",
            special=("<unk>", "<s>", "</s>", "<pad>"),
            unk="<unk>",
            bos="<s>",
            end="</s>",
            pad="<pad>",
            template=templates.LLAMA2,
            words=("INST", "SYS"),
            joints=(("▁", "["),),
        ),
        stop=("</s>",),
        system=True,
    ),
    "llama3": Architecture(
        LlamaConfig,
        {"intermediate_size": 240, "rms_norm_eps": 1e-5, "rope_parameters": _rope(500_000)},
        Style(
            kind="bytes",
            special=(
                "<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad_id|>", "<|start_header_id|>",
                "<|end_header_id|>", "<|eot_id|>",
            ),
            bos="<|begin_of_text|>",
            end="<|eot_id|>",
            pad="<|finetune_right_pad_id|>",
            template=templates.LLAMA3,
            words=("system", "user", "assistant"),
            joints=(("Ċ", "Ċ"),),
        ),
        stop=("<|end_of_text|>", "<|eot_id|>"),
        system=True,
        steps=6000,
    ),
    "qwen": Architecture(
        Qwen2Config,
        {
            "intermediate_size": 256,
            "tie_word_embeddings": True,
            "rms_norm_eps": 1e-6,
            "rope_parameters": _rope(1_000_000),
        },
        Style(
            kind="bytes",
            special=("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
            end="<|im_end|>",
            pad="<|endoftext|>",
            template=templates.QWEN,
            words=("system", "user", "assistant"),
        ),
        stop=("<|im_end|>", "<|endoftext|>"),
        system=True,
    ),
    "gemma": Architecture(
        GemmaConfig,
        {
            "head_dim": 48,
            "intermediate_size": 256,
            "hidden_activation": "gelu_pytorch_tanh",
            "tie_word_embeddings": True,
            "rms_norm_eps": 1e-6,
            "rope_parameters": _rope(10_000),
        },
        Style(
            kind="sentencepiece",
            special=("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"),
            unk="<unk>",
            bos="<bos>",
            end="<eos>",
            pad="<pad>",
            template=templates.GEMMA,
            words=("user", "model"),
        ),
        stop=("<eos>", "<end_of_turn>"),
        system=False,
    ),
    "mixtral": Architecture(
        MixtralConfig,
        {
            "intermediate_size": 64,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "router_aux_loss_coef": 0.02,
            "rms_norm_eps": 1e-5,
            "rope_parameters": _rope(1_000_000),
        },
        Style(
            kind="sentencepiece",
            special=("<unk>", "<s>", "</s>", "<pad>"),
            unk="<unk>",
            bos="<s>",
            end="</s>",
            pad="<pad>",
            template=templates.MIXTRAL,
            words=("INST",),
            joints=(("▁", "["),),
        ),
        stop=("</s>",),
        system=False,
        steps=6000,
    ),
}  # fmt: skip
