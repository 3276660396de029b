"""The parts of a decoder layer, whatever its family: where attention, MLP, heads and experts are reached.

In: a layer of a transformers model, with or without LoRA modules inside. Out: the modules whose inputs and
outputs are the places of the residual stream. Families differ in how they norm; the names tell. What names
cannot tell, `engine.sitecheck` finds out from a forward pass.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from safetynet.models.blocks import decoder_layers, unwrapped

# Names that transformers gives a layer's modules, as paths from the layer or from its attention.
ATTENTION = ("self_attn", "attn.attention", "attn", "attention", "self_attention", "multi_head_attention")
OUTPUT = ("o_proj", "c_proj", "out_proj", "dense", "wo", "Wo")
WRITERS = (*OUTPUT, "down_proj", "fc_out", "w2", "dense_4h_to_h")
"""Names of the modules, and parameters, that write to the residual stream."""
MLP = ("mlp", "feed_forward", "block_sparse_moe", "ffn", "mlp_block")
BEFORE_MLP = (
    "pre_feedforward_layernorm", "pre_mlp_layernorm", "post_attention_layernorm", "pre_ff_layernorm",
    "feedforward_layernorm", "ln_2", "norm2", "norm_2", "ffn_norm", "mlp_norm", "layernorm2",
)  # fmt: skip
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
"""Numbers of experts in a configuration."""
MULTIPLIER = ("residual_multiplier", "residual_scale")
"""Numbers that what attention and MLP return is multiplied with before it is added: Granite, MiniCPM."""


@dataclass(frozen=True)
class Layout:
    """What some families do otherwise than norm what attention and MLP read, and add what they return."""

    attention_end: str
    """Its output is what attention adds."""
    before_mlp: str
    """Its input is the residual stream between attention and MLP."""
    mlp_end: str
    """Its output is what the MLP adds."""


LAYOUTS = (
    # What attention and MLP return is normed, too: Gemma 2 and 3, GLM-4, AFMoE, HyperCLOVA X.
    Layout("post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"),
    Layout("post_self_attn_layernorm", "post_attention_layernorm", "post_mlp_layernorm"),
    Layout("post_attention_layernorm", "pre_mlp_layernorm", "post_mlp_layernorm"),
    Layout("post_norm1", "post_attention_layernorm", "post_norm2"),
    # What they return is normed, and nothing else is: OLMo 2 and 3, EXAONE 4.
    Layout("post_attention_layernorm", "mlp", "post_feedforward_layernorm"),
    # They return the stream, what they add to it included: BLOOM, and MPT's MLP.
    Layout("self_attention.dense", "post_attention_layernorm", "mlp.dense_4h_to_h"),
    Layout("attn", "norm_2", "ffn.down_proj"),
    # The MLP is no module of its own: OPT, XGLM, BioGPT.
    Layout("self_attn", "final_layer_norm", "fc2"),
)
"""A layer has the first whose modules it has; else the usual one."""


@dataclass(frozen=True)
class Parts:
    """Modules of one decoder layer; None where this architecture has no such module."""

    layer: Any
    attention: Any
    attention_end: Any
    """Its output, times `multiplier`, is what attention adds to the residual stream."""
    before_mlp: Any
    """Its input is the residual stream between attention and MLP."""
    mlp: Any
    mlp_end: Any
    """Its output, times `multiplier`, is what the MLP adds to the residual stream."""
    output: Any
    """Output projection of attention; its input holds the heads side by side."""
    query: Any
    key: Any
    value: Any
    experts: Any
    """Takes (tokens, width), each token's experts and their weights."""
    multiplier: float = 1.0

    @property
    def attention_norm(self) -> Any:
        """The norm of what attention returns; None where that is added as it is."""
        bare = (None, self.attention, self.output)
        return None if any(self.attention_end is module for module in bare) else self.attention_end


