"""Several interventions in one run: whatever their layers, sites and order, the numbers of plain hooks."""

import itertools

import pytest
import torch
from tests.engine.compare import Case, compare
from tests.engine.conftest import CONFIGS
from tests.engine.plain import EVERYWHERE, At, Cut

from safetynet.engine import edits
from safetynet.engine.batch import Batch
from safetynet.engine.edits import Edit, KnockOut
from safetynet.engine.sites import Site
from safetynet.engine.trace import trace


def push(seed):
    """Add a fixed random vector, scaled to be seen through any norm."""
    return lambda x: x + torch.randn(x.shape[-1], generator=torch.Generator().manual_seed(seed)).to(x)


def shrink(x):
    return 0.3 * x


def pair(component, layer, positions, change):
    where = EVERYWHERE if positions is None else list(positions)
    return Edit(Site(component, layer), change, positions), At(component, layer, where, change)


COMBINATIONS = {
    "layers": [("resid_pre", 0, (5,)), ("mlp_out", 1, (7,)), ("resid_post", 2, (-1,))],
    "one_layer": [
        ("resid_pre", 1, (4,)),
        ("attn_out", 1, (4, 6)),
        ("resid_mid", 1, (6,)),
        ("mlp_out", 1, (2,)),
    ],
    "all_at_one_position": [
        (component, 1, (5,))
        for component in ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post", "head")
    ],
    "last_layer": [
        ("resid_pre", 2, (3,)),
        ("head", 2, (-1,)),
        ("attn_out", 2, None),
        ("resid_post", 2, (-2, -1)),
    ],
    "late_before_early": [("resid_post", 2, (-1,)), ("mlp_out", 0, (8,)), ("resid_mid", 1, (1,))],
    "everywhere": [("attn_out", 0, None), ("mlp_out", 2, None)],
    "narrow_then_wide": [("mlp_out", 1, (6,)), ("resid_pre", 2, (2,))],
    "last_layer_unread": [("resid_mid", 2, (2,)), ("resid_pre", 1, (7,))],
}


@pytest.mark.parametrize("family", CONFIGS)
def test_sets_of_edits_give_the_numbers_of_plain_hooks(build, pairs, family):
    cases = []
    for row, places in itertools.product(range(3), COMBINATIONS.values()):
        made = [pair(*place, push(i)) for i, place in enumerate(places)]
        # Of two hooks on a layer's output, the one that completes resid_mid has to come first.
        reference = sorted((one for _, one in made), key=lambda one: one.component == "resid_post")
        cases.append(Case(row, [edit for edit, _ in made], reference))
    compare(build(family), pairs[0], cases)
    compare(build(family), pairs[0], cases, tokens=8)


def test_the_order_in_which_edits_are_given_decides_nothing(build, pairs):
    # resid_mid sets the sum, so what attention adds must have been changed before.
    mid, attention = pair("resid_mid", 1, (4, 5), shrink), pair("attn_out", 1, (4, 5), push(0))
    before, mlp = pair("resid_pre", 1, (4, 5), push(1)), pair("mlp_out", 1, (5,), push(2))
    reference = [before[1], attention[1], mid[1], mlp[1]]
    orders = itertools.permutations((mid, attention, before, mlp))
    cases = [Case(0, [edit for edit, _ in order], reference) for order in orders]
    for family in ("llama", "gemma2", "gpt2"):
        compare(build(family), pairs[0], cases)


@pytest.mark.parametrize("positions", [(0, 1), (3, 4, 5), (6, 7, 8), (0, 4, 8)])
def test_edits_before_and_after_the_first_difference_of_a_pair_compose(build, pairs, positions):
    model = build("gemma3")
    site = Site("resid_post", 0)
    source = trace(model, Batch.of(pairs[1])).value(site)
    cases = []
    for row in range(3):
        values = source[row, Batch.of(pairs[1]).columns(row, positions)]
        patch = pair("resid_post", 0, positions, edits.replace(values))
        steer = pair("attn_out", 2, (-1,), push(3))
        cases.append(Case(row, [patch[0], steer[0]], [patch[1], steer[1]]))
    compare(model, pairs[0], cases)


def test_knock_outs_compose_with_edits_of_the_same_and_other_layers(build, pairs):
    cut = KnockOut(1, (5, 7), (1, 2))
    reference = Cut(1, (((5, 7), (1, 2), None),))
    cases = []
    for place in (
        ("resid_pre", 1, (3,)),
        ("attn_out", 1, (5,)),
        ("mlp_out", 0, (2,)),
        ("resid_post", 2, (-1,)),
    ):
        edit, plain = pair(*place, push(1))
        cases += [Case(row, [cut, edit], [plain, reference]) for row in range(3)]
    for family in ("llama", "gemma2"):
        compare(build(family), pairs[0], cases)
