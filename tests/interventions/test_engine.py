"""The engine gives the numbers of plain hooks on single unpadded prompts: every site, intervention and family."""

import pytest
import torch
from tests.interventions.conftest import CONFIGS
from tests.interventions.plain import Plain

from safetynet.interventions import edits
from safetynet.interventions.edits import Edit
from safetynet.interventions.metrics import logit_difference
from safetynet.interventions.sites import Anatomy
from safetynet.interventions.trace import trace
from safetynet.interventions.wave import Run, measure

PLACES = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "head", "query", "key", "value")
DIFFERENCE = logit_difference([5, 6, 7], [15, 16, 17])


def difference(found: torch.Tensor, row: int) -> float:
    return float(found[-1, 5 + row] - found[-1, 15 + row])


def sites_of(model, component):
    """Two of each component's sites: an early one and the last."""
    found = Anatomy.of(model).sites(component)
    return [found[1 % len(found)], found[-1]]


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("component", PLACES)
def test_patching_gives_the_numbers_of_plain_hooks(build, pairs, batches, family, component):
    model = build(family)
    anatomy = Anatomy.of(model)
    if component not in anatomy.components():
        pytest.skip(f"{family} computes query, key and value in one module")
    sites = sites_of(model, component)
    source = trace(model, batches[1], sites)
    receiving = trace(model, batches[0], resume=True)
    runs, expected = [], []
    for site in sites:
        for row, ids in enumerate(pairs[0]):
            for positions in ((3,), (2, 5), tuple(range(len(ids))), (len(ids) - 1,)):
                columns = batches[0].columns(row, positions)
                values = source.value(site)[row, columns]
                runs.append(Run(row, (Edit(site, edits.replace(values), positions),)))
                plain = Plain(
                    model, component, site.layer, anatomy.span(site), list(positions), lambda _, v=values: v
                )
                expected.append(difference(plain.logits(ids), row))
    found = measure(receiving, runs, DIFFERENCE)
    assert found.numpy() == pytest.approx(expected, abs=1e-4)
    assert len({round(value, 3) for value in expected}) > 3  # the edits did something
