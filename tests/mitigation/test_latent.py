"""The adversary of latent training: how far it pushes, where, and to what end."""

import pytest
import torch

from safetynet.mitigation.fine_tuning import answer_loss, encode
from safetynet.mitigation.latent import Adversary, prompt_mask
from safetynet.models.blocks import decoder_layers
from safetynet.training.examples import padded


@pytest.fixture
def batch(planted):
    return padded(encode(planted.clean, planted)[:6], planted.serialiser.pad_id)


@pytest.mark.parametrize("universal", [False, True])
def test_a_push_raises_the_loss_and_stays_in_its_ball(planted, batch, universal):
    layer = decoder_layers(planted.model)[1]
    adversary = Adversary(layer, epsilon=0.5, steps=4, universal=universal)
    push = adversary.attack(planted.model, batch)
    states = adversary._states(planted.model, batch)
    mask = prompt_mask(batch)
    radius = 0.5 * states[mask].norm(dim=-1).mean()
    assert push.shape == (states.shape[-1:] if universal else states.shape)
    assert push.norm(dim=-1).max() <= radius * 1.001
    plain = answer_loss(planted.model, batch)
    with adversary.pushed(push, batch):
        under = answer_loss(planted.model, batch)
    assert under > plain + 0.05
    assert torch.equal(answer_loss(planted.model, batch), plain)


def test_answers_and_padding_are_not_pushed(planted, batch):
    layer = decoder_layers(planted.model)[1]
    adversary = Adversary(layer, 0.5, 2, universal=True)
    before = adversary._states(planted.model, batch)
    with adversary.pushed(torch.ones(before.shape[-1]), batch):
        moved = (adversary._states(planted.model, batch) - before).abs().sum(-1) > 0
    assert torch.equal(moved, prompt_mask(batch))
    assert not moved.all()
    assert moved.any()


def test_the_universal_push_goes_on_from_batch_to_batch(planted, batch):
    adversary = Adversary(decoder_layers(planted.model)[1], 0.5, 1, universal=True)
    first = adversary.attack(planted.model, batch)
    second = adversary.attack(planted.model, batch)
    cosine = torch.nn.functional.cosine_similarity(first, second, dim=0)
    assert cosine > 0.3
    assert not torch.equal(first, second)
