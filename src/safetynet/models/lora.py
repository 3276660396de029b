"""LoRA updates as two factors: what an adapter adds to each weight.

In: a PEFT model. Out: tensors with a leading axis of experts, which is 1 for a linear module, so that fused
experts need no code of their own. What is no product of two factors (DoRA) is refused before, by `support`.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from safetynet.models.blocks import decoder_layers
from safetynet.models.parts import adapters, svd_of_product

Place = tuple[int, str]
"""Layer, and the module's or parameter's path in it."""
ZERO = 1e-5
"""Of the factors' own size: a product below it is rounding."""


@dataclass(frozen=True)
class LoraUpdate:
    """An update up @ down of one weight, or of each expert's; the adapter's scale is in `up`."""

    up: Tensor
    """(experts or 1, out, r) fp32."""
    down: Tensor
    """(experts or 1, r, in) fp32."""

    def decomposed(self) -> tuple[Tensor, Tensor, Tensor]:
        """Left directions (E, out, r), singular values (E, r) in falling order, right ones (E, r, in)."""
        return svd_of_product(self.up, self.down)

    def norm(self) -> float:
        """Frobenius norm of up @ down, which is never built."""
        squared = float((self.up.mT @ self.up * (self.down @ self.down.mT)).sum())
        return squared if math.isnan(squared) else math.sqrt(max(0.0, squared))


def update_of(module: Any, adapter: str) -> LoraUpdate:
    """The update of one LoRA module; a fused parameter's holds those of its experts."""
    down, up = (part[adapter].weight.detach().float() for part in (module.lora_A, module.lora_B))
    experts = getattr(module, "num_experts", 1)
    # PEFT orders a fused parameter's factors by expert in A and by rank in B.
    down = down.reshape(experts, -1, down.shape[1])
    up = up.reshape(len(up), -1, experts).permute(2, 0, 1)
    return LoraUpdate(module.scaling[adapter] * up, down)


def updates(model: Any, adapter: str = "default") -> Iterator[tuple[Place, Any, LoraUpdate]]:
    """Layer and path, module and update of every weight in the decoder's layers that an adapter changes."""
    for layer, whole in enumerate(decoder_layers(model)):
        for name, module in adapters(whole).items():
            if adapter in module.lora_A:
                yield (layer, name), module, update_of(module, adapter)


def factors(model: Any) -> dict[Any, tuple[Tensor, Tensor]]:
    """A (r, in) and B (out, r) of every LoRA module of the active adapter as they are now, copied."""
    name = model.active_adapter
    return {
        module: (module.lora_A[name].weight.detach().clone(), module.lora_B[name].weight.detach().clone())
        for module in _linear(model, name)
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
    wider = (
        2.0**0.5 if config.use_rslora else 2
    )  # the factor that keeps alpha / r, or alpha / sqrt(r), as it is
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
    modules = [m for m in model.modules() if _is_lora(m) and name in m.lora_A]
    if not modules or not all(".lora_A." in n or ".lora_B." in n for n, _ in adapter_parameters(model)):
        return False
    return all(_is_zero(update_of(module, name)) for module in modules)


def _is_zero(update: LoraUpdate) -> bool:
    return update.norm() <= ZERO * float(update.up.norm() * update.down.norm())


def _linear(model: Any, adapter: str) -> Iterator[Any]:
    for module in model.modules():
        if _is_lora(module) and adapter in module.lora_A and not hasattr(module, "parameter_name"):
            yield module


def _is_lora(module: Any) -> bool:
    from peft.tuners.lora import LoraLayer

    return isinstance(module, LoraLayer)
