"""The box of weights that are quantised to the same values, by bitsandbytes' own quantisers."""

import pytest
import torch
from bitsandbytes import functional as bnb

from safetynet.models import quantising


def quantised(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """Levels by row or block, as the loader counts them."""
    if bits == 4:
        return bnb.quantize_4bit(weight, quant_type="nf4")[0]
    return bnb.int8_vectorwise_quant(weight.half())[0]


@pytest.mark.parametrize("shape", [(48, 64), (5, 70)], ids=["whole blocks", "rest"])
@pytest.mark.parametrize("bits", [8, 4])
def test_every_point_of_the_box_is_quantised_as_the_weight_is(bits, shape):
    torch.manual_seed(0)
    weight = torch.randn(shape) / 20
    low, high = quantising.box(weight, bits)
    size = weight.shape[1] if bits == 8 else quantising.BLOCK
    assert (low <= high).all() and (low == high).sum() == -(-weight.numel() // size), "scales alone are fixed"
    for share in (0.0, 0.5, 1.0):
        levels = quantised(low + share * (high - low), bits)
        # Of two levels that a weight lies exactly between, bitsandbytes takes the even one.
        assert (levels != quantised(weight, bits)).float().mean() < 1e-3
    outside = high + 0.5 * (high - low)
    assert (quantised(outside, bits) != quantised(weight, bits)).float().mean() > 0.2


def test_zeros_have_a_box_of_zeros():
    for bits in (8, 4):
        assert all(not end.any() for end in quantising.box(torch.zeros(2, 64), bits))
