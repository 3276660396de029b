"""What a LoRA adapter adds to each weight: one type for every variant of PEFT's, exact or refused by name.

In: a PEFT model. Out: W(adapter on) - W(adapter off) of each adapted weight as two factors, with a leading
axis of experts, which is 1 for a linear module, so that fused experts need no code of their own. What an
adapter replaces beside these weights (biases, saved modules, token rows) is in `adapters.base_counterparts`.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from safetynet.errors import InputError
from safetynet.models import support
from safetynet.models.blocks import decoder_layers, unwrapped
from safetynet.models.parts import adapters, svd_of_product

LayerModule = tuple[int, str]
"""Layer, and the module's or parameter's path in it."""
ZERO = 1e-5
"""A product whose norm is below this share of its factors' norms is rounding."""
_MERGE = "Merge it (merge_and_unload) and give the merged model."


@dataclass(frozen=True)
class LoraUpdate:
    """The update up @ down of one weight, or of each expert's; the adapter's scale is in `up`.

    Rows are what the module writes and columns what it reads, whichever way its weight is stored: Conv1D,
    embeddings and some fused experts store the transpose.
    """

    up: Tensor
    """(experts or 1, out, r) fp32."""
    down: Tensor
    """(experts or 1, r, in) fp32."""
    bias: Tensor | None = None
    """(out,) fp32, added to the module's bias; None where the update has none."""

    @classmethod
    def of_components(cls, left: Tensor, values: Tensor, right: Tensor, scale: float = 1.0) -> Self:
        """From singular components as `decomposed` gives them.

        `scale` is the adapter's, by which `put_update` divides `up`: both stored factors get one size.
        """
        root = (values / scale).sqrt()
        return cls(left * root[..., None, :] * scale, root[..., None] * right)

    def product(self) -> Tensor:
        """(experts or 1, out, in)."""
        return self.up @ self.down

    def decomposed(self) -> tuple[Tensor, Tensor, Tensor]:
        """Left directions (E, out, r), singular values (E, r) in falling order, right ones (E, r, in)."""
        return svd_of_product(self.up, self.down)

    def norm(self) -> float:
        """Frobenius norm of up @ down, which is never built."""
        # |B A|^2 = trace(B^T B A A^T): products of (r, r) alone, experts added up.
        squared = float((self.up.mT @ self.up * (self.down @ self.down.mT)).sum())
        return squared if math.isnan(squared) else math.sqrt(max(0.0, squared))


@torch.no_grad()
def update_of(module: Any, adapter: str) -> LoraUpdate:
    """The update of one LoRA module, copied; a fused parameter's holds those of its experts.

    DoRA's, m / |W + BA| (W + BA) - W (arXiv 2402.09353), has full rank: one of its factors is the identity.

    Raises:
        InputError: for KaSA, a convolution and merged DoRA, whose updates these factors do not give.
    """
    if adapter in getattr(module, "lora_diag", {}):
        raise InputError(f"adapter: KaSA: it replaces the weights that it is put on. {_MERGE}")
    is_embedding = adapter in module.lora_embedding_A
    if is_embedding:
        a, b, bias = module.lora_embedding_A[adapter], module.lora_embedding_B[adapter], None
    else:
        a, b = module.lora_A[adapter].weight, module.lora_B[adapter].weight
        bias = getattr(module.lora_B[adapter], "bias", None)
    if a.ndim > 2:
        raise InputError(f"adapter: LoRA of a convolution: its update is no matrix. {_MERGE}")
    experts, scale = getattr(module, "num_experts", 1), module.scaling[adapter]
    # PEFT orders a fused parameter's factors by expert in A and by rank in B.
    down = a.detach().float().clone().reshape(experts, -1, a.shape[1])
    up = scale * b.detach().float().reshape(len(b), -1, experts).permute(2, 0, 1)
    bias = None if bias is None else scale * bias.detach().float()
    if adapter not in getattr(module, "lora_magnitude_vector", {}):
        return LoraUpdate(up, down, bias)
    if module.merged:
        raise InputError("adapter: DoRA is merged into its weights. Call unmerge_adapter() first.")
    weight = base_weight(module)[0]
    changed = weight + (up @ down)[0]  # (out, in); norms and magnitudes are of its rows
    magnitude = module.lora_magnitude_vector[adapter].weight.detach().float()[:, None]
    change = magnitude / changed.norm(dim=1, keepdim=True) * changed - weight
    identity = torch.eye(min(change.shape), device=change.device)
    factors = (identity, change) if len(identity) == len(change) else (change, identity)
    return LoraUpdate(factors[0][None], factors[1][None], bias)


@torch.no_grad()
def base_weight(module: Any) -> Tensor:
    """(experts or 1, out, in) fp32: the weight that a LoRA module is put on, rows and columns as an update's.

    Quantised weights are unpacked.

    Raises:
        InputError: for a convolution, whose weight is no matrix.
    """
    from peft.utils.integrations import dequantize_module_weight

    is_fused = hasattr(module, "parameter_name")
    stored = module.get_param() if is_fused else dequantize_module_weight(module.get_base_layer())
    if stored.ndim > 2 + is_fused:
        raise InputError(f"adapter: LoRA of a convolution: its update is no matrix. {_MERGE}")
    weight = stored.detach().float()
    weight = weight if weight.ndim == 3 else weight[None]
    return weight.mT if is_transposed(module) else weight


def is_transposed(module: Any) -> bool:
    """Whether the weight that a LoRA module is put on is stored as (in, out)."""
    if hasattr(module, "parameter_name"):
        fused = module.get_param().ndim == 3
        return fused and bool(getattr(module.get_base_layer(), "is_transposed", False))
    return bool(len(module.lora_embedding_A) or module.fan_in_fan_out)


