"""How far an adapter moves each weight, in how many directions, and whether two adapters move the same way.

In: LoRA adapters, in a model or as saved folders: epochs of one training, or a backdoored model and its clean
twin. Out: the table `drift`. Updates are compared through QR of their factors and are never built. Weights
have no prompts to draw again, hence no intervals; the control is the overlap of random directions.
"""

from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from safetynet.engine.hooks import exclusive
from safetynet.errors import InputError
from safetynet.models import adapter_files, lora, support
from safetynet.models.adapters import detach, exchanged, has_adapter, put_on
from safetynet.models.blocks import decoder_layers
from safetynet.models.causal_lm import CausalLM
from safetynet.models.lora import LayerModule, LoraUpdate
from safetynet.models.parts import adapters

DIRECTIONS = 4
"""Singular directions whose overlap is measured."""


def updates(
    model: Any, adapter: str = "default", folder: Path | None = None
) -> dict[LayerModule, LoraUpdate]:
    """The updates of one LoRA adapter, by layer and module.

    Args:
        model: a PEFT model; with `folder`, a base model will do.
        adapter: its name in the model.
        folder: of a saved adapter, such as an earlier epoch's: of the model's own configuration if it has an
            adapter. The model is as it was afterwards.

    Raises:
        InputError: if there is no such update, it is of a kind that two factors do not describe, or for what
            `adapters.exchanged` and `adapters.put_on` refuse.
    """
    if folder is not None:
        with exclusive(model):
            if has_adapter(model):
                with exchanged(model, folder) as other:
                    return updates(other, model.active_adapter)
            trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
            wrapped = put_on(model, adapter_files.read(folder))
            try:
                return updates(wrapped, wrapped.active_adapter)
            finally:
                detach(wrapped)
                for parameter in trained:  # PEFT freezes what it wraps
                    parameter.requires_grad_()
    if has_adapter(model) and adapter in model.peft_config:
        support.check(model.peft_config[adapter], "drift")
    moved = {
        module: LoraUpdate(update.up.cpu(), update.down.cpu())
        for module, _, update in lora.updates(model, adapter)
    }
    if not moved:
        raise InputError(f"drift: the model has no LoRA update of an adapter {adapter!r} in its layers.")
    return moved


def drift(
    model: CausalLM,
    current: dict[LayerModule, LoraUpdate],
    earlier: dict[LayerModule, LoraUpdate] | None = None,
    step: int = -1,
    directions: int = DIRECTIONS,
) -> pd.DataFrame:
    """Size and shape of an adapter's updates, and their overlap with another adapter's.

    Args:
        model: holds the weights that are updated; with or without an adapter around them. Quantised ones
            are unpacked one at a time.
        current: of `updates`.
        earlier: of the earlier epoch, or of the clean twin; places that are not in both get no overlap.
        step: training step of `current`; -1 for none.
        directions: how many leading singular directions are compared.

    Returns:
        Table `drift`: layer, module, energy (Frobenius norm of the update over the weight's), top_share
        (share of the squared norm in the first singular direction), effective_rank (exponential of the
        singular values' entropy, Roy and Vetterli 2007), overlap and overlap_input (mean squared cosine
        between the leading directions that are written and that are read, 0 to 1: the measure of Hu et al.,
        arXiv 2106.09685, section 7.2), random and random_input (what it would be by chance), step. Over
        experts, top_share, effective_rank and overlaps are means weighted by squared norm. NaN where an
        update is zero or there is nothing to compare with.

    Raises:
        InputError: if the model has not the weights that an adapter updates.
    """
    if directions < 1:
        raise InputError(f"drift: directions is {directions}; compare at least 1.")
    records = []
    for (layer, name), update in sorted(current.items()):
        left, values, right = update.decomposed()  # (experts or 1, ...): U, singular values, V^T
        squared = values.square()
        total = squared.sum(-1)  # = |up @ down|_F^2, for each expert
        size = _weight_norm(model, layer, name)
        record = {"layer": layer, "module": name, "energy": float(total.sum().sqrt()) / size}
        record["top_share"] = _weighted(squared[:, 0] / total, total)
        share = values / values.sum(-1, keepdim=True)
        record["effective_rank"] = _weighted(torch.exp(-torch.xlogy(share, share).sum(-1)), total)
        before = None if earlier is None else earlier.get((layer, name))
        record |= _overlaps(left, values, right, before, directions)
        records.append(record | {"step": step})
    return pd.DataFrame(records)


def _overlaps(
    left: Tensor, values: Tensor, right: Tensor, before: LoraUpdate | None, directions: int
) -> dict[str, float]:
    names = ("overlap", "random", "overlap_input", "random_input")
    if before is None:
        return dict.fromkeys(names, float("nan"))
    if len(before.up) != len(left) or (before.up.shape[1], before.down.shape[2]) != (
        left.shape[1],
        right.shape[2],
    ):
        raise InputError("drift: the two adapters update weights of different sizes. Compare like with like.")
    other_left, other_values, other_right = before.decomposed()
    k = min(directions, values.shape[1], other_values.shape[1])
    weights = values.square().sum(-1) * other_values.square().sum(-1)  # 0 where one of them is no update
    # Mean squared cosine of the k leading directions: |U_k^T V_k|_F^2 / k, for each expert.
    written = (left[..., :k].mT @ other_left[..., :k]).square().sum((1, 2)).div(k).clamp(max=1)
    read = (right[:, :k] @ other_right[:, :k].mT).square().sum((1, 2)).div(k).clamp(max=1)
    by_chance = (k / left.shape[1], k / right.shape[2])
    overlaps = (_weighted(written, weights), by_chance[0], _weighted(read, weights), by_chance[1])
    return dict(zip(names, overlaps, strict=True))


def _weighted(values: Tensor, weights: Tensor) -> float:
    """Mean of values whose weight is not 0; NaN if none is."""
    inside = weights > 0
    if not inside.any():
        return float("nan")
    return float((values[inside] * weights[inside]).sum() / weights[inside].sum())


def _weight_norm(model: CausalLM, layer: int, name: str) -> float:
    """Frobenius norm of the weight, or of the experts' weights, that an update changes."""
    from peft.utils.integrations import dequantize_module_weight

    whole = decoder_layers(model)[layer]
    lora_module = adapters(whole).get(name)
    try:
        if lora_module is None:
            owner, _, last = name.rpartition(".")
            updated = getattr(whole.get_submodule(owner), last)
        elif hasattr(lora_module, "parameter_name"):
            updated = lora_module.get_param()
        else:
            updated = lora_module.get_base_layer()
    except AttributeError:
        raise InputError(
            f"drift: layer {layer} of the model has no {name}, which the adapter updates."
        ) from None
    weight = dequantize_module_weight(updated) if hasattr(updated, "weight") else updated
    return float(weight.detach().float().norm())
