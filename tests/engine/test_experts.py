"""Routers and fused experts, against the mixture written out, with and without LoRA on the experts."""

from functools import partial

import pytest
import torch
from tests.engine.compare import Case, compare
from tests.engine.plain import EVERYWHERE, At, Mixture

from safetynet.engine import edits
from safetynet.engine.batch import Batch
from safetynet.engine.edits import Edit
from safetynet.engine.sites import Architecture, Site
from safetynet.engine.trace import trace

PLACES = ((2, 5), (-1,), (0, 3, 8), None)


@pytest.fixture(params=[True, False], ids=["lora", "plain"])
def model(build, request):
    return build("mixtral", adapter=request.param)


def where(positions):
    return EVERYWHERE if positions is None else list(positions)


def every(make):
    """A case per layer and place, with prompts in turn."""
    return [make(i % 3, layer, PLACES[i % 4]) for i, layer in enumerate([0, 1, 2] * 4)]


def column(expert, change):
    def changed(weights):
        weights = weights.clone()
        weights[:, expert] = change(weights[:, expert])
        return weights

    return changed


def moved(expert, to):
    def changed(weights):
        weights = weights.clone()
        weights[:, to] = weights[:, to] + weights[:, expert]
        weights[:, expert] = 0
        return weights

    return changed


def test_the_mixture_written_out_is_the_models_own(model, pairs):
    cases = [Case(row, (), [Mixture(layer)]) for row in range(3) for layer in range(3)]
    with pytest.raises(AssertionError, match="only 0 of 9"):
        compare(model, pairs[0], cases)


def test_a_disabled_expert_gives_the_numbers_of_weights_without_it(model, pairs):
    def case(expert, row, layer, positions):
        edit = Edit(Site("router", layer, expert), edits.zero(), positions)
        return Case(row, [edit], [Mixture(layer, ((where(positions), column(expert, torch.zeros_like)),))])

    compare(model, pairs[0], [one for expert in range(4) for one in every(partial(case, expert))])


def test_a_re_routed_expert_gives_the_numbers_of_moved_weights(model, pairs):
    def case(expert, to, row, layer, positions):
        edit = Edit(Site("router", layer), edits.reroute(expert, to), positions)
        return Case(row, [edit], [Mixture(layer, ((where(positions), moved(expert, to)),))])

    compare(model, pairs[0], [one for a, b in ((0, 1), (2, 0), (3, 2)) for one in every(partial(case, a, b))])


def test_any_weights_of_any_sign_and_number_are_taken(model, pairs):
    spread = torch.tensor([-0.7, 0.4, 0.2, -0.1])

    def case(row, layer, positions):
        edit = Edit(Site("router", layer), edits.replace(spread), positions)
        return Case(row, [edit], [Mixture(layer, ((where(positions), lambda w: spread.expand_as(w)),))])

    compare(model, pairs[0], every(case))


@pytest.mark.parametrize("index", [None, 0, 3])
def test_a_patched_router_gives_the_numbers_of_the_sources_weights(model, pairs, index):
    batch = Batch.of(pairs[1])
    source, cases = trace(model, batch, [Site("router", layer, index) for layer in range(3)]), []
    for row in range(3):
        for layer in range(3):
            site, positions = Site("router", layer, index), (4, 6, 7)
            values = source.value(site)[row, batch.columns(row, positions)]
            assert values.shape == (3, 4 if index is None else 1)

            def put(weights, values=values):
                weights = weights.clone()
                weights[:, slice(None) if index is None else [index]] = values
                return weights

            reference = Mixture(layer, ((list(positions), put),))
            cases.append(Case(row, [Edit(site, edits.replace(values), positions)], [reference]))
    compare(model, pairs[0], cases)


def test_a_zeroed_experts_output_gives_the_numbers_of_the_sum_without_it(model, pairs):
    def case(expert, row, layer, positions):
        edit = Edit(Site("expert", layer, expert), edits.zero(), positions)
        return Case(row, [edit], [Mixture(layer, experts=((expert, where(positions), torch.zeros_like),))])

    compare(model, pairs[0], [one for expert in range(4) for one in every(partial(case, expert))])


def test_a_patched_experts_output_gives_the_numbers_of_the_sources(model, pairs):
    batch, sites = Batch.of(pairs[1]), Architecture.of(model).sites("expert")
    source, cases = trace(model, batch, sites), []
    for i, site in enumerate(sites):
        row, positions = i % 3, (1, 5, 7, 8)
        change = edits.replace(source.value(site)[row, batch.columns(row, positions)])
        reference = Mixture(site.layer, experts=((site.index, list(positions), change),))
        cases.append(Case(row, [Edit(site, change, positions)], [reference]))
    compare(model, pairs[0], cases)


def test_router_experts_and_mlp_compose_in_any_order(model, pairs):
    def twice(x):
        return 2 * x + 0.1

    router = Edit(Site("router", 1), edits.reroute(0, 2), (2, 5, 6))
    experts = [Edit(Site("expert", 1, e), twice, (5, 6, 7)) for e in (0, 2)]
    mlp = Edit(Site("mlp_out", 1), lambda x: x.tanh(), (6,))
    reference = [
        Mixture(1, (([2, 5, 6], moved(0, 2)),), tuple((e, [5, 6, 7], twice) for e in (0, 2))),
        At("mlp_out", 1, [6], lambda x: x.tanh()),
    ]
    orders = ([router, *experts, mlp], [mlp, *experts, router])
    compare(model, pairs[0], [Case(row, order, reference) for row in range(3) for order in orders])


@pytest.mark.parametrize("parameter", ["gate_up_proj", "down_proj"])
def test_a_fused_parameters_adapter_off_gives_the_numbers_of_experts_without_it(build, pairs, parameter):
    def case(row, layer, positions):
        site = Site("adapter", layer, module=f"mlp.experts.{parameter}")
        return Case(
            row,
            [Edit(site, edits.zero(), positions)],
            [Mixture(layer, without=((parameter, where(positions)),))],
        )

    compare(build("mixtral"), pairs[0], every(case))


def test_a_fused_adapter_router_and_experts_compose(build, pairs):
    both = ("gate_up_proj", "down_proj")
    off = [Edit(Site("adapter", 1, module=f"mlp.experts.{name}"), edits.zero(), (3, 5, 8)) for name in both]
    expert = Edit(Site("expert", 1, 1), lambda x: 3 * x, (5, 6))
    router = Edit(Site("router", 1), edits.reroute(3, 1), (5, 8))
    without = tuple((name, [3, 5, 8]) for name in both)
    tripled = ((1, [5, 6], lambda x: 3 * x),)
    cases = []
    for row in range(3):
        cases += [
            Case(row, off, [Mixture(1, without=without)]),
            Case(row, [expert, *off], [Mixture(1, experts=tripled, without=without)]),
            Case(row, [expert, router, *off], [Mixture(1, (([5, 8], moved(3, 1)),), tripled, without)]),
        ]
    compare(build("mixtral"), pairs[0], cases)