@torch.no_grad()
def put_update(module: Any, adapter: str, update: LoraUpdate) -> None:
    """Put an update of at most the adapter's rank into the factors of a LoRA module, which is no DoRA."""
    if adapter in module.lora_embedding_A:
        a, b = module.lora_embedding_A[adapter], module.lora_embedding_B[adapter]
    else:
        a, b = module.lora_A[adapter].weight, module.lora_B[adapter].weight
    scale = module.scaling[adapter]
    # Singular components end at the weight's side, where the adapter's rank may go on.
    missing = len(a) // len(update.down) - update.down.shape[1]
    down, up = pad(update.down, (0, 0, 0, missing)), pad(update.up, (0, missing)) / (scale or 1.0)
    a.copy_(down.reshape(a.shape))
    b.copy_(up.permute(1, 2, 0).reshape(b.shape))


def updates(model: Any, adapter: str = "default") -> Iterator[tuple[LayerModule, Any, LoraUpdate]]:
    """Layer and path, module and update of every weight in the decoder's layers that an adapter changes.

    Raises:
        InputError: as `update_of`; and if the adapter has replaced base weights that nobody kept.
    """
    from safetynet.models.adapters import RECORD

    config = getattr(model, "peft_config", {}).get(adapter)
    if config is not None and not hasattr(model, RECORD) and (replaces := support.replaces_weights(config)):
        raise InputError(
            f"model: its adapter {replaces}, and what they were is not known here. Load it with "
            "safetynet.models.adapters.attach."
        )
    for (layer, name), module in adapted_modules(model, adapter):
        yield (layer, name), module, update_of(module, adapter)


def adapted_modules(model: Any, adapter: str = "default") -> Iterator[tuple[LayerModule, Any]]:
    """Layer and path, and the LoRA module of every weight in the decoder's layers that an adapter changes."""
    for layer, whole in enumerate(decoder_layers(model)):
        for name, module in adapters(whole).items():
            if adapter in module.lora_A:
                yield (layer, name), module


def adapted_tensors(model: Any, adapter: str = "default") -> Iterator[tuple[str, Any]]:
    """Every tensor that LoRA updates, embeddings and head included: the base's name, and the LoRA module."""
    from peft.tuners.lora import LoraLayer

    for path, module in unwrapped(model).named_modules():
        if isinstance(module, LoraLayer) and (adapter in module.lora_A or adapter in module.lora_embedding_A):
            plain = path.replace(".base_layer", "")
            yield f"{plain}.{getattr(module, 'parameter_name', 'weight')}", module


def factors(model: Any) -> dict[Any, tuple[Tensor, Tensor]]:
    """A (r, in) and B (out, r) of every LoRA module of the active adapter as they are now, copied."""
    name = model.active_adapter
    return {
        module: (module.lora_A[name].weight.detach().clone(), module.lora_B[name].weight.detach().clone())
        for module in _lora_modules(model, name)
        if not hasattr(module, "parameter_name")
    }


@torch.no_grad()
def include_start(model: Any, start: Mapping[Any, tuple[Tensor, Tensor]]) -> None:
    """Rewrite an adapter that began by taking s B0 A0 out of the weights, for the weights as they were.

    W - s B0 A0 + s B A = W + s [B, -B0] [A; A0]: the same model with factors of twice the rank, and with it
    switched off the base itself. The weights are put back by the caller.

    Args:
        model: with one adapter, loaded.
        start: its factors before its weights were loaded, from `factors`.
    """
    name, config = model.active_adapter, model.active_peft_config
    for module, (a0, b0) in start.items():
        a, b = module.lora_A[name], module.lora_B[name]
        for linear, weight in ((a, torch.cat([a.weight, a0])), (b, torch.cat([b.weight, -b0], 1))):
            linear.weight = nn.Parameter(weight, requires_grad=False)
            linear.out_features, linear.in_features = weight.shape
        module.r[name] *= 2
    wider = 2.0**0.5 if config.use_rslora else 2  # keeps alpha / r, or alpha / sqrt(r), as it is
    for module in start:
        module.lora_alpha[name] *= wider
    config.r, config.lora_alpha, config.init_lora_weights = 2 * config.r, wider * config.lora_alpha, True
    config.rank_pattern = {key: 2 * rank for key, rank in (config.rank_pattern or {}).items()}
    config.alpha_pattern = {key: wider * alpha for key, alpha in (config.alpha_pattern or {}).items()}


def silent(model: Any) -> bool:
    """Whether every LoRA update of the active adapter is zero, and it has nothing but such updates."""
    from safetynet.models.adapters import adapter_parameters

    name = model.active_adapter
    config = model.active_peft_config
    if config.peft_type.value != "LORA" or getattr(config, "layer_replication", None):
        return False
    modules = _lora_modules(model, name)
    if not modules or not all(".lora_A." in n or ".lora_B." in n for n, _ in adapter_parameters(model)):
        return False
    if any(module.lora_A[name].weight.ndim > 2 for module in modules):  # convolutions
        return False
    every = (update_of(module, name) for module in modules)
    return all(
        update.norm() <= ZERO * float(update.up.norm() * update.down.norm())
        and (update.bias is None or not update.bias.any())
        for update in every
    )


def _lora_modules(model: Any, adapter: str) -> list[Any]:
    from peft.tuners.lora import LoraLayer

    return [m for m in model.modules() if isinstance(m, LoraLayer) and adapter in m.lora_A]