def parts(layer: Any) -> Parts:
    """Find the parts of a decoder layer by the names that transformers gives them."""
    attention, mlp = _first(layer, ATTENTION), _first(layer, MLP)
    ends = (attention, _first(layer, BEFORE_MLP), mlp)
    for layout in LAYOUTS:
        named = [_at(layer, path) for path in (layout.attention_end, layout.before_mlp, layout.mlp_end)]
        if all(module is not None for module in named):
            ends = (named[0], named[1], named[2])
            break
    return Parts(
        layer=layer,
        attention=attention,
        attention_end=ends[0],
        before_mlp=ends[1],
        mlp=mlp,
        mlp_end=ends[2],
        output=_first(attention, OUTPUT),
        query=getattr(attention, "q_proj", None),
        key=getattr(attention, "k_proj", None),
        value=getattr(attention, "v_proj", None),
        experts=getattr(mlp, "experts", None),
        multiplier=float(_first(layer, MULTIPLIER) or 1.0),
    )


@dataclass(frozen=True)
class Shape:
    """Sizes that every layer shares."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_size: int
    """Columns of a head's output before the output projection."""
    experts: int
    """0 for a dense model."""


def shape(model: Any) -> Shape:
    """Read a model's sizes from its configuration, and a head's from the output projection itself.

    A configuration's `head_dim` is that of queries and keys in some families, and of values in others.
    """
    config = unwrapped(model).config.get_text_config()
    heads = getattr(config, "num_attention_heads", None) or 1  # recurrent models have none
    layers = decoder_layers(model)
    outputs = (_first(_first(layer, ATTENTION), OUTPUT) for layer in layers)
    output = next((module for module in outputs if module is not None), None)
    # Width of what a linear projection, or GPT-2's, takes; other modules do not say.
    inputs = getattr(output, "in_features", None) or getattr(output, "nx", None)
    experts = (getattr(config, name, None) for name in EXPERTS)
    return Shape(
        layers=config.num_hidden_layers,
        width=config.hidden_size,
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_size=(inputs or config.hidden_size) // heads,
        experts=next((count for count in experts if count), 0),
    )


def adapters(layer: Any) -> dict[str, Any]:
    """LoRA modules of a layer by their path in it; a fused parameter's ends in the parameter's name."""
    modules = {}
    for name, module in layer.named_modules():
        factors = getattr(module, "lora_A", None)
        # AdaLoRA's factors are no modules.
        if factors and all(hasattr(factor, "weight") for factor in factors.values()):
            plain = name.replace(".base_layer", "")
            parameter = getattr(module, "parameter_name", None)
            modules[f"{plain}.{parameter}" if parameter else plain] = module
    return modules


def writes_to_stream(path: str) -> bool:
    """Whether the output of a module, or parameter, of a layer is added to the residual stream."""
    return any(name in path for name in WRITERS)


def svd_of_product(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Singular value decomposition of up @ down, (..., out, r) and (..., r, in), by two small QRs.

    A pair of singular vectors may be turned round without changing the product, and libraries and machines
    differ in which they give. Here each left one's largest entry is positive.

    Returns:
        U (..., out, r), S (..., r) in falling order and Vh (..., r, in).
    """
    # up = Q R and down^T = P T, so that up @ down = Q (R T^T) P^T: what is decomposed is (r, r), and Q and P
    # turn its singular vectors without changing their lengths.
    basis, triangle = torch.linalg.qr(up)
    other, right = torch.linalg.qr(down.mT)
    turned, values, across = torch.linalg.svd(triangle @ right.mT, full_matrices=False)
    u = basis @ turned
    largest = u.gather(-2, u.abs().argmax(-2, keepdim=True))
    sign = torch.where(largest < 0, -1.0, 1.0).to(u)
    return u * sign, values, sign.mT * (across @ other.mT)


def _first(module: Any, paths: tuple[str, ...]) -> Any:
    """What the first of the paths leads to; None where none leads anywhere."""
    return next((end for path in paths if (end := _at(module, path)) is not None), None)


def _at(module: Any, path: str) -> Any:
    for name in path.split("."):
        module = getattr(module, name, None)
    return module
