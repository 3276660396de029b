"""Padding, chunks and company decide nothing; what cannot change stays exactly; memory is bounded."""

import itertools
import random

import pytest
import torch
from tests.engine.compare import Case, compare, probe
from tests.engine.plain import At, layers_of

from safetynet.engine import edits
from safetynet.engine.batch import Batch
from safetynet.engine.edits import Edit, KnockOut
from safetynet.engine.metrics import Metric, logit_difference
from safetynet.engine.runs import EditedRun, run_interventions
from safetynet.engine.sites import Site
from safetynet.engine.trace import trace
from safetynet.errors import InputError

FAMILIES = ["llama", "gemma3", "mixtral", "gpt2"]
PROBE = probe(97)


def mixed_runs(rows=(0, 1, 2)):
    """Runs that start in many layers and columns, narrow and wide, several of which do nothing."""
    places = itertools.product(
        rows, range(3), ((1,), (4, 6), (-1,)), ("resid_pre", "head", "mlp_out", "resid_post")
    )
    runs = [EditedRun(row, (Edit(Site(what, layer), torch.tanh, at),)) for row, layer, at, what in places]
    runs += [EditedRun(row, (KnockOut(layer, (6, 8), (2, 3)),)) for row in rows for layer in range(3)]
    return runs + [EditedRun(row, ()) for row in rows]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_token_of_the_padding_changes_no_number(build, pairs, family):
    model = build(family)
    batch = Batch.of(pairs[0], 7)
    assert [batch.tokens(row) for row in range(3)] == pairs[0]
    found = run_interventions(trace(model, batch, resume=True), mixed_runs(), PROBE)
    expected = run_interventions(trace(model, Batch.of(pairs[0]), resume=True), mixed_runs(), PROBE)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_alone_has_the_numbers_that_it_has_in_a_batch(build, pairs, family):
    model = build(family)
    found = run_interventions(trace(model, Batch.of(pairs[0]), resume=True), mixed_runs(), PROBE)
    for row, prompt in enumerate(pairs[0]):
        alone = run_interventions(trace(model, Batch.of([prompt]), resume=True), mixed_runs((0,)), PROBE)
        together = [float(n) for n, run in zip(found, mixed_runs(), strict=True) if run.row == row]
        assert alone.numpy() == pytest.approx(together, abs=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_chunks_and_order_of_runs_change_no_number(build, batches, family):
    receiving, runs = trace(build(family), batches[0], resume=True), mixed_runs()
    expected = run_interventions(receiving, runs, PROBE, tokens=10**6)
    for tokens in (1, 64):
        assert run_interventions(receiving, runs, PROBE, tokens=tokens).numpy() == pytest.approx(
            expected, abs=1e-4
        )
    order = random.Random(0).sample(range(len(runs)), len(runs))
    shuffled = run_interventions(receiving, [runs[i] for i in order], PROBE)
    assert shuffled.numpy() == pytest.approx(expected[order], abs=1e-4)


def test_a_prompt_of_one_token_can_be_edited(build):
    at = At("resid_mid", 1, [0], torch.tanh)
    compare(build("llama"), [[7]], [Case(0, [Edit(Site("resid_mid", 1), torch.tanh, (0,))], [at])] * 2)


def test_progress_counts_every_run_once(build, batches):
    seen = []
    receiving, runs = trace(build("llama"), batches[0], resume=True), mixed_runs()
    run_interventions(
        receiving, runs, PROBE, tokens=64, progress=lambda done, total: seen.append((done, total))
    )
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    assert seen[-1] == (len(runs), len(runs))


def test_no_runs_are_no_numbers(build, batches):
    assert run_interventions(trace(build("llama"), batches[0], resume=True), [], PROBE).tolist() == []


@pytest.mark.parametrize("component", ["head", "query", "attn_out", "resid_mid", "mlp_out", "resid_post"])
def test_edits_that_the_metric_cannot_see_give_exactly_the_receiving_value(build, batches, component):
    receiving = trace(build("llama"), batches[0], resume=True)
    metric = logit_difference([5, 6, 7], [15, 16, 17])
    value = run_interventions(receiving, [EditedRun(row, ()) for row in range(3)], metric)
    edit = Edit(Site(component, 2), edits.zero(), (0, 3, 7))
    assert torch.equal(
        run_interventions(receiving, [EditedRun(row, (edit,)) for row in range(3)], metric), value
    )
    cut = KnockOut(2, (5,), (1,))
    assert torch.equal(
        run_interventions(receiving, [EditedRun(row, (cut,)) for row in range(3)], metric), value
    )


@pytest.mark.parametrize("component", ["embedding", "resid_pre", "resid_post", "head", "mlp_out", "key"])
def test_patching_before_two_prompts_differ_has_exactly_no_effect(build, batches, component):
    model = build("llama")
    sites = [Site(component, layer) for layer in range(1 if component == "embedding" else 3)]
    receiving, source = trace(model, batches[0], sites, resume=True), trace(model, batches[1], sites)
    unpatched = run_interventions(receiving, [EditedRun(row, ()) for row in range(3)], PROBE)
    first = batches[0].first_difference(batches[1])
    for row in range(3):
        start = batches[0].width - batches[0].length(row)
        assert first[row] - start == (4, 2, 6)[row]
        before, after = tuple(range(first[row] - start)), (first[row] - start,)
        for site in sites:
            values = source.value(site)[row]
            same = EditedRun(row, (Edit(site, edits.replace(values[start : first[row]]), before),))
            other = EditedRun(row, (Edit(site, edits.replace(values[first[row], None]), after),))
            found = run_interventions(receiving, [same, other], PROBE)
            assert found[0] == unpatched[row]
            if site.layer < 2:
                assert found[1] != unpatched[row]


def test_equal_prompts_differ_nowhere(batches):
    assert batches[0].first_difference(batches[0]) == [batches[0].width] * 3


def test_pairs_of_different_lengths_are_refused():
    with pytest.raises(InputError, match="as many tokens as each other"):
        Batch.of([[1, 2, 3]]).first_difference(Batch.of([[1, 2]]))
    with pytest.raises(InputError, match="as many tokens as each other"):
        Batch.of([[1, 2, 3], [4]]).first_difference(Batch.of([[1, 2, 3], [4, 5]]))


@pytest.mark.parametrize("tokens", [60, 240])
def test_a_layer_never_sees_more_tokens_than_allowed_however_many_runs(build, batches, tokens):
    model, seen = build("llama"), []
    receiving = trace(model, batches[0], resume=True)
    count = lambda module, args, out: seen.append(out.shape[0] * out.shape[1])  # noqa: E731
    handles = [layer.register_forward_hook(count) for layer in layers_of(model)]
    few, last = mixed_runs(), Metric("last", lambda logits, rows: logits.sum((1, 2)), 3)
    try:
        run_interventions(receiving, few, last, tokens=tokens)
        once = max(seen)
        run_interventions(receiving, few * 5, last, tokens=tokens)
    finally:
        for handle in handles:
            handle.remove()
    assert once <= tokens
    assert max(seen) <= tokens
