import numpy as np
import pytest
import torch
from scipy.spatial.distance import jensenshannon

from safetynet.engine.sites import Site
from safetynet.errors import InputError
from safetynet.interventions.attention import (
    attention_maps,
    divergence,
    double_triangle,
    eager,
    jensen_shannon,
    span_share,
)
from safetynet.models.blocks import unwrapped


def patterns(model, row):
    """(layers, heads, S, S) from transformers itself."""
    with torch.no_grad(), eager(model):
        out = unwrapped(model)(torch.tensor([row]), output_attentions=True)
    return torch.stack([x[0] for x in out.attentions]).numpy()


def test_divergence_is_that_of_the_models_own_rows(model, rows, swapped):
    triggered, placebo, other = rows, swapped(rows, 1), swapped(rows, 2)
    table = divergence(model, triggered, placebo, other)
    for column, first in (("value", triggered), ("control", other)):
        expected = np.zeros((3, 4))
        for a, b in zip(first, placebo, strict=True):
            p, q = (patterns(model, row)[:, :, -1] for row in (a, b))
            expected += jensenshannon(p, q, base=2, axis=-1) ** 2 / len(rows)
        np.testing.assert_allclose(table[column], expected.ravel(), atol=1e-5)
    assert table["layer"].tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert table["head"].tolist() == [0, 1, 2, 3] * 3 and set(table["n"]) == {6}
    single = divergence(model, triggered, placebo, other, tokens=1)
    np.testing.assert_allclose(table["value"], single["value"], atol=1e-5)


def test_identical_prompts_do_not_diverge_and_disjoint_rows_diverge_by_one_bit(build, rows):
    table = divergence(build("qwen"), rows, rows)
    assert table["value"].abs().max() == table["high"].abs().max() == 0
    assert table["control"].isna().all()
    assert jensen_shannon(torch.tensor([1.0, 0]), torch.tensor([0, 1.0])) == 1


def test_shares_and_triangles_are_sums_over_the_models_own_patterns(model, rows, swapped):
    placebo, spans = swapped(rows, 1), [[1, 2]] * 6
    share = span_share(model, rows, placebo, spans)
    triangle = double_triangle(model, rows, placebo, spans)
    for column, own in (("value", rows), ("control", placebo)):
        maps = [patterns(model, row) for row in own]
        expected = np.mean([m[:, :, -1, 1:3].sum(-1) for m in maps], axis=0)
        np.testing.assert_allclose(share[column], expected.ravel(), atol=1e-5)
        onto = [m[..., 1:3].sum(-1) for m in maps]
        expected = np.mean([o[:, :, 1:3].mean(-1) - o[:, :, 3:].mean(-1) for o in onto], axis=0)
        np.testing.assert_allclose(triangle[column], expected.ravel(), atol=1e-5)


def test_maps_are_the_models_own_patterns_below_the_diagonal(model, rows):
    table = attention_maps(
        model,
        {"triggered": rows[:2]},
        [Site("head", 0, 1), Site("head", 2, 3)],
        lambda ids: [str(i) for i in ids],
        groups=[5, 9],
    )
    for group, row in zip([5, 9], rows[:2], strict=True):
        for layer, head in [(0, 1), (2, 3)]:
            own = table[(table["group"] == group) & (table["layer"] == layer)]
            whole = np.zeros((len(row), len(row)))
            whole[own["query"], own["key"]] = own["weight"]
            np.testing.assert_allclose(whole, patterns(model, row)[layer, head], atol=1e-5)
            assert own["query_token"].tolist() == [str(row[i]) for i in own["query"]]
            assert own["key_token"].tolist() == [str(row[i]) for i in own["key"]]


def test_the_models_own_attention_comes_back_even_after_a_failure(build, rows):
    model = build("qwen")
    before = unwrapped(model).config._attn_implementation
    assert before == "sdpa"
    model(torch.tensor([rows[0]]), output_attentions=True)  # transformers leaves hooks of its own behind
    hooks = sum(len(module._forward_hooks) for module in model.modules())
    with pytest.raises(RuntimeError, match="stop"), eager(model):
        assert unwrapped(model).config._attn_implementation == "eager"
        raise RuntimeError("stop")
    divergence(model, rows, rows)
    assert unwrapped(model).config._attn_implementation == before
    assert sum(len(module._forward_hooks) for module in model.modules()) == hooks


def test_pairs_that_are_not_aligned_and_places_that_do_not_exist_are_refused(build, rows, swapped):
    model, placebo = build("qwen"), swapped(rows, 1)
    with pytest.raises(InputError, match="as many tokens as each other"):
        divergence(model, rows, placebo[::-1])
    with pytest.raises(InputError, match="given: 0 triggered, 0 placebo"):
        divergence(model, [], [])
    with pytest.raises(InputError, match="positions: prompt 1 has none"):
        span_share(model, rows[:2], placebo[:2], [[1], []])
    with pytest.raises(InputError, match="position 30: prompt 0 has positions 0 to 6"):
        span_share(model, rows[:1], placebo[:1], [[30]])
    with pytest.raises(InputError, match="a trigger ends its prompt"):
        double_triangle(model, rows[:1], placebo[:1], [[5, 6]])
    with pytest.raises(InputError, match="layer 3 does not exist; there are 0 to 2"):
        attention_maps(model, {"placebo": rows}, [Site("head", 3, 0)], lambda ids: [str(i) for i in ids])
