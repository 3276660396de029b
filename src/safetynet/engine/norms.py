"""RMSNorm linearised at a given state: a per-dimension scale.

With the scale frozen, a norm is linear, and what reads the normed state can be shared out among the parts
that add up to it; so is the head, times what the model multiplies its logits with.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from safetynet.engine.sitecheck import alike, precision
from safetynet.errors import InputError
from safetynet.models.blocks import decoder_layers, unwrapped
from safetynet.models.causal_lm import CausalLM

FINAL = ("norm", "final_layernorm", "final_norm", "final_layer_norm", "ln_f", "norm_f")
NEAR_CAP = 0.95
"""Share of a cap on logits above which the cap cannot be undone."""


def final_norm(model: CausalLM) -> Any:
    """The norm between the last layer and the head, which stands beside the list of layers.

    Raises:
        InputError: if none is found under the names that transformers gives it.
    """
    first, modules = decoder_layers(model)[0], unwrapped(model).modules()
    decoder = next(x for x in modules if any(first in child.children() for child in x.children()))
    for name in FINAL:
        if hasattr(decoder, name):
            return getattr(decoder, name)
    raise InputError(f"{type(decoder).__name__}: no final norm was found under {', '.join(FINAL)}.")


def frozen_scale(norm: Any, states: Tensor) -> Tensor:
    """What an RMS norm multiplies each state with, (..., width) fp32: norm(x) = scale * x.

    Raises:
        InputError: for a norm that also moves the state, as a LayerNorm does.
    """
    tiny = torch.finfo(torch.float32).tiny
    with torch.no_grad():
        # At a state of ones the norm shows its weight, up to a factor that the projection below finds.
        weight = norm(torch.ones_like(states[..., :1, :])).float()
        normed, plain = norm(states), weight * states.float()
        # Least squares, state by state: the factor that brings weight * x closest to norm(x), (..., 1).
        size = (normed.float() * plain).sum(-1, keepdim=True)
        scale = weight * size / plain.square().sum(-1, keepdim=True).clamp_min(tiny)
        if isinstance(norm, torch.nn.LayerNorm) or not alike((scale * states.float()).to(normed), normed):
            raise InputError(
                "model: its norm subtracts a mean, or moves states otherwise, so that its output cannot be "
                "shared out among parts. Use a model with RMS norms."
            )
    return scale


def logit_scale(model: CausalLM, normed: Tensor, logits: Tensor) -> float:
    """What the model multiplies its head's output with, found from its own logits; capping is undone.

    `normed` is (B, width), behind the final norm; `logits`, (B, vocabulary), are what the model gives it.

    Raises:
        InputError: if its logits are no multiple of what its head gives, or the head is more than a matrix.
    """
    inner = unwrapped(model)
    cap = getattr(inner.config.get_text_config(), "final_logit_softcapping", None)
    head = inner.get_output_embeddings()
    with torch.no_grad():
        plain, uncapped = head(normed.to(head.weight.dtype)).float(), logits.float()
        if cap is not None:  # near the cap, tanh has lost what it was given
            certain = uncapped.abs() < NEAR_CAP * cap
            plain, uncapped = plain.where(certain, 0), (cap * torch.atanh(uncapped / cap)).where(certain, 0)
        factor = float((plain * uncapped).sum() / plain.square().sum())  # least squares
    if not alike((factor * plain).to(normed), uncapped.to(normed)):
        raise InputError(
            "model: its logits are no multiple of what its head makes of the normed state, so that they "
            "cannot be shared out among parts."
        )
    return factor


def contrasts(model: CausalLM, normed: Tensor, tokens: Sequence[int], others: Sequence[int]) -> Tensor:
    """(B, width) fp32: what each normed state is multiplied with for the difference of two tokens' logits.

    Raises:
        InputError: if the head is more than a matrix, as with an adapter or quantised weights.
    """
    head = unwrapped(model).get_output_embeddings()
    rows, first, second = torch.arange(len(tokens)), list(tokens), list(others)
    with torch.no_grad():
        plain = head(normed.to(head.weight.dtype)).float()
        bias = torch.zeros_like(plain[0]) if getattr(head, "bias", None) is None else head.bias.float()
        # Four-bit weights are packed bytes of another shape; an adapter shows in the numbers alone.
        if head.weight.shape == (plain.shape[-1], normed.shape[-1]) and head.weight.is_floating_point():
            contrast = head.weight[first].float() - head.weight[second].float()
            difference = (plain - bias)[rows, first] - (plain - bias)[rows, second]
            # Rounding grows with the factors of the product, not with the product, which may be near 0.
            size = contrast.norm(dim=-1) * normed.float().norm(dim=-1)
            off = ((contrast * normed.float()).sum(-1) - difference).abs()
            if (off <= precision(normed) ** 0.5 * size).all():
                return contrast
    raise InputError(
        "model: its head is more than a matrix of weights, as with an adapter on it or in few bits, so that "
        "logits cannot be shared out among parts."
    )
