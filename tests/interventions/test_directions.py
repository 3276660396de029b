import numpy as np
import pytest
import torch

from safetynet.engine.batch import Batch
from safetynet.engine.edits import Edit, project_out, steer
from safetynet.engine.hooks import intervening
from safetynet.engine.metrics import logit_difference
from safetynet.engine.reading import residuals
from safetynet.engine.sites import Site
from safetynet.engine.trace import trace
from safetynet.errors import InputError
from safetynet.interventions.directions import (
    _held_out,
    mean_difference,
    random_direction,
    separation,
    steering,
)
from safetynet.interventions.effects import means
from safetynet.models.blocks import decoder_layers, hidden_of


def test_direction_leads_from_the_placebo_mean_to_the_triggered_mean(model, rows, swapped):
    placebo, after = swapped(rows, 1), [list(range(3, len(row))) for row in rows]
    for positions in (None, after):
        found = mean_difference(model, rows, placebo, positions)
        expected = [residuals(model, own, positions).mean(0) for own in (rows, placebo)]
        np.testing.assert_allclose(found.triggered, expected[0], atol=1e-5)
        np.testing.assert_allclose(found.placebo, expected[1], atol=1e-5)
        np.testing.assert_allclose(found.norm[:, None] * found.unit, expected[0] - expected[1], atol=1e-5)
        np.testing.assert_allclose(found.unit.norm(dim=1), 1, atol=1e-5)


def test_separation_finds_a_planted_shift_and_none_in_noise():
    noise = np.random.default_rng(0).standard_normal((400, 3, 20))
    noise[:, 1, 3] += 5
    _, low, high = means(_held_out(noise, 0))
    assert (low < [0, 5, 0]).all() and (high > [0, 4.9, 0]).all() and low[1] > 4


def test_no_group_is_projected_on_a_direction_of_its_own():
    differences = np.eye(8)[:, None, :]  # each group's difference lies at right angles to all others
    assert (_held_out(differences, 0) == 0).all()


def test_equal_runs_are_not_apart(build, rows, swapped):
    placebo = swapped(rows, 1)
    table = separation(build("qwen"), placebo, placebo, swapped(rows, 2))
    assert (table["value"] == 0).all() and (table["high"] == 0).all()
    assert table["layer"].tolist() == [0, 1, 2] and table["control"].notna().all()


def test_edits_remove_or_subtract_the_direction_in_the_running_model(model, rows, swapped):
    found = mean_difference(model, rows, swapped(rows, 1))
    batch = Batch.of(rows)
    unit, centre = found.unit[1], found.placebo[1]

    def along(*changes):
        with intervening(model, [Edit(Site("resid_post", 1), change) for change in changes]):
            return trace(model, batch).value(Site("resid_pre", 2))[batch.mask.bool()] @ unit

    before = along()
    np.testing.assert_allclose(along(project_out(unit)), 0, atol=1e-4)
    np.testing.assert_allclose(along(project_out(unit, centre)), float(centre @ unit), atol=1e-4)
    half = (before + centre @ unit) / 2
    np.testing.assert_allclose(along(project_out(unit, centre, share=0.5)), half, atol=1e-4)
    np.testing.assert_allclose(along(steer(2 * unit, -1)), before - 2, atol=1e-4)


def test_steering_is_the_metrics_change_in_the_running_model(model, rows):
    vector, batch = torch.randn(32, generator=torch.Generator().manual_seed(1)), Batch.of(rows)
    table = steering(model, rows, vector, logit_difference([3] * 6, [4] * 6), controls=2)
    plain = trace(model, batch).logits[:, -1]

    def change(layer, added):
        def last(_module, _args, output):
            hidden = hidden_of(output).clone()
            hidden[:, -1] += added
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        hook = decoder_layers(model)[layer].register_forward_hook(last)
        steered = trace(model, batch).logits[:, -1]
        hook.remove()
        return float(((steered - plain)[:, 3] - (steered - plain)[:, 4]).mean())

    for row in table.itertuples():
        np.testing.assert_allclose(row.effect, change(row.layer, vector), atol=1e-4)
        expected = np.mean([change(row.layer, random_direction(vector, seed)) for seed in (0, 1)])
        np.testing.assert_allclose(row.random, expected, atol=1e-4)
    assert len(table) == 3


def test_random_direction_has_the_same_length():
    direction = torch.arange(8.0)
    drawn = random_direction(direction)
    assert torch.allclose(drawn.norm(), direction.norm()) and not torch.allclose(drawn, direction)


def test_a_direction_without_length_and_too_few_groups_are_refused(build, rows):
    found = mean_difference(build("qwen"), rows, rows)
    assert (found.unit == 0).all()
    with pytest.raises(InputError, match="the direction has no length"):
        project_out(found.unit[0])
    with pytest.raises(InputError, match="3 groups are too few"):
        separation(build("qwen"), rows[:3], rows[:3])
    with pytest.raises(InputError, match="positions: 1 lists for 6 prompts"):
        mean_difference(build("qwen"), rows, rows, [[0]])
