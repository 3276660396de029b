"""Mean-and-covariance detectors against scikit-learn, in parts and with flipped components."""

import numpy as np
import pytest
from sklearn.covariance import LedoitWolf
from sklearn.decomposition import PCA

from safetynet.detection.detectors.gaussian import Mahalanobis, Residual, TopComponents
from safetynet.errors import InputError


@pytest.mark.parametrize("count", [60, 12], ids=["more samples than dimensions", "fewer"])
def test_mahalanobis_is_that_of_scikit_learns_ledoit_wolf(activations, count):
    clean, fresh = activations(count), activations(10, seed=1)
    detector = Mahalanobis().fit(clean)
    assert detector.directions_.shape == (3, min(20, count - 1), 20)
    found = detector.layer_scores(fresh)
    for layer in range(3):
        expected = LedoitWolf().fit(clean[:, layer]).mahalanobis(fresh[:, layer])
        np.testing.assert_allclose(found[:, layer], expected, rtol=1e-8)


def test_a_layer_that_never_changes_counts_nothing(activations):
    clean, fresh = activations(60), activations(10, seed=1)
    clean[:, 1] = 3.0
    for detector in (Mahalanobis(), Mahalanobis(components=4)):
        found = detector.fit(clean).layer_scores(fresh)
        np.testing.assert_array_equal(found[:, 1], 0)
        assert (found[:, [0, 2]] > 0).all()


def test_residual_is_the_reconstruction_error_of_scikit_learns_pca(activations):
    clean, fresh = activations(80), activations(10, seed=1)
    found = Residual(energy=0.9).fit(clean).layer_scores(fresh)
    for layer in range(3):
        pca = PCA(n_components=0.9, svd_solver="full").fit(clean[:, layer])
        back = pca.inverse_transform(pca.transform(fresh[:, layer]))
        np.testing.assert_allclose(found[:, layer], ((fresh[:, layer] - back) ** 2).sum(1), rtol=1e-6)


def test_fitting_in_parts_gives_the_distances_of_fitting_at_once(activations):
    clean, fresh = activations(90), activations(10, seed=1)
    streamed = Mahalanobis()
    for part in np.array_split(clean, 4):
        streamed.partial_fit(part)
    streamed.finish()
    np.testing.assert_allclose(
        streamed.layer_scores(fresh), Mahalanobis().fit(clean).layer_scores(fresh), rtol=1e-8
    )
    assert np.isfinite(streamed.score_samples(fresh)).all()
    with pytest.raises(InputError, match="0 clean samples; it needs at least 10"):
        Mahalanobis().finish()


@pytest.mark.parametrize("kind", [TopComponents, Residual])
def test_the_sign_of_a_component_means_nothing(kind, activations):
    fresh, detector = activations(10, seed=1), kind().fit(activations(60))
    before = detector.score_samples(fresh)
    detector.components_ = detector.components_ * np.array([-1.0, 1.0, -1.0])[:, None, None]
    np.testing.assert_allclose(detector.score_samples(fresh), before)


def test_top_components_see_a_shift_that_whitening_hides(activations):
    clean, fresh = activations(400), activations(200, seed=1)
    top = TopComponents(components=2).fit(clean)
    moved = fresh + 4 * top.components_[:, :1].sum(axis=1)
    gain = [
        np.median(d.score_samples(moved)) - np.median(d.score_samples(fresh))
        for d in (top, Mahalanobis().fit(clean))
    ]
    assert gain[0] > gain[1]


def test_samples_of_other_layers_are_refused(activations):
    with pytest.raises(InputError, match="samples have 2 layers, it was fitted on 3"):
        Mahalanobis().fit(activations(50)).score_samples(activations(5)[:, :2])
    with pytest.raises(InputError, match=r"shape \(5,\)"):
        Mahalanobis().fit(np.ones(5))
