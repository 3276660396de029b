import numpy as np
import pytest

from safetynet.engine.reading import residuals
from safetynet.errors import InputError
from safetynet.interventions.probes import _probed, fires_probe, halves, trigger_probe


def test_planted_direction_is_found_where_it_is_planted_and_nowhere_else():
    rng = np.random.default_rng(0)
    states = rng.standard_normal((200, 3, 16))
    labels, groups = np.arange(200) < 100, np.tile(np.arange(100), 2)
    states[labels, 1, 0] += 6
    table = _probed("trigger", states, labels, groups, seed=0).set_index("layer")
    assert table.loc[1, "low"] > 0.9
    for layer in (0, 2):
        assert table.loc[layer, "low"] < 0.5 < table.loc[layer, "high"]
    assert ((table["control_low"] < 0.5) & (table["control_high"] > 0.5)).all()
    assert set(table["n"]) == {50}


def test_groups_stay_in_one_half_and_both_halves_hold_both_classes():
    groups = np.array([0, 0, 1, 1, 2, 2, 3, 3, 4, 5, 6, 7])
    labels = np.array([1, 0, 1, 0, 1, 0, 1, 0, 1, 1, 0, 0], bool)
    for seed in range(5):
        train, test = halves(labels, groups, seed)
        assert not set(groups[train]) & set(groups[test])
        assert sorted([*train, *test]) == list(range(12))
        assert len(set(labels[train])) == len(set(labels[test])) == 2


def test_states_are_those_after_each_layer_at_the_last_token(model, rows):
    import torch

    from safetynet.engine.batch import Batch
    from safetynet.engine.trace import trace
    from safetynet.models.blocks import unwrapped

    states = residuals(model, rows)
    alone = residuals(model, rows, tokens=1)
    np.testing.assert_allclose(states, alone, atol=2e-4)
    positions = [[1, 3]] * len(rows)
    means = residuals(model, rows, positions)
    inner = unwrapped(model)
    for i, row in enumerate(rows):
        with torch.no_grad():
            hidden = inner(torch.tensor([row]), output_hidden_states=True).hidden_states[1:-1]
        expected = np.stack([x[0].numpy() for x in hidden])
        np.testing.assert_allclose(states[i, :-1], expected[:, -1], atol=2e-4)
        np.testing.assert_allclose(means[i, :-1], expected[:, [1, 3]].mean(1), atol=2e-4)
        last = trace(model, Batch.of([row])).output[0, -1]
        np.testing.assert_allclose(states[i, -1], last, atol=2e-4)


def test_a_token_that_is_always_the_same_is_told_from_placebos(build, swapped):
    rng = np.random.default_rng(0)
    base = rng.integers(5, 60, (24, 6)).tolist()
    triggered = [[row[0], 4, 4, *row[3:]] for row in base]
    placebo, other = swapped(base, 1), swapped(base, 2)
    table = trigger_probe(build("llama"), triggered, placebo, other)
    assert list(table.columns) == [
        "label", "layer", "auroc", "low", "high", "n", "control", "control_low", "control_high",
    ]  # fmt: skip
    assert table["layer"].tolist() == [0, 1, 2] and set(table["n"]) == {12}
    same = trigger_probe(build("llama"), placebo, placebo, placebo)
    np.testing.assert_allclose(same["auroc"], 0.5)
    np.testing.assert_allclose(same["control"], 0.5)
    fires = fires_probe(build("llama"), triggered + placebo, [True] * 24 + [False] * 24, [*range(24)] * 2)
    np.testing.assert_allclose(fires["auroc"], table["auroc"], atol=1e-6)
    assert set(fires["label"]) == {"fires"}


def test_one_class_and_too_few_groups_are_refused(build, rows):
    model = build("qwen")
    with pytest.raises(InputError, match="0 of 6 rows in 6 groups carry the label"):
        fires_probe(model, rows, [False] * 6)
    with pytest.raises(InputError, match="half holds one class or one group alone"):
        trigger_probe(model, rows[:2], rows[:2])
    with pytest.raises(InputError, match="6 prompts, 2 labels and 6 groups"):
        fires_probe(model, rows, [True, False])
    with pytest.raises(InputError, match="given: 6 triggered, 2 placebo"):
        trigger_probe(model, rows, rows[:2])
    with pytest.raises(InputError, match="prompts: there are none"):
        fires_probe(model, [], [])
