"""How far an adapter moves each weight, in how many directions, and whether two adapters move the same way.

In: LoRA adapters, in a model or as saved folders: epochs of one training, or a backdoored model and its clean
twin. Out: the table `drift`. Updates are compared through QR of their factors and are never built. Weights
are looked at, not runs: there are no prompts to draw again, hence no intervals; the control is the overlap
that random directions would have.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from safetynet.errors import InputError
from safetynet.interventions.hooks import exclusive
from safetynet.models.blocks import decoder_layers
from safetynet.models.parts import adapters, svd_of_product

Place = tuple[int, str]
"""Layer, and the module's or parameter's path in it."""
DIRECTIONS = 4
"""Singular directions whose overlap is measured."""
FROM_FOLDER = "drift"
"""Name of an adapter while it is read from its folder."""


@dataclass(frozen=True)
class Update:
    """A LoRA update up @ down of one weight, or of each expert's."""

    up: Tensor
    """(experts or 1, out, r) fp32, scaled."""
    down: Tensor
    """(experts or 1, r, in) fp32."""

    def decomposed(self) -> tuple[Tensor, Tensor, Tensor]:
        """Left directions (E, out, r), singular values (E, r) and right directions (E, r, in)."""
        return svd_of_product(self.up, self.down)


def updates(model: Any, adapter: str = "default", folder: Path | None = None) -> dict[Place, Update]:
    """The updates of one LoRA adapter, by layer and module.

    Args:
        model: a PEFT model; with `folder`, a base model will do.
        adapter: its name in the model.
        folder: of a saved adapter, such as an earlier epoch's; it is loaded into the model, read and taken
            out again.

    Raises:
        InputError: if there is no such update, or it is of a kind that two factors do not describe (DoRA).
    """
    if folder is not None:
        with exclusive(model), _loaded(model, folder) as loaded:
            return updates(loaded, FROM_FOLDER)
    found = {}
    for layer, module in enumerate(decoder_layers(model)):
        for name, lora in adapters(module).items():
            if adapter in lora.lora_A:
                if lora.use_dora.get(adapter):
                    raise InputError(f"drift: {name} of layer {layer} is a DoRA update, not two factors.")
                found[layer, name] = _update(lora, adapter)
    if not found:
        raise InputError(f"drift: the model has no LoRA update of an adapter {adapter!r} in its layers.")
    return found


def drift(
    model: Any,
    current: dict[Place, Update],
    earlier: dict[Place, Update] | None = None,
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
        left, values, right = update.decomposed()
        squared = values.square()
        total = squared.sum(-1)
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
    left: Tensor, values: Tensor, right: Tensor, before: Update | None, directions: int
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
    both = values.square().sum(-1) * other_values.square().sum(-1)  # 0 where one of them is no update
    written = (left[..., :k].mT @ other_left[..., :k]).square().sum((1, 2)).div(k).clamp(max=1)
    read = (right[:, :k] @ other_right[:, :k].mT).square().sum((1, 2)).div(k).clamp(max=1)
    found = (_weighted(written, both), k / left.shape[1], _weighted(read, both), k / right.shape[2])
    return dict(zip(names, found, strict=True))


def _weighted(values: Tensor, weights: Tensor) -> float:
    """Mean of values whose weight is not 0; NaN if none is."""
    kept = weights > 0
    return float((values[kept] * weights[kept]).sum() / weights[kept].sum()) if kept.any() else float("nan")


def _update(lora: Any, adapter: str) -> Update:
    """The factors of one module; a fused parameter's hold those of its experts."""
    down, up = (one[adapter].weight.detach().float() for one in (lora.lora_A, lora.lora_B))
    experts = getattr(lora, "num_experts", 1)
    # PEFT orders a fused parameter's factors by expert in A and by rank in B.
    down = down.reshape(experts, -1, down.shape[1])
    up = up.reshape(len(up), -1, experts).permute(2, 0, 1)
    return Update((lora.scaling[adapter] * up).cpu(), down.cpu().clone())


@contextmanager
def _loaded(model: Any, folder: Path) -> Iterator[Any]:
    """The model with a saved adapter in it under the name FROM_FOLDER, not in use where others are."""
    from peft import PeftModel

    if not (folder / "adapter_config.json").is_file():
        raise InputError(f"{folder}: no adapter_config.json is there, so this is no saved adapter.")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        if isinstance(model, PeftModel):
            model.load_adapter(str(folder), FROM_FOLDER)
            try:
                yield model
            finally:
                model.delete_adapter(FROM_FOLDER)
        else:
            wrapped = PeftModel.from_pretrained(model, str(folder), adapter_name=FROM_FOLDER)
            try:
                yield wrapped
            finally:
                wrapped.unload()
    finally:
        for parameter in trained:  # PEFT freezes what it wraps
            parameter.requires_grad_()


def _weight_norm(model: Any, layer: int, name: str) -> float:
    """Frobenius norm of the weight, or of the experts' weights, that an update changes."""
    from peft.utils.integrations import dequantize_module_weight

    whole = decoder_layers(model)[layer]
    lora = adapters(whole).get(name)
    try:
        if lora is None:
            owner, _, last = name.rpartition(".")
            found = getattr(whole.get_submodule(owner), last)
        else:
            found = lora.get_param() if hasattr(lora, "parameter_name") else lora.get_base_layer()
    except AttributeError:
        raise InputError(
            f"drift: layer {layer} of the model has no {name}, which the adapter updates."
        ) from None
    weight = dequantize_module_weight(found) if hasattr(found, "weight") else found
    return float(weight.detach().float().norm())
