"""The numbers of plain hooks on single unpadded prompts: every site, intervention and family."""

import pytest
import torch
from tests.engine.compare import Case, compare
from tests.engine.conftest import CONFIGS
from tests.engine.plain import EVERYWHERE, At

from safetynet.engine import edits
from safetynet.engine.batch import Batch
from safetynet.engine.edits import Edit
from safetynet.engine.sites import Architecture, Site
from safetynet.engine.trace import trace

PLACES = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "head", "query", "key", "value")


def sites_of(model, component):
    """Two of each component's sites: an early one and the last."""
    found = Architecture.of(model).sites(component)
    return [found[1 % len(found)], found[-1]]


def place(model, site):
    """Component, layer and span of a site, as plain hooks want them."""
    config, width = model.config, EVERYWHERE
    if site.index is not None:
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        width = slice(site.index * size, (site.index + 1) * size)
    return site.component, site.layer, width


def both(model, site, positions, change):
    """One edit, as the engine takes it and as plain hooks do it."""
    component, layer, span = place(model, site)
    where = EVERYWHERE if positions is None else list(positions)
    return Edit(site, change, positions), At(component, layer, where, change, span)


def cases_of(model, prompts, site, change, places):
    """The change at each of some tuples of positions of each prompt."""
    made = [
        (row, both(model, site, positions, change)) for row in range(len(prompts)) for positions in places
    ]
    return [Case(row, [own], [reference]) for row, (own, reference) in made]


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("component", PLACES)
def test_patching_gives_the_numbers_of_plain_hooks(build, pairs, batches, family, component):
    model = build(family)
    if component not in Architecture.of(model).components():
        pytest.skip(f"{family} computes query, key and value in one module")
    sites = sites_of(model, component)
    source = trace(model, batches[1], sites)
    cases = []
    for site in sites:
        for row, ids in enumerate(pairs[0]):
            for positions in ((3,), (2, 5), tuple(range(len(ids))), (len(ids) - 1,)):
                values = source.value(site)[row, batches[0].columns(row, positions)]
                own, reference = both(model, site, positions, edits.replace(values))
                cases.append(Case(row, [own], [reference]))
    compare(model, pairs[0], cases)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def changes(width):
    """The field's interventions, for values of one width."""
    rows = torch.linalg.qr(random(width, 3, seed=1)).Q.T
    return {
        "zero": edits.zero(),
        "mean": edits.replace(random(width)),
        "steer": edits.steer(random(width), -1.5),
        "project_out": edits.project_out(random(width)),
        "project_out_to_centre": edits.project_out(random(width), random(width, seed=2)),
        "low_rank": edits.low_rank(rows, random(width, seed=2)),
        "any_function": lambda x: x.tanh() + x.flip(-1),
    }


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize("name", changes(4))
def test_every_intervention_gives_the_numbers_of_plain_hooks(build, pairs, family, name):
    model = build(family)
    cases = []
    for component in PLACES:
        if component not in Architecture.of(model).components():
            continue
        for site in sites_of(model, component):
            _, _, span = place(model, site)
            width = model.config.hidden_size if span == EVERYWHERE else span.stop - span.start
            cases += cases_of(model, pairs[0], site, changes(width)[name], [(1, 4, 8), (-1,), None])
    compare(model, pairs[0], cases)


def test_resampling_gives_the_numbers_of_plain_hooks(build, pairs):
    # Values of another row at other positions: no alignment is asked for.
    model = build("qwen")
    site = Site("resid_mid", 1)
    source = trace(model, Batch.of(pairs[1]), [site]).value(site)
    change = edits.replace(source[2, -3:])
    compare(model, pairs[0], cases_of(model, pairs[0], site, change, [(0, 3, 6), (4, 5, 6), (-3, -2, -1)]))


def test_clamp_holds_components_along_orthonormal_rows_and_leaves_the_rest():
    rows, x = torch.linalg.qr(random(8, 3)).Q.T, 3 * random(5, 8, seed=1)
    low, high = torch.full((3,), -0.5), torch.full((3,), 1.0)
    clamped = edits.clamp(low, high, rows)(x)
    torch.testing.assert_close(clamped @ rows.T, (x @ rows.T).clamp(-0.5, 1.0))
    rest = torch.eye(8) - rows.T @ rows
    torch.testing.assert_close(clamped @ rest, x @ rest, rtol=1e-4, atol=1e-5)
    assert torch.equal(edits.clamp(low[0], high[0])(x), x.clamp(-0.5, 1.0))
