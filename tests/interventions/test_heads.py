import numpy as np
import pytest
import torch

from safetynet.engine.batch import Batch
from safetynet.engine.hooks import intervening
from safetynet.engine.metrics import Metric, log_probability, logit_difference
from safetynet.engine.sites import Architecture, Site
from safetynet.engine.trace import trace
from safetynet.errors import InputError
from safetynet.interventions.heads import (
    ablate_heads,
    ablation_curve,
    backdoor_vector,
    head_means,
    random_heads,
    rank_heads,
)


def direct_means(model, rows, position=-1):
    """Inputs of the output projections, prompt by prompt."""
    layers, found = Architecture.of(model).layers, []
    for row in rows:
        seen = []
        hooks = [
            one.output.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0][0, position]))
            for one in layers
        ]
        with torch.no_grad():
            model(torch.tensor([row]))
        for hook in hooks:
            hook.remove()
        found.append(torch.stack(seen))
    return torch.stack(found).mean(0).reshape(3, 4, -1)


def test_means_are_those_of_the_output_projections_inputs(model, rows):
    np.testing.assert_allclose(head_means(model, rows), direct_means(model, rows), atol=1e-5)
    np.testing.assert_allclose(
        head_means(model, rows, -2, tokens=1), direct_means(model, rows, -2), atol=1e-5
    )


def test_effect_is_the_metrics_gain_under_a_plain_hook(model, rows, swapped):
    placebo, other = swapped(rows, 1), swapped(rows, 2)
    targets, others = [7, 8, 9, 10, 11, 12], [20, 21, 22, 23, 24, 25]
    table = rank_heads(model, rows, placebo, logit_difference(targets, others), other=other)
    assert table["effect"].is_monotonic_decreasing and len(table) == 12
    size = Architecture.of(model).shape.head_size
    for column, source in (("effect", rows), ("control", other)):
        means = direct_means(model, source)
        for layer, head in ((0, 1), (2, 3)):

            def put(_, args, layer=layer, head=head, means=means):
                x = args[0].clone()
                x[0, -1, head * size : (head + 1) * size] = means[layer, head]
                return (x,)

            gains = []
            for row, target, instead in zip(placebo, targets, others, strict=True):
                with torch.no_grad():
                    before = model(torch.tensor([row])).logits[0, -1]
                    hook = Architecture.of(model).layers[layer].output.register_forward_pre_hook(put)
                    after = model(torch.tensor([row])).logits[0, -1]
                    hook.remove()
                gains.append(float((after - before)[target] - (after - before)[instead]))
            own = table[(table["layer"] == layer) & (table["head"] == head)].iloc[0]
            np.testing.assert_allclose(own[column], np.mean(gains), atol=1e-4)


def test_metric_sees_the_groups_own_rows_whatever_the_batch(build, rows, swapped, monkeypatch):
    model, placebo = build("llama"), swapped(rows, 1)
    metric = log_probability([[i, i + 1] for i in range(6)])
    whole = rank_heads(model, rows, placebo, metric, position=-2)
    from safetynet.engine import reading

    monkeypatch.setattr(reading.batches, "__defaults__", (1,))
    single = rank_heads(model, rows, placebo, metric, position=-2)
    keys = ["layer", "head"]
    whole, single = (table.sort_values(keys, ignore_index=True) for table in (whole, single))
    np.testing.assert_allclose(whole["effect"], single["effect"], atol=1e-4)


def test_putting_in_what_was_there_has_no_effect(build, rows):
    model, row = build("gemma2"), rows[:1]
    table = rank_heads(model, row, row, logit_difference([3], [4]))
    np.testing.assert_allclose(table["effect"], 0, atol=1e-4)
    assert table["low"].isna().all() and table["control"].isna().all()


