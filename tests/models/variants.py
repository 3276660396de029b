"""Adapters of every kind, made by PEFT itself with random weights, as somebody else would save them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, LoraConfig, get_peft_model
from peft.tuners.lora.config import KasaConfig
from transformers import AutoModelForCausalLM

from safetynet.models import miniatures

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def lora(**options: Any) -> Callable[[], Any]:
    given = {"r": 8, "lora_alpha": 16, "target_modules": TARGETS, "task_type": "CAUSAL_LM"}
    return lambda: LoraConfig(**(given | options))


def other(kind: str, **options: Any) -> Callable[[], Any]:
    given = {"task_type": "CAUSAL_LM", "target_modules": TARGETS}
    return lambda: PEFT_TYPE_TO_CONFIG_MAPPING[kind](**(given | options))


def soft(kind: str, **options: Any) -> Callable[[], Any]:
    return lambda: PEFT_TYPE_TO_CONFIG_MAPPING[kind](task_type="CAUSAL_LM", num_virtual_tokens=6, **options)


LORA: dict[str, Callable[[], Any]] = {
    "lora": lora(),
    "rslora": lora(use_rslora=True),
    "dora": lora(use_dora=True),
    "patterns": lora(
        rank_pattern={"q_proj": 4, "layers.1.self_attn.v_proj": 2}, alpha_pattern={"down_proj": 3}
    ),
    "some layers": lora(layers_to_transform=[1, 3]),
    "all biases": lora(bias="all"),
    "biases of adapted modules": lora(bias="lora_only"),
    "lora_bias": lora(lora_bias=True),
    "repeated layers": lora(layer_replication=[[0, 4], [2, 6]]),
    "pissa": lora(init_lora_weights="pissa"),
    "pissa, rslora": lora(init_lora_weights="pissa", use_rslora=True),
    "pissa, patterns": lora(
        init_lora_weights="pissa", rank_pattern={"q_proj": 4}, alpha_pattern={"down_proj": 3}
    ),
    "pissa, dora": lora(init_lora_weights="pissa", use_dora=True),
    "olora": lora(init_lora_weights="olora"),
    "eva": lora(init_lora_weights="eva"),
    "orthogonal": lora(init_lora_weights="orthogonal"),
    "mica": lora(init_lora_weights="mica"),
    "kasa": lora(kasa_config=KasaConfig()),
    "saved head": lora(modules_to_save=["lm_head"]),
    "saved embeddings": lora(modules_to_save=["embed_tokens"]),
    "saved head and embeddings": lora(modules_to_save=["embed_tokens", "lm_head"]),
    "saved norms": lora(modules_to_save=["norm", "input_layernorm"]),
    "token rows": lora(trainable_token_indices=[5, 6, 300]),
    "lora on embeddings": lora(target_modules=[*TARGETS, "embed_tokens"]),
    "lora on head": lora(target_modules=[*TARGETS, "lm_head"]),
}
OTHERS: dict[str, Callable[[], Any]] = {
    "IA3": other("IA3", target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "ADALORA": other("ADALORA", total_step=10),
    "OFT": other("OFT", oft_block_size=8),
    "BOFT": other("BOFT", boft_block_size=8),
    "VBLORA": other("VBLORA", vector_length=8),
    "FOURIERFT": other("FOURIERFT", n_frequency=20),
    "WAVEFT": other("WAVEFT", n_frequency=20),
    "C3A": other("C3A", block_size=8),
    "LN_TUNING": other("LN_TUNING", target_modules=["norm", "input_layernorm"]),
    "TRAINABLE_TOKENS": other("TRAINABLE_TOKENS", target_modules=["embed_tokens"], token_indices=[5, 6]),
    **{
        kind: other(kind)
        for kind in (
            "ADAMSS", "BEFT", "DEFT", "DELORA", "FROD", "GLORA", "GRALORA", "HIRA", "HRA", "LILY", "LOHA",
            "LOKR", "MISS", "OSF", "PEANUT", "PSOFT", "PVERA", "RANDLORA", "ROAD", "SHIRA",
            "SUPERTUNING", "TINYLORA", "UNILORA", "VERA",
        )
    },
}  # fmt: skip
SOFT: dict[str, Callable[[], Any]] = {
    "PROMPT_TUNING": soft("PROMPT_TUNING"),
    "P_TUNING": soft("P_TUNING", encoder_hidden_size=32),
    "PREFIX_TUNING": soft("PREFIX_TUNING"),
    "CARTRIDGE": soft("CARTRIDGE"),
}
ALL = LORA | OTHERS | SOFT
EXPERTS = {
    "fused experts and routers": lora(
        r=2,
        lora_alpha=4,
        target_modules=["q_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight"],
    )
}
"""Of models with experts."""
UNTRIED: dict[str, dict[str, Any]] = {
    "pissa by fast SVD": {"init_lora_weights": "pissa_niter_4"},
    "corda": {"init_lora_weights": "corda"},
    "lora-ga": {"init_lora_weights": "lora_ga"},
    "loftq": {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4, "loftq_iter": 1}},
    "alora": {"alora_invocation_tokens": [5]},
    "qalora": {"use_qalora": True},
    "XLORA": {"peft_type": "XLORA"},
    "ADAPTION_PROMPT": {"peft_type": "ADAPTION_PROMPT", "adapter_layers": 2, "adapter_len": 4},
}
"""Fields of a configuration that need another base or another trainer: what they turn a plain LoRA into."""


def base_of(family: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(str(miniatures.path(family)), dtype=torch.float32)


def made(name: str, family: str = "qwen", noise: float = 0.05) -> Any:
    """The adapter in a model of its own; its trained parameters are moved by noise."""
    torch.manual_seed(0)
    config, base = (ALL | EXPERTS)[name](), base_of(family)
    model = get_peft_model(base, config).eval()
    if name == "repeated layers" and hasattr(base.config, "layer_types"):
        base.config.layer_types = base.config.layer_types[:1] * 8  # PEFT leaves it at six
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += noise * torch.randn_like(parameter)
    return model


def saved(name: str, folder: Path, family: str = "qwen", noise: float = 0.05) -> Any:
    """Saves `made` and gives it."""
    if name in UNTRIED:
        saved("lora", folder, family, noise)
        configured(folder, **UNTRIED[name])
        return None
    model = made(name, family, noise)
    model.save_pretrained(str(folder))
    return model


def configured(folder: Path, **changes: Any) -> None:
    """Change fields of adapter_config.json; None takes one out."""
    path = folder / "adapter_config.json"
    fields = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in fields.items() if value is not None}))
