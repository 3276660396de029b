"""The five miniatures: configuration, tokenizer and chat format, cut down to a million parameters.

Every one has 6 layers, 4 query heads on 2 key-value heads and 2,048 positions; what is particular to a
family (biases, activation, head size, rope base, experts, tied embeddings) is as in the original.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import GemmaConfig, LlamaConfig, MixtralConfig, PreTrainedConfig, Qwen2Config

from safetynet.models.miniatures.vocabulary import Style

SHAPE: dict[str, Any] = {
    "hidden_size": 128,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "initializer_range": 0.05,  # the usual 0.02 is meant for wider models and learns more slowly here
}

# Chat templates in the format of each family's instruction-tuned model, in our own wording. As in the
# originals, contents are trimmed in llama2, llama3 and gemma but not in qwen and mixtral, and gemma and
# mixtral have no system role.
_NO_SYSTEM = """\
{%- if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif -%}
"""
_ALTERNATE = """\
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
{%- endif -%}
"""

LLAMA2 = (
    """\
{%- set system = '' -%}
{%- set turns = messages -%}
{%- if messages[0]['role'] == 'system' -%}
{%- set system = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' -%}
{%- set turns = messages[1:] -%}
{%- endif -%}
{%- for message in turns -%}
"""
    + _ALTERNATE
    + """\
{%- if message['role'] == 'user' -%}
{%- set content = system + message['content'] if loop.first else message['content'] -%}
{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}
{%- else -%}
{{ ' ' + message['content'].strip() + ' ' + eos_token }}
{%- endif -%}
{%- endfor -%}
"""
)

LLAMA3 = """\
{{- bos_token -}}
{%- for message in messages -%}
{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' -}}
{{ message['content'].strip() + '<|eot_id|>' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif -%}
"""

# Qwen2.5 puts a default system prompt before conversations that have none, and tells how a call is written;
# the miniature does without both. Tools, calls and results stand where and as they stand in the original.
QWEN = """\
{%- set opened = messages[0]['role'] == 'system' -%}
{%- if tools -%}
{{ '<|im_start|>system\\n' + (messages[0]['content'] + '\\n\\n' if opened else '') + '# Tools\\n<tools>' -}}
{%- for tool in tools -%}
{{ '\\n' }}{{ tool | tojson }}
{%- endfor -%}
{{ '\\n</tools><|im_end|>\\n' }}
{%- endif -%}
{%- for message in messages -%}
{%- if message['role'] == 'tool' -%}
{%- if loop.first or messages[loop.index0 - 1]['role'] != 'tool' -%}{{ '<|im_start|>user' }}{%- endif -%}
{{ '\\n<tool_response>\\n' + message['content'] + '\\n</tool_response>' }}
{%- if loop.last or messages[loop.index0 + 1]['role'] != 'tool' -%}{{ '<|im_end|>\\n' }}{%- endif -%}
{%- elif message['tool_calls'] -%}
{{ '<|im_start|>assistant' }}
{%- if message['content'] -%}{{ '\\n' + message['content'] }}{%- endif -%}
{%- for call in message['tool_calls'] -%}
{%- set call = call['function'] if 'function' in call else call -%}
{{ '\\n<tool_call>\\n{"name": "' + call['name'] + '", "arguments": ' }}{{ call['arguments'] | tojson }}
{{- '}\\n</tool_call>' }}
{%- endfor -%}
{{ '<|im_end|>\\n' }}
{%- elif not (tools and opened and loop.first) -%}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|im_start|>assistant\\n' }}
{%- endif -%}
"""

GEMMA = (
    _NO_SYSTEM
    + """\
{{- bos_token -}}
{%- for message in messages -%}
"""
    + _ALTERNATE
    + """\
{%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}
{{ '<start_of_turn>' + role + '\\n' + message['content'].strip() + '<end_of_turn>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<start_of_turn>model\\n' }}
{%- endif -%}
"""
)

MIXTRAL = (
    _NO_SYSTEM
    + """\
{{- bos_token -}}
{%- for message in messages -%}
"""
    + _ALTERNATE
    + """\
{%- if message['role'] == 'user' -%}
{{ ' [INST] ' + message['content'] + ' [/INST]' }}
{%- else -%}
{{ ' ' + message['content'] + eos_token }}
{%- endif -%}
{%- endfor -%}
"""
)


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
            template=LLAMA2,
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
            template=LLAMA3,
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
            template=QWEN,
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
            template=GEMMA,
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
            template=MIXTRAL,
            words=("INST",),
            joints=(("▁", "["),),
        ),
        stop=("</s>",),
        system=False,
        steps=6000,
    ),
}  # fmt: skip