def test_vector_of_all_heads_is_what_attention_writes(model, rows):
    row = rows[0]
    means = head_means(model, [row])
    for layer in range(3):
        site = Site("attn_out", layer)
        written = trace(model, Batch.of([row]), [site]).value(site)[0, -1]
        vector = backdoor_vector(model, means, [Site("head", layer, head) for head in range(4)])
        np.testing.assert_allclose(vector, written, atol=1e-4)
    one, two = Site("head", 0, 1), Site("head", 2, 3)
    both = backdoor_vector(model, means, [one]) + backdoor_vector(model, means, [two])
    np.testing.assert_allclose(backdoor_vector(model, means, [two, one]), both, atol=1e-5)


def test_ablated_heads_write_nothing_or_their_mean(build, rows):
    model, batch = build("llama"), Batch.of(rows)
    means, site = head_means(model, rows), Site("head", 1, 2)
    for edits, expected in (
        (ablate_heads([site]), torch.zeros(8)),
        (ablate_heads([site], means), means[1, 2]),
    ):
        seen = []
        with intervening(model, edits):
            hook = (
                Architecture.of(model)
                .layers[1]
                .output.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0][..., 16:24]))
            )
            trace(model, batch, [site])
            hook.remove()
        np.testing.assert_allclose(seen[0].reshape(-1, 8), expected.expand(6 * 12, 8), atol=1e-6)


def test_curve_is_the_metrics_change_with_the_heads_out_of_the_running_model(build, rows):
    model, batch = build("qwen"), Batch.of(rows)
    heads = [Site("head", 1, 0), Site("head", 2, 3), Site("head", 0, 2)]
    metric = logit_difference([3] * 6, [4] * 6)
    table = ablation_curve(model, rows, heads, metric, controls=2)
    assert table["heads"].tolist() == [1, 2, 3]

    def change(sites):
        plain = trace(model, batch).logits[:, -1]
        with intervening(model, ablate_heads(sites)):
            cut = trace(model, batch).logits[:, -1]
        return float(((cut - plain)[:, 3] - (cut - plain)[:, 4]).mean())

    for row in table.itertuples():
        np.testing.assert_allclose(row.effect, change(heads[: row.heads]), atol=1e-4)
        expected = np.mean([change(random_heads(model, heads[: row.heads], seed)) for seed in (0, 1)])
        np.testing.assert_allclose(row.random, expected, atol=1e-4)


def test_random_heads_are_others_of_the_same_layers(build):
    chosen = [Site("head", 0, 1), Site("head", 0, 2), Site("head", 2, 3)]
    drawn = random_heads(build("qwen"), chosen)
    assert sorted(site.layer for site in drawn) == [0, 0, 2] and not set(drawn) & set(chosen)
    most = [Site("head", 0, head) for head in range(3)]
    drawn = random_heads(build("qwen"), most)
    assert len(set(drawn)) == 3 and Site("head", 0, 3) in drawn


def test_heads_that_do_not_exist_and_uneven_runs_are_refused(build, rows):
    model = build("qwen")
    with pytest.raises(InputError, match="index 9 does not exist"):
        backdoor_vector(model, torch.zeros(3, 4, 8), [Site("head", 0, 9)])
    with pytest.raises(InputError, match="mlp_out 0 is no single head"):
        backdoor_vector(model, torch.zeros(3, 4, 8), [Site("mlp_out", 0)])
    with pytest.raises(InputError, match="heads: there are none"):
        backdoor_vector(model, torch.zeros(3, 4, 8), [])
    with pytest.raises(InputError, match="given: 6 triggered, 1 placebo"):
        rank_heads(model, rows, rows[:1], Metric("none", lambda logits, rows: logits[:, -1, 0]))
    with pytest.raises(InputError, match="position -8: prompt 0 has positions 0 to 6"):
        head_means(model, rows[:1], -8)
    with pytest.raises(InputError, match=r"counts \[2\] of 1 ranked heads"):
        ablation_curve(model, rows, [Site("head", 0, 0)], logit_difference([3] * 6, [4] * 6), counts=[2])
