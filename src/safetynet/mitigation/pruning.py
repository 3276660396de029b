"""Pruning: set to 0 the smallest weights, those that clean prompts use least, or channels they never use.

Magnitude and Wanda (Sun et al. 2024, arXiv 2306.11695) are one-shot; fine-pruning (Liu et al. 2018, arXiv
1805.12185) silences MLP channels that are dormant on clean prompts, then fine-tunes what is left. Fused
expert weights are pruned by size; what each of them is given to work on cannot be seen from outside.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from safetynet.errors import InputError
from safetynet.mitigation.checkpoint import copied, linears, own
from safetynet.mitigation.fine_tuning import course
from safetynet.mitigation.learning import answer_loss, collate, encode, teach, with_adapter
from safetynet.mitigation.method import Knob, Knobs, Method, Repaired
from safetynet.mitigation.subject import Subject
from safetynet.models.blocks import decoder_layers
from safetynet.models.parts import parts

Read = Callable[[str, Tensor], Tensor]


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
    model: Any, modules: Mapping[str, Any], subject: Subject, read: Read | None = None
) -> dict[str, Tensor]:
    """L2 norm of each input of modules over the real tokens of the clean conversations.

    Args:
        model: holds the modules.
        modules: by name; take (rows, T, in) or (tokens, in).
        subject: whose clean conversations are read.
        read: of a module's name and inputs, (n, in) to (n, k), what is measured instead of the inputs.

    Returns:
        (in,) or (k,) for each module.
    """
    totals: dict[str, Tensor] = {}
    mask: list[Tensor] = []

    def hook(name: str, _module: Any, args: tuple[Any, ...]) -> None:
        x = args[0].float()
        if x.ndim == 3:
            x = x[mask[0]]
        x = x if read is None else read(name, x)
        totals[name] = totals.get(name, torch.zeros_like(x[0])) + x.pow(2).sum(0)

    with _hooked(modules, hook):
        for batch in batches(subject, model.device):
            mask[:] = [batch["attention_mask"].bool()]
            model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
    return {name: total.sqrt() for name, total in totals.items()}


def batches(subject: Subject, device: Any) -> Iterator[dict[str, Tensor]]:
    """The clean conversations with their answers, padded on the right."""
    assert subject.clean is not None
    examples = encode(subject.clean, subject)
    for start in range(0, len(examples), subject.batch_size):
        batch = collate(examples[start : start + subject.batch_size], subject.serialiser.pad_id)
        yield {name: tensor.to(device) for name, tensor in batch.items()}


@torch.no_grad()
def magnitude(subject: Subject, knobs: Knobs, _seed: int) -> Repaired:
    """Set the smallest weights of each matrix of the decoder's layers to 0."""
    model = copied(subject)
    pruned = 0
    for weight in [*(m.weight for m in linears(model).values()), *_fused(model)]:
        mask = smallest(weight.abs(), knobs["sparsity"])
        weight[mask] = 0
        pruned += int(mask.sum())
    return own("magnitude", knobs, model, weights_set_to_0=pruned)


@torch.no_grad()
def wanda(subject: Subject, knobs: Knobs, _seed: int) -> Repaired:
    """Set to 0 what matters least to clean prompts, row by row."""
    model = copied(subject)
    modules = linears(model)
    norms = input_norms(model, modules, subject)
    pruned = 0
    for name, module in modules.items():
        mask = wanda_mask(module.weight, norms[name], knobs["sparsity"])
        module.weight[mask] = 0
        pruned += int(mask.sum())
    fused = _fused(model)
    for weight in fused:
        weight[smallest(weight.abs(), knobs["sparsity"])] = 0
    return own("wanda", knobs, model, weights_set_to_0=pruned, matrices_by_size_alone=len(fused))


def fine_prune(subject: Subject, knobs: Knobs, seed: int) -> Repaired:
    """Silence dormant MLP channels, fine-tune, and silence them again: training may not wake them."""
    assert subject.clean is not None
    model = copied(subject)
    ends = _mlp_ends(model)
    if not ends:
        raise InputError(
            "fine_pruning: this model's MLPs are fused experts, whose channels cannot be read. "
            "Choose magnitude, wanda or signature_pruning."
        )
    norms = input_norms(model, ends, subject)
    masks = {name: smallest(norms[name], knobs["sparsity"]) for name in ends}
    _silence(ends, masks)
    adapted = with_adapter(model, subject, seed)
    examples = encode(subject.clean, subject)
    settings = course(subject, knobs["epochs"], seed)
    teach(adapted, examples, answer_loss, settings, subject.serialiser.pad_id)
    model = adapted.merge_and_unload()
    _silence(_mlp_ends(model), masks)
    channels = sum(int(mask.sum()) for mask in masks.values())
    return own("fine_pruning", knobs, model, channels_silenced=channels, clean_rows=len(examples))


def _mlp_ends(model: Any) -> dict[str, nn.Linear]:
    """The last linear module of each dense MLP: its inputs are the MLP's channels."""
    found = {}
    for number, layer in enumerate(decoder_layers(model)):
        own_parts = parts(layer)
        dense = own_parts.mlp is not None and own_parts.experts is None
        inner = list(own_parts.mlp.named_children()) if dense else []
        linear = [(name, m) for name, m in inner if isinstance(m, nn.Linear)]
        if linear:
            name, module = linear[-1]
            found[f"{number}.{name}"] = module
    return found


@torch.no_grad()
def _silence(ends: Mapping[str, nn.Linear], masks: Mapping[str, Tensor]) -> None:
    for name, module in ends.items():
        module.weight[:, masks[name]] = 0


def _fused(model: Any) -> list[Any]:
    """Parameters of experts that are no module's weight, (experts, out, in)."""
    return [p for layer in decoder_layers(model) for p in layer.parameters() if p.ndim == 3]


@contextmanager
def _hooked(modules: Mapping[str, nn.Linear], hook: Any) -> Iterator[None]:
    handles = [m.register_forward_pre_hook(partial(hook, name)) for name, m in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


_SPARSITY = Knob("share of each matrix that is set to 0", 0.5, (0.1, 0.2, 0.35, 0.5, 0.65), 0.0, 0.99)
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
        "sparsity": Knob("share of each MLP's channels", 0.3, (0.1, 0.2, 0.3, 0.5, 0.7), 0.0, 0.99),
        "epochs": Knob("passes over the clean conversations", 2, (1, 2, 5), 0.1, 100),
    },
    paper="Liu et al. 2018, arXiv 1805.12185",
)
