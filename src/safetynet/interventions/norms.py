"""Norms of the RMS kind as what they are at one state: a scale per dimension.

With the scale frozen, a norm is linear, and what reads the normed state can be shared out among the parts
that were added up to it.
"""

from typing import Any

import torch
from torch import Tensor

from safetynet.errors import InputError
from safetynet.models.blocks import unwrapped

FINAL = ("norm", "final_layernorm", "ln_f")


def final_norm(model: Any) -> Any:
    """The norm between the last layer and the head.

    Raises:
        InputError: if none is found under the names that transformers gives it.
    """
    decoder = unwrapped(model).get_decoder()
    for name in FINAL:
        if hasattr(decoder, name):
            return getattr(decoder, name)
    raise InputError(f"{type(decoder).__name__}: no final norm was found under {', '.join(FINAL)}.")


def frozen_scale(norm: Any, states: Tensor) -> Tensor:
    """What an RMS norm multiplies each state with, (..., width) fp32: norm(x) = scale * x.

    Raises:
        InputError: for a LayerNorm, which also moves the state.
    """
    if isinstance(norm, torch.nn.LayerNorm):
        raise InputError(
            "model: its norm subtracts a mean, so that its output cannot be shared out among parts. "
            "Use a model with RMS norms."
        )
    states = states.float()
    with torch.no_grad():
        # At a state of ones the norm shows its weight, up to a factor that the projection below finds.
        weight = norm(torch.ones_like(states[..., :1, :])).float()
        plain = weight * states
        size = (norm(states).float() * plain).sum(-1, keepdim=True)
        return weight * size / plain.square().sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
