"""Smaller weights: set to 0 by size or use, channels silenced, or rounded to 8 and 4 bits.

Magnitude and Wanda (Sun et al. 2024, arXiv 2306.11695) are one-shot; fine-pruning (Liu et al. 2018, arXiv
1805.12185) silences MLP channels that are dormant on clean prompts, then fine-tunes what is left. Fused
expert weights are pruned by size: their inputs cannot be read from outside.
Quantisation is a control: bitsandbytes rounds weights to what a quantised model computes with (LLM.int8
without outliers; NF4 in blocks of 64), and they are kept as ordinary numbers, so that the repair loads like
any checkpoint.
"""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from safetynet.errors import InputError
from safetynet.mitigation.defender import Defender
from safetynet.mitigation.fine_tuning import encode, trainer, with_fresh_adapter
from safetynet.mitigation.method import Hyperparameter, Method
from safetynet.mitigation.repaired import (
    Repaired,
    Settings,
    as_checkpoint,
    fused_experts,
    linear_modules,
    merged_copy,
)
from safetynet.models.blocks import decoder_layers
from safetynet.models.parts import parts
from safetynet.models.quantising import rounded
from safetynet.training.examples import padded


def smallest(score: Tensor, share: float) -> Tensor:
    """Mask of the `share` of all entries that score least; of equals the first ones."""
    flat = score.flatten()
    mask = torch.zeros(flat.shape, dtype=torch.bool, device=score.device)
    mask[flat.argsort(stable=True)[: int(share * flat.numel())]] = True
    return mask.view(score.shape)


def wanda_mask(weight: Tensor, norms: Tensor, share: float) -> Tensor:
    """What Wanda removes: in each row the entries of least size times input norm.

    Args:
        weight: (out, in).
        norms: (in,), l2 norm of each input over all tokens.
        share: of each row that is removed.

    Returns:
        (out, in) of bool, True where a weight is to be 0.
    """
    score = weight.abs().float() * norms.to(weight.device)
    order = score.argsort(dim=1, stable=True)[:, : int(share * weight.shape[1])]
    return torch.zeros_like(score, dtype=torch.bool).scatter_(1, order, True)


@torch.no_grad()
def input_norms(
    model: Any,
    modules: Mapping[str, Any],
    defender: Defender,
    read: Callable[[str, Tensor], Tensor] | None = None,
) -> dict[str, Tensor]:
    """L2 norm of each input of modules over the real tokens of the clean conversations.

    Args:
        model: holds the modules.
        modules: by name; take (rows, T, in) or (tokens, in).
        defender: whose clean conversations are read.
        read: of a module's name and inputs, (n, in) to (n, k), what is measured instead of the inputs.

    Returns:
        (in,) or (k,) for each module.
    """
    assert defender.clean is not None
    examples = encode(defender.clean, defender)
    totals: dict[str, Tensor] = {}
    mask: list[Tensor] = []

    def hook(name: str, _module: Any, args: tuple[Any, ...]) -> None:
        x = args[0].float()
        if x.ndim == 3:  # without padding; experts get single tokens, which are real ones
            x = x[mask[0]]
        x = x if read is None else read(name, x)
        totals[name] = totals.get(name, torch.zeros_like(x[0])) + x.pow(2).sum(0)

    with ExitStack() as stack:
        for name, module in modules.items():
            stack.callback(module.register_forward_pre_hook(partial(hook, name)).remove)
        for start in range(0, len(examples), defender.batch_size):
            batch = padded(examples[start : start + defender.batch_size], defender.serialiser.pad_id)
            ids, attended = (batch[name].to(model.device) for name in ("input_ids", "attention_mask"))
            mask[:] = [attended.bool()]
            model(input_ids=ids, attention_mask=attended, use_cache=False)
    return {name: total.sqrt() for name, total in totals.items()}


@torch.no_grad()
def magnitude(defender: Defender, settings: Settings, _seed: int) -> Repaired:
    """Set the smallest weights of each matrix of the decoder's layers to 0."""
    model = merged_copy(defender)
    pruned = 0
    for weight in [*(m.weight for m in linear_modules(model).values()), *fused_experts(model)]:
        mask = smallest(weight.abs(), settings["sparsity"])
        weight[mask] = 0
        pruned += int(mask.sum())
    return as_checkpoint("magnitude", settings, model, weights_set_to_0=pruned)


