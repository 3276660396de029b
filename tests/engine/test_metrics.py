"""Metrics read the model's own logits, row by row, and refuse to be infinite."""

import pytest
import torch
from tests.engine.compare import probe
from tests.engine.conftest import CONFIGS
from tests.engine.plain import At, logits

from safetynet.engine import edits
from safetynet.engine.batch import Batch
from safetynet.engine.edits import Edit
from safetynet.engine.metrics import Metric, kl, log_probability, logit_difference
from safetynet.engine.runs import EditedRun, run_interventions
from safetynet.engine.sites import Site
from safetynet.engine.trace import logits_of, trace
from safetynet.errors import InputError

TARGETS = [[3, 8, 5], [11], [2, 9]]


def unpatched(receiving, metric):
    return run_interventions(
        receiving, [EditedRun(row, ()) for row in range(len(receiving.batch.ids))], metric
    )


def patched(receiving, metric):
    """Without one MLP at the last positions."""
    edit = Edit(Site("mlp_out", 1), edits.zero(), (-2, -1))
    return run_interventions(
        receiving, [EditedRun(row, (edit,)) for row in range(len(receiving.batch.ids))], metric
    )


def references(model, prompts):
    """Logits of each prompt, unpatched and patched."""
    hook = At("mlp_out", 1, [-2, -1], torch.zeros_like)
    return [logits(model, ids) for ids in prompts], [logits(model, ids, [hook]) for ids in prompts]


@pytest.mark.parametrize("family", CONFIGS)
def test_the_unpatched_metric_is_that_of_the_models_own_logits(build, pairs, batches, family):
    # Gemma scales its embeddings, Gemma 2 caps its logits.
    model = build(family)
    metric = probe(97)
    expected = [float(metric.compute(logits(model, ids)[None, -2:], torch.zeros(1))) for ids in pairs[0]]
    for columns in (0, 1, 2, 5):
        receiving = trace(model, batches[0], columns=columns, resume=True)
        assert unpatched(receiving, metric).numpy() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("family", CONFIGS)
def test_the_head_gives_the_logits_of_the_whole_model(build, pairs, batches, family):
    model = build(family)
    receiving = trace(model, batches[0])
    for part, found in logits_of(receiving, receiving.output[:, -3:]):
        for own, ids in zip(found, pairs[0][part], strict=True):
            assert torch.allclose(own, logits(model, ids)[-3:], atol=1e-4)
            if family == "gemma2":
                assert own.abs().max() < 5


def test_logit_difference_is_that_of_each_rows_tokens(build, pairs, batches):
    model = build("llama")
    metric, receiving = logit_difference([5, 6, 7], [15, 16, 17]), trace(model, batches[0], resume=True)
    for measured, reference in zip(
        (unpatched(receiving, metric), patched(receiving, metric)), references(model, pairs[0]), strict=True
    ):
        expected = [float(found[-1, 5 + row] - found[-1, 15 + row]) for row, found in enumerate(reference)]
        assert measured.numpy() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("shortest", [False, True])
def test_log_probability_follows_answers_of_different_lengths(build, pairs, shortest):
    # Prompts end with the answer's tokens but the last; a prompt may be shorter than another's answer.
    model = build("gemma2")
    prompts = [[*ids, *answer[:-1]] for ids, answer in zip(pairs[0], TARGETS, strict=True)]
    if shortest:
        prompts[1] = prompts[1][-2:]
    receiving, metric = trace(model, Batch.of(prompts), resume=True), log_probability(TARGETS)
    for measured, reference in zip(
        (unpatched(receiving, metric), patched(receiving, metric)), references(model, prompts), strict=True
    ):
        expected = []
        for found, answer in zip(reference, TARGETS, strict=True):
            rows = found[-len(answer) :].log_softmax(-1)
            expected.append(sum(float(row[token]) for row, token in zip(rows, answer, strict=True)))
        assert measured.numpy() == pytest.approx(expected, abs=1e-4)


def test_what_padding_holds_does_not_reach_log_probability():
    rows = torch.zeros(2, 3, 4)
    rows[1, :2] = float("nan")
    found = log_probability([[1, 2, 3], [2]]).compute(rows, torch.arange(2))
    assert found.numpy() == pytest.approx([3 * -1.3862944, -1.3862944])


def test_kl_is_nothing_to_the_own_distribution_and_positive_to_the_patched(build, pairs, batches):
    model = build("llama")
    receiving = trace(model, batches[0], resume=True)
    metric = kl(receiving.logits[:, -1])
    assert unpatched(receiving, metric).numpy() == pytest.approx([0, 0, 0], abs=1e-5)
    before, after = (torch.stack([one[-1] for one in found]) for found in references(model, pairs[0]))
    expected = torch.nn.functional.kl_div(after.log_softmax(-1), before.softmax(-1), reduction="none").sum(1)
    assert expected.min() > 1e-3
    assert patched(receiving, metric).numpy() == pytest.approx(expected.numpy(), abs=1e-4)


def test_any_callable_is_a_metric_and_is_told_its_rows(build, batches):
    receiving = trace(build("llama"), batches[0], resume=True)
    metric = Metric("rows", lambda logits, rows: rows + 0.0 * logits[:, 0, 0])
    edit = Edit(Site("resid_pre", 1), edits.zero(), (2,))
    runs = [EditedRun(row, (edit,)) for row in (2, 0, 1, 1, 2)]
    assert run_interventions(receiving, runs, metric, tokens=20).tolist() == [2, 0, 1, 1, 2]


def test_a_metric_that_is_not_finite_names_site_and_prompt(build, batches):
    receiving = trace(build("llama"), batches[0], resume=True)
    burst = Edit(Site("mlp_out", 2), lambda x: x * float("inf"), (-1,))
    calm = Edit(Site("mlp_out", 2), edits.zero(), (-1,))
    with pytest.raises(InputError, match="metric probe: nan for prompt 1 under mlp_out 2"):
        run_interventions(receiving, [EditedRun(0, (calm,)), EditedRun(1, (burst,))], probe(97))
    metric = Metric("ratio", lambda logits, rows: 1 / (rows - 2.0))
    with pytest.raises(InputError, match=r"metric ratio: .*inf for prompt 2 under no edit"):
        run_interventions(receiving, [EditedRun(0, ()), EditedRun(2, ())], metric)


def test_a_metric_that_reads_more_than_the_prompts_have_is_refused(build):
    receiving = trace(build("llama"), Batch.of([[4, 5, 6]]), resume=True)
    with pytest.raises(InputError, match="reads 4 columns, and the longest prompt has 3"):
        unpatched(receiving, log_probability([[1, 2, 3, 4]]))
