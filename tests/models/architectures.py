"""Tiny models of many architectures with random weights, norms and biases as random as the rest.

Tests hold the engine against each of them; a table of what is supported is made from the same list.
"""

import dataclasses
import inspect
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

VOCABULARY = 97
HYBRID = ["linear_attention", "full_attention", "linear_attention"]
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "sliding_window": 6, "query_pre_attn_scalar": 8,
    "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, "n_ctx": 64, "n_inner": 48, "rotary_dim": 4,
    "d_model": 32, "n_heads": 4, "n_layers": 3, "max_seq_len": 64, "ffn_dim": 48, "word_embed_proj_dim": 32,
    "attention_heads": 4, "num_layers": 3, "expansion_ratio": 2, "n_routed_experts": 4, "num_experts": 4,
    "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "n_group": 1,
    "topk_group": 1,
    "shared_expert_intermediate_size": 24, "first_k_dense_replace": 1, "q_lora_rank": 16, "kv_lora_rank": 16,
    "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16, "state_size": 8, "conv_kernel": 4,
    "mamba_d_state": 8, "mamba_d_conv": 4, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1,
}  # fmt: skip
"""Sizes by the names that configurations give them; each takes those that it knows."""
LATENT = {"num_key_value_heads": 4, "head_dim": None}
"""Attention that keeps what keys and values are made from: one head of them for each of queries."""
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    # One after the other, norms before attention and MLP.
    "arcee": ("arcee", {}),
    "ernie4_5": ("ernie4_5", {}),
    "gemma": ("gemma", {}),
    "glm": ("glm", {}),
    "gpt2": ("gpt2", {}),
    "gpt_bigcode": ("gpt_bigcode", {}),
    "gpt_neo": (
        "gpt_neo",
        {"num_heads": 4, "attention_types": [[["global", "local", "global"], 1]], "window_size": 6},
    ),
    "gpt_neox sequential": ("gpt_neox", {"use_parallel_residual": False}),
    "helium": ("helium", {}),
    "llama": ("llama", {}),
    "minicpm3": ("minicpm3", LATENT),
    "mistral": ("mistral", {}),
    "mpt": ("mpt", {}),
    "nemotron": ("nemotron", {}),
    "olmo": ("olmo", {}),
    "opt": ("opt", {"activation_function": "gelu"}),
    "persimmon": ("persimmon", {}),
    "phi3": ("phi3", {}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "seed_oss": ("seed_oss", {}),
    "smollm3": ("smollm3", {}),
    "stablelm": ("stablelm", {}),
    "starcoder2": ("starcoder2", {}),
    "vaultgemma": ("vaultgemma", {}),
    # What attention and MLP return is normed, multiplied, or has the stream added to it.
    "afmoe": ("afmoe", {}),
    "bloom": ("bloom", {}),
    "exaone4": ("exaone4", {}),
    "gemma2": ("gemma2", {}),
    "gemma3": ("gemma3_text", {}),
    "glm4": ("glm4", {}),
    "granite": ("granite", {"residual_multiplier": 0.22, "attention_multiplier": 0.2, "logits_scaling": 2.0}),
    "granitemoe": ("granitemoe", {"residual_multiplier": 0.3}),
    "granitemoeshared": ("granitemoeshared", {"residual_multiplier": 0.3, "shared_intermediate_size": 24}),
    "hyperclovax": (
        "hyperclovax",
        {"residual_multiplier": 0.3, "use_post_norm": True, "logits_scaling": 0.5},
    ),
    "olmo2": ("olmo2", {}),
    "olmo3": ("olmo3", {}),
    # Side by side.
    "codegen": ("codegen", {}),
    "cohere": ("cohere", {}),
    "cohere2": ("cohere2", {}),
    "falcon": ("falcon", {}),
    "falcon alibi": ("falcon", {"alibi": True, "parallel_attn": False, "multi_query": False}),
    "falcon new": ("falcon", {"new_decoder_architecture": True}),
    "gpt_neox": ("gpt_neox", {}),
    "gptj": ("gptj", {}),
    "phi": ("phi", {}),
    "stablelm parallel": ("stablelm", {"use_parallel_residual": True}),
    # Experts, in all layers or in some.
    "deepseek_v2": ("deepseek_v2", LATENT),
    "deepseek_v3": ("deepseek_v3", LATENT),
    "ernie4_5_moe": ("ernie4_5_moe", {}),
    "flex_olmo": ("flex_olmo", {}),
    "glm4_moe": ("glm4_moe", {}),
    "gpt_oss": ("gpt_oss", {}),
    "llama4": ("llama4_text", {"no_rope_layers": None, "interleave_moe_layer_step": 2}),
    "mixtral": ("mixtral", {}),
    "olmoe": ("olmoe", {}),
    "phimoe": ("phimoe", {}),
    "qwen2_moe": ("qwen2_moe", {"mlp_only_layers": [1]}),
    "qwen3_moe": ("qwen3_moe", {"decoder_sparse_step": 2}),
    # Some sites, or none.
    "bert": ("bert", {"is_decoder": False}),
    "bert decoder": ("bert", {"is_decoder": True}),
    "bloom normed": ("bloom", {"apply_residual_connection_post_layernorm": True}),
    "deepseek_v4": ("deepseek_v4", {}),
    "diffllama": ("diffllama", {}),
    "gemma4": ("gemma4_unified_text", {}),
    "gpt_neox_japanese": ("gpt_neox_japanese", {}),
    "jamba": ("jamba", {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_offset": 1}),
    "mamba": ("mamba", {}),
    "openai-gpt": ("openai-gpt", {}),
    "opt normed": ("opt", {"do_layer_norm_before": False}),
    "qwen3_next": ("qwen3_next", {"layer_types": HYBRID}),
    "recurrent_gemma": ("recurrent_gemma", {}),
    "roberta": ("roberta", {"is_decoder": True}),
    "rwkv": ("rwkv", {}),
}
"""Model type of transformers and settings of each, by the name of its row."""


def build(name: str, attention: str = "eager", dtype: torch.dtype = torch.float32) -> Any:
    """A model of `ARCHITECTURES`, 3 layers of 32, in evaluation mode; always the same weights."""
    kind, settings = ARCHITECTURES[name]
    known = type(AutoConfig.for_model(kind))
    names = set(inspect.signature(known.__init__).parameters)
    names |= {field.name for field in dataclasses.fields(known)} if dataclasses.is_dataclass(known) else set()
    chosen = {key: value for key, value in (SMALL | settings).items() if key in names | set(settings)}
    chosen = {key: value for key, value in chosen.items() if not (key == "head_dim" and value is None)}
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(kind, **chosen), attn_implementation=attention
    )
    generator = torch.Generator().manual_seed(1)
    for key, parameter in model.named_parameters():
        norm = parameter.ndim == 1 and key.endswith("weight") and ("norm" in key.lower() or "ln_" in key)
        spread = 0.3 if parameter.ndim == 1 else 0.15
        parameter.data = torch.randn(parameter.shape, generator=generator) * spread + float(norm)
    return model.eval().to(dtype)