@torch.no_grad()
def wanda(defender: Defender, settings: Settings, _seed: int) -> Repaired:
    """Set to 0 what matters least to clean prompts, row by row."""
    model = merged_copy(defender)
    modules = linear_modules(model)
    norms = input_norms(model, modules, defender)
    pruned = 0
    for name, module in modules.items():
        mask = wanda_mask(module.weight, norms[name], settings["sparsity"])
        module.weight[mask] = 0
        pruned += int(mask.sum())
    fused = fused_experts(model)
    for weight in fused:
        weight[smallest(weight.abs(), settings["sparsity"])] = 0
    return as_checkpoint("wanda", settings, model, weights_set_to_0=pruned, matrices_by_size_alone=len(fused))


def fine_prune(defender: Defender, settings: Settings, seed: int) -> Repaired:
    """Silence dormant MLP channels, fine-tune, and silence them again: training may not wake them."""
    assert defender.clean is not None
    model = merged_copy(defender)
    ends = _mlp_ends(model)
    if not ends:
        raise InputError(
            "fine_pruning: this model's MLPs are fused experts, whose channels cannot be read. "
            "Choose magnitude, wanda or signature_pruning."
        )
    norms = input_norms(model, ends, defender)
    masks = {name: smallest(norms[name], settings["sparsity"]) for name in ends}  # (channels,) each
    _silence(ends, masks)
    adapted = with_fresh_adapter(model, defender, seed)
    examples = encode(defender.clean, defender)
    trainer(defender, examples, settings["epochs"], seed)(adapted)
    model = adapted.merge_and_unload()
    _silence(_mlp_ends(model), masks)
    channels = sum(int(mask.sum()) for mask in masks.values())
    return as_checkpoint(
        "fine_pruning", settings, model, channels_silenced=channels, clean_rows=len(examples)
    )


def _mlp_ends(model: Any) -> dict[str, nn.Linear]:
    """The last linear module of each dense MLP: its inputs are the MLP's channels."""
    ends = {}
    for number, layer in enumerate(decoder_layers(model)):
        modules = parts(layer)
        is_dense = modules.mlp is not None and modules.experts is None
        linear = [
            (name, module)
            for name, module in (modules.mlp.named_children() if is_dense else ())
            if isinstance(module, nn.Linear)
        ]
        if linear:
            name, module = linear[-1]
            ends[f"{number}.{name}"] = module
    return ends


@torch.no_grad()
def _silence(ends: Mapping[str, nn.Linear], masks: Mapping[str, Tensor]) -> None:
    for name, module in ends.items():
        module.weight[:, masks[name]] = 0


@torch.no_grad()
def quantise(defender: Defender, settings: Settings, _seed: int) -> Repaired:
    """Round every matrix of the decoder's layers."""
    model = merged_copy(defender)
    matrices = [module.weight for module in linear_modules(model).values()]
    matrices += [expert for weight in fused_experts(model) for expert in weight]
    for weight in matrices:
        weight.copy_(rounded(weight, int(settings["bits"])))
    return as_checkpoint("quantisation", settings, model, matrices=len(matrices))


_SPARSITY = Hyperparameter(
    "share of each matrix that is set to 0", 0.5, (0.1, 0.2, 0.35, 0.5, 0.65), 0.0, 0.99
)
MAGNITUDE = Method(
    "magnitude", "set the smallest weights to 0", magnitude, frozenset(), {"sparsity": _SPARSITY}
)
WANDA = Method(
    "wanda",
    "set the weights to 0 that matter least to clean prompts",
    wanda,
    frozenset({"clean"}),
    {"sparsity": _SPARSITY},
    paper="Sun et al. 2024, arXiv 2306.11695",
)
FINE_PRUNING = Method(
    "fine_pruning",
    "silence MLP channels that clean prompts hardly use, then fine-tune on them",
    fine_prune,
    frozenset({"clean"}),
    {
        "sparsity": Hyperparameter("share of each MLP's channels", 0.3, (0.1, 0.2, 0.3, 0.5, 0.7), 0.0, 0.99),
        "epochs": Hyperparameter("passes over the clean conversations", 2, (1, 2, 5), 0.1, 100),
    },
    paper="Liu et al. 2018, arXiv 1805.12185",
)
QUANTISATION = Method(
    "quantisation",
    "round the weights to 8 or 4 bits",
    quantise,
    frozenset(),
    {"bits": Hyperparameter("of a weight", 4, (8, 4), 4, 8, listed=True)},
    control=True,
    paper="Dettmers et al. 2022, arXiv 2208.07339; Dettmers et al. 2023, arXiv 2305.14314",
)
