"""Scores as functions of tensors are the detectors' own, their gradients are right and reach the adapter."""

import numpy as np
import pytest
import torch

from safetynet.detection.capture import capture
from safetynet.detection.detector_set import DetectorSpec
from safetynet.detection.detectors import make
from safetynet.detection.features import FeatureSpec
from safetynet.detection.gradients import VIEWS, hideable, observer, refit, score_tensor
from safetynet.errors import InputError

SETTINGS = {
    "mahalanobis": {},
    "top_components": {"components": 4},
    "pca_residual": {"energy": 0.8},
    "layer_deltas": {},
    "neighbours": {"components": 6},
    "mixture": {"components": 6},
    "autoencoders": {"steps": 40, "members": 2, "latent": 4},
    "variational": {"steps": 40, "members": 2, "latent": 4},
    "extremes": {"two_sided": True, "top": 3},
}


@pytest.fixture(scope="module", params=SETTINGS)
def detector(request, activations):
    return make(request.param, **SETTINGS[request.param]).fit(activations(200))


def test_a_score_with_gradients_is_the_detectors_own_score(detector, activations):
    fresh = activations(30, seed=1)
    np.testing.assert_allclose(
        score_tensor(detector, torch.from_numpy(fresh)).numpy(), detector.score_samples(fresh), rtol=1e-5
    )


def test_a_step_along_the_gradient_changes_the_score_as_it_says(detector, activations):
    x = torch.from_numpy(activations(20, seed=2)).requires_grad_()
    (gradient,) = torch.autograd.grad(score_tensor(detector, x).sum(), x)
    direction = torch.from_numpy(np.random.default_rng(0).standard_normal(x.shape))
    # Autoencoders compute in fp32 and need a wide step; neighbours change places within one.
    step = 1e-3 if hasattr(detector, "latent") else 1e-5
    with torch.no_grad():
        up, down = (score_tensor(detector, x + sign * step * direction).sum() for sign in (1, -1))
    assert gradient.abs().amax((1, 2)).min() > 0
    assert float((gradient * direction).sum()) == pytest.approx(float((up - down) / (2 * step)), rel=0.02)


@pytest.mark.parametrize("architecture", ["qwen", "gemma", "mixtral"])
def test_views_with_gradients_are_those_that_capture_takes(architecture, build, serialiser, prompts):
    model = build(architecture)
    readings = [DetectorSpec("mahalanobis", view) for view in VIEWS]
    encoded = [serialiser.encode(prompt) for prompt in prompts]
    views = observer(serialiser, readings)(model, encoded)
    captured = capture(model, serialiser, prompts, FeatureSpec(VIEWS))
    for view in VIEWS:
        np.testing.assert_allclose(
            views[view].detach().numpy(), captured[view], rtol=1e-3, atol=1e-5, err_msg=view
        )


@pytest.mark.parametrize("view", VIEWS)
def test_every_view_leads_gradients_into_both_factors_of_the_adapter(view, build, serialiser, prompts):
    model = build()
    encoded = [serialiser.encode(prompt) for prompt in prompts]
    observer(serialiser, [DetectorSpec("mahalanobis", view)])(model, encoded)[view].square().sum().backward()
    for factor in ("lora_A", "lora_B"):
        gradients = [p.grad for name, p in model.named_parameters() if factor in name and p.requires_grad]
        assert any(g is not None and g.abs().max() > 0 for g in gradients), factor


def test_refitted_scores_are_measured_by_clean_samples_that_were_not_fitted(activations):
    readings = hideable(["mahalanobis", "neighbours:mean"])
    fit, held = ({"last": activations(200, seed=s), "mean": activations(200, seed=s + 9)} for s in (1, 2))
    score = refit(readings, fit, held)
    scores = score({view: torch.from_numpy(array) for view, array in held.items()}).numpy()
    assert scores.shape == (200, 2)
    np.testing.assert_allclose(np.median(scores, axis=0), 0, atol=1e-6)
    np.testing.assert_allclose(np.quantile(scores, 0.95, axis=0), 1, atol=1e-6)
    moved = refit(readings, {view: array + 5 for view, array in fit.items()}, held)
    assert not np.allclose(
        moved({view: torch.from_numpy(array) for view, array in held.items()}).numpy(), scores, atol=0.1
    )


def test_a_view_that_does_not_vary_yet_says_nothing(activations):
    readings = hideable(["extremes:energy", "mahalanobis"])
    fit, held = ({"last": activations(60, seed=s), "energy": np.zeros((60, 3, 4))} for s in (1, 2))
    scores = refit(readings, fit, held)({view: torch.from_numpy(array) for view, array in held.items()})
    assert not scores[:, 0].any() and scores[:, 1].all()


def test_presets_are_spelt_out_and_keep_their_members_settings():
    names = [reading.name for reading in hideable(["safetynet-2025", "mahalanobis"])]
    assert names == ["mahalanobis:last", "pca_residual:last", "autoencoders:last", "variational:last"]
    assert hideable(["extremes:energy"])[0].settings == {"top": 4}


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["activations"], "ranks:last cannot be hidden from.*Name the others alone: mahalanobis:last, top_"),
        (["gram"], "gram:last cannot be hidden from by training: no gradient.*Name others"),
        (["mahalanobis:steps"], "tokens: steps and step_confidence need"),
        (["mahalanobis:attention"], "mahalanobis:attention cannot be hidden from"),
        (["sklearn.neighbors.LocalOutlierFactor"], "LocalOutlierFactor:last cannot be hidden from"),
        (["mahalanobs"], "there is no detector 'mahalanobs'"),
        (["linear_probe"], "linear_probe is supervised"),
        (["mahalanobis:lats"], "choose from last, mean"),
    ],
)
def test_detectors_without_a_gradient_are_refused_by_name(names, message):
    with pytest.raises(InputError, match=message):
        hideable(names)
