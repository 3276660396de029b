"""Quantisation as a control: weights rounded to 8 or 4 bits by bitsandbytes, and kept as ordinary numbers.

The weights are those that a quantised model computes with (LLM.int8 without outliers; NF4 in blocks of 64).
They are written back in the model's own number type, so that the repair loads like any checkpoint.
"""

from typing import Any

import torch
from torch import Tensor

from safetynet.mitigation.checkpoint import copied, linears, own
from safetynet.mitigation.method import Knob, Knobs, Method, Repaired
from safetynet.mitigation.subject import Subject
from safetynet.models.blocks import decoder_layers


def rounded(weight: Tensor, bits: int) -> Tensor:
    """A matrix after rounding to 8 bits per row, or to NF4 in blocks of 64."""
    from bitsandbytes import functional

    if bits == 4:
        packed, state = functional.quantize_4bit(weight.contiguous(), quant_type="nf4")
        return functional.dequantize_4bit(packed, state).to(weight)
    scale = weight.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(weight.dtype).tiny) / 127
    return (weight / scale).round() * scale


@torch.no_grad()
def quantise(subject: Subject, knobs: Knobs, _seed: int) -> Repaired:
    """Round every matrix of the decoder's layers."""
    model: Any = copied(subject)
    experts = [p for layer in decoder_layers(model) for p in layer.parameters() if p.ndim == 3]
    matrices = [m.weight for m in linears(model).values()] + [one for p in experts for one in p]
    for weight in matrices:
        weight.copy_(rounded(weight, int(knobs["bits"])))
    return own("quantisation", knobs, model, matrices=len(matrices))


QUANTISATION = Method(
    "quantisation",
    "round the weights to 8 or 4 bits",
    quantise,
    frozenset(),
    {"bits": Knob("of a weight", 4, (8, 4), 4, 8, listed=True)},
    control=True,
    paper="Dettmers et al. 2022, arXiv 2208.07339; Dettmers et al. 2023, arXiv 2305.14314",
)
