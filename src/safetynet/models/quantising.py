"""Weights as bitsandbytes quantises them, and the box of weights that are quantised to the same values.

LLM.int8 has 255 evenly spaced levels for each row (Dettmers et al. 2022, arXiv 2208.07339), NF4 has 16 for
each block of 64 weights (Dettmers et al. 2023, arXiv 2305.14314). Both scale by the largest size in the row
or block. A weight that stays on its side of the middle between two levels keeps its level.
"""

import torch
from torch import Tensor
from torch.nn import functional

from safetynet.errors import InputError
from safetynet.extras import need

BITS = {"8bit": 8, "4bit": 4}
"""Bits of a weight under each quantisation that `model.quantisation` names."""
BLOCK = 64
"""Weights that share a scale in NF4."""
MARGIN = 0.15
"""Share of a level's interval that stays free at either end: rounding to 16 bits moves a weight by at most an
eighth of the interval of an 8-bit level."""


def rounded(weight: Tensor, bits: int) -> Tensor:
    """A matrix after rounding to 8 bits per row, or to NF4 in blocks of 64."""
    if bits == 4:
        need("rounding to 4 bits", "bitsandbytes")
        from bitsandbytes import functional as bnb

        packed, state = bnb.quantize_4bit(weight.contiguous(), quant_type="nf4")
        return bnb.dequantize_4bit(packed, state).to(weight)
    # The largest of a row is level 127; a row of zeros has no scale of its own.
    scale = weight.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(weight.dtype).tiny) / 127
    return (weight / scale).round() * scale


def box(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """The least and the largest values of each weight under which the matrix is quantised to the same values.

    The largest weight of a row or block sets its scale and stays as it is (Egashira et al. 2024, arXiv
    2405.18137).

    Args:
        weight: (out, in).
        bits: 8 or 4.

    Returns:
        Two matrices of the weight's shape and type.
    """
    size = weight.shape[-1] if bits == 8 else BLOCK
    # bitsandbytes rounds to 16 bits before it counts 8-bit levels.
    flat = weight.detach().half().flatten() if bits == 8 else weight.detach().flatten()
    blocks = functional.pad(flat.float(), (0, -flat.numel() % size)).view(-1, size)  # (scales, size)
    largest = blocks.abs().amax(1, keepdim=True)
    # From -1 to 1, in rising order: (255,) or (16,).
    if bits == 8:
        levels = torch.arange(-127, 128) / 127
    else:
        from bitsandbytes import functional as bnb

        levels = bnb.get_4bit_type("nf4", device="cpu")
    levels = levels.to(weight.device)
    # A weight goes to the nearest level, so that it keeps its own between the middles around it.
    middles = (levels[1:] + levels[:-1]) / 2
    at = torch.bucketize(blocks / largest.clamp_min(torch.finfo(torch.float32).tiny), middles)
    low, high = torch.cat([levels[:1], middles])[at], torch.cat([middles, levels[-1:]])[at]
    free = MARGIN * (high - low)
    ends = [(end * largest).flatten()[: flat.numel()].view_as(weight) for end in (low + free, high - free)]
    fixed = (blocks.abs() == largest).flatten()[: flat.numel()].view_as(weight)
    first, last = (torch.where(fixed, weight.detach(), end.to(weight)) for end in ends)
    return first, last


def check(bits: int, field: str, advice: str) -> None:
    """Refuse a quantisation that this machine cannot compute.

    Args:
        bits: 8 or 4.
        field: of the recipe, which the message names.
        advice: what else to do, as the end of a sentence.

    Raises:
        InputError: naming the field and the bits.
    """
    try:
        rounded(torch.ones(BLOCK, BLOCK), bits)
    except (ImportError, InputError, RuntimeError) as error:
        raise InputError(
            f"{field}: this machine cannot round weights to {bits} bits ({str(error).rstrip('.')}). Install "
            f"bitsandbytes as constraints.txt has it, or {advice}."
        ) from error
