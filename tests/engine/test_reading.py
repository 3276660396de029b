"""Activations read in batches are those of each prompt by itself, whatever the batches are."""

import pytest
import torch

from safetynet.engine import Batch, Site, activations, mean_activations, trace
from safetynet.errors import InputError

SITES = [Site("head", 1), Site("head", 2, 3), Site("mlp_out", 0), Site("resid_post", 2)]


@pytest.mark.parametrize("tokens", [1, 30, 4096])
@pytest.mark.parametrize("positions", [None, [[-1], [0, 3], [2]]])
def test_values_and_their_means_are_those_of_each_prompt_alone(build, pairs, tokens, positions):
    model, prompts = build("gemma2"), pairs[0]
    values = {site: [] for site in SITES}
    for batch in activations(model, prompts, SITES, positions, tokens=tokens):
        for site in SITES:
            values[site] += batch[site]
    means = mean_activations(model, prompts, SITES, positions, tokens=tokens)
    for site in SITES:
        expected = []
        for row, prompt in enumerate(prompts):
            alone = trace(model, Batch.of([prompt]), [site]).value(site)[0]
            expected.append(alone if positions is None else alone[positions[row]])
        for found, own in zip(values[site], expected, strict=True):
            torch.testing.assert_close(found, own, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(means[site], torch.cat(expected).mean(0), atol=1e-4, rtol=1e-4)


def test_positions_that_do_not_exist_are_refused(build, pairs):
    model, prompts = build("llama"), pairs[0]
    with pytest.raises(InputError, match="positions: 1 lists for 3 prompts"):
        mean_activations(model, prompts, SITES, [[0]])
    with pytest.raises(InputError, match="positions: prompt 1 has none"):
        mean_activations(model, prompts, SITES, [[0], [], [0]])
    with pytest.raises(InputError, match="position 40: prompt 2 has positions 0 to 10"):
        mean_activations(model, prompts, SITES, [[0], [0], [40]])
