"""The parts of a decoder layer, whatever its family: where attention, MLP, heads and experts are reached.

In: a layer of a transformers model, with or without LoRA modules inside. Out: the modules whose inputs and
outputs are the places of the residual stream. Families differ in how they norm; the names tell.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

ATTENTION = ("self_attn", "attn", "attention", "self_attention")
OUTPUT = ("o_proj", "c_proj", "out_proj", "dense", "wo")
MLP = ("mlp", "feed_forward", "block_sparse_moe", "ffn")
BEFORE_MLP = ("pre_feedforward_layernorm", "post_attention_layernorm", "ln_2", "norm2", "ffn_norm")


@dataclass(frozen=True)
class Parts:
    """Modules of one decoder layer; None where this architecture has no such module."""

    layer: Any
    attention: Any
    attention_end: Any
    """Its output is what attention adds to the residual stream."""
    before_mlp: Any
    """Its input is the residual stream between attention and MLP."""
    mlp: Any
    mlp_end: Any
    """Its output is what the MLP adds to the residual stream."""
    output: Any
    """Output projection of attention; its input holds the heads side by side."""
    query: Any
    key: Any
    value: Any
    experts: Any
    """Takes (tokens, width), each token's experts and their weights."""


def parts(layer: Any) -> Parts:
    """Find the parts of a decoder layer by the names that transformers gives them."""
    attention, mlp = _first(layer, ATTENTION), _first(layer, MLP)
    sandwiched = hasattr(layer, "pre_feedforward_layernorm")  # Gemma 2 and 3 norm what a block returns, too
    return Parts(
        layer=layer,
        attention=attention,
        attention_end=layer.post_attention_layernorm if sandwiched else attention,
        before_mlp=_first(layer, BEFORE_MLP),
        mlp=mlp,
        mlp_end=layer.post_feedforward_layernorm if sandwiched else mlp,
        output=_first(attention, OUTPUT),
        query=getattr(attention, "q_proj", None),
        key=getattr(attention, "k_proj", None),
        value=getattr(attention, "v_proj", None),
        experts=getattr(mlp, "experts", None),
    )


@dataclass(frozen=True)
class Shape:
    """Sizes that every layer shares."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_size: int
    experts: int
    """0 for a dense model."""


def shape(model: Any) -> Shape:
    """Read a model's sizes from its configuration."""
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    return Shape(
        layers=config.num_hidden_layers,
        width=config.hidden_size,
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_size=getattr(config, "head_dim", None) or config.hidden_size // heads,
        experts=getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None) or 0,
    )


def adapters(layer: Any) -> dict[str, Any]:
    """LoRA modules of a layer by their path in it; a fused parameter's ends in the parameter's name."""
    found = {}
    for name, module in layer.named_modules():
        if hasattr(module, "lora_A") and module.lora_A:
            plain = name.replace(".base_layer", "")
            parameter = getattr(module, "parameter_name", None)
            found[f"{plain}.{parameter}" if parameter else plain] = module
    return found


def svd_of_product(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Singular value decomposition of up @ down, (..., out, r) and (..., r, in), by two small QRs.

    A pair of singular vectors may be turned round without changing the product, and libraries and machines
    differ in which they give. Here each left one's largest entry is positive.

    Returns:
        U (..., out, r), S (..., r) in falling order and Vh (..., r, in).
    """
    basis, triangle = torch.linalg.qr(up)
    other, right = torch.linalg.qr(down.mT)
    turned, values, across = torch.linalg.svd(triangle @ right.mT, full_matrices=False)
    u = basis @ turned
    largest = u.gather(-2, u.abs().argmax(-2, keepdim=True))
    sign = torch.where(largest < 0, -1.0, 1.0).to(u)
    return u * sign, values, sign.mT * (across @ other.mT)


def _first(module: Any, names: tuple[str, ...]) -> Any:
    return next((getattr(module, name) for name in names if hasattr(module, name)), None)
