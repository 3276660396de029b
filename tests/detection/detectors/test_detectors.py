"""What holds for every detector: single samples, files without pickle, scales, faults of the user."""

import json

import numpy as np
import pytest
from safetensors import safe_open
from sklearn.metrics import roc_auc_score

from safetynet.detection import files
from safetynet.detection.detectors import NAMES, make, restore
from safetynet.errors import InputError

FAST = {
    "autoencoders": {"steps": 60, "members": 2, "latent": 8},
    "variational": {"steps": 60, "members": 2, "latent": 8},
    "ranks": {"projected": 12},
    "sklearn.ensemble.IsolationForest": {"n_estimators": 30},
}
HIDDEN = (
    "mahalanobis", "top_components", "pca_residual", "layer_deltas", "ranks", "neighbours", "mixture",
    "autoencoders", "variational", "gram", "extremes", "sklearn.neighbors.LocalOutlierFactor",
    "sklearn.ensemble.IsolationForest",
)  # fmt: skip
LAYERED = ("mahalanobis", "top_components", "pca_residual", "neighbours", "mixture", "gram")
SUPERVISED = ("linear_probe", "mlp_probe", "contrast_probe")


def fitted(name, x):
    labels = np.arange(len(x)) % 2 if name in SUPERVISED else None
    return make(name, **FAST.get(name, {})).fit(x, labels)


@pytest.mark.parametrize("name", HIDDEN + SUPERVISED)
def test_a_score_depends_on_no_other_sample(name, activations):
    detector, fresh = fitted(name, activations(120)), activations(8, seed=1)
    together = detector.score_samples(fresh)
    alone = np.concatenate([detector.score_samples(fresh[i : i + 1]) for i in range(8)])
    assert together.shape == (8,)
    np.testing.assert_allclose(together, alone, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", sorted({*NAMES, *HIDDEN}))
def test_a_score_is_the_same_in_any_company(name, activations):
    detector, fresh = fitted(name, activations(120)), activations(8, seed=1)
    alone = np.concatenate([detector.score_samples(fresh[i : i + 1]) for i in range(8)])
    strange = activations(40, seed=2) + 5.0
    for others in (strange, -strange, np.repeat(fresh[:1], 40, axis=0)):
        together = detector.score_samples(np.concatenate([fresh, others]))[:8]
        np.testing.assert_allclose(together, alone, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(detector.score_samples(fresh[::-1])[::-1], alone, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", HIDDEN + SUPERVISED)
def test_a_detector_comes_back_from_its_file_without_pickle(name, activations, tmp_path):
    detector, fresh = fitted(name, activations(120)), activations(8, seed=1)
    files.write(tmp_path / "d.safetensors", "monitor", *detector.state())
    again = restore(*files.read(tmp_path / "d.safetensors", "monitor"))
    np.testing.assert_allclose(again.score_samples(fresh), detector.score_samples(fresh), rtol=1e-6)
    with safe_open(tmp_path / "d.safetensors", "numpy") as file:
        assert json.loads(file.metadata()["safetynet"])["about"]["name"] == name


@pytest.mark.parametrize("name", HIDDEN)
def test_samples_far_from_clean_ones_score_higher(name, activations):
    detector, fresh = fitted(name, activations(200)), activations(100, seed=1)
    moved = activations(100, seed=2)
    moved[:, 1:] += 3 * np.sign(np.random.default_rng(3).standard_normal(20))
    scores = np.concatenate([detector.score_samples(fresh), detector.score_samples(moved)])
    assert roc_auc_score(np.arange(200) >= 100, scores) > 0.9


@pytest.mark.parametrize("name", LAYERED)
def test_no_layer_decides_by_its_scale_alone(name, activations):
    scale = np.array([1.0, 100.0, 1.0])[:, None]
    clean, fresh = activations(150), activations(40, seed=1)
    plain = fitted(name, clean).score_samples(fresh)
    scaled = fitted(name, clean * scale).score_samples(fresh * scale)
    np.testing.assert_allclose(plain, scaled, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["mahalanobis", "top_components", "pca_residual", "neighbours"])
def test_turning_and_moving_all_activations_changes_no_score(name, activations):
    # A covariance that is whitened with and then used raw, or axes that are taken for components, would.
    turn = np.linalg.qr(np.random.default_rng(5).standard_normal((20, 20)))[0]
    clean, fresh = activations(150), activations(20, seed=1)
    plain = fitted(name, clean).score_samples(fresh)
    turned = fitted(name, clean @ turn + 7.0).score_samples(fresh @ turn + 7.0)
    np.testing.assert_allclose(plain, turned, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["mahalanobis", "top_components", "pca_residual"])
def test_a_detector_fitted_in_parts_scores_as_one_fitted_at_once(name, activations):
    clean, fresh = activations(400), activations(20, seed=1)
    streamed = make(name)
    for part in np.array_split(clean, 5):
        streamed.partial_fit(part)
    np.testing.assert_allclose(
        streamed.finish().score_samples(fresh), fitted(name, clean).score_samples(fresh), rtol=1e-7
    )
    with pytest.raises(InputError, match=f"detector {name}: 0 clean samples; it needs at least 10"):
        make(name).finish()
    with pytest.raises(InputError, match="all clean samples are the same"):
        make(name).partial_fit(np.ones((50, 3, 20))).finish()


@pytest.mark.parametrize("name", HIDDEN)
def test_unusable_samples_are_refused(name, activations):
    clean = activations(120)
    with pytest.raises(InputError, match="needs at least"):
        fitted(name, clean[:5])
    with pytest.raises(InputError, match="all clean samples are the same"):
        fitted(name, np.ones((120, 3, 20)))
    with pytest.raises(InputError, match="NaN or infinite"):
        fitted(name, np.where(clean > clean.max() - 1e-9, np.nan, clean))
    with pytest.raises(InputError, match="NaN or infinite"):
        fitted(name, clean).score_samples(np.full((1, 3, 20), np.inf))


@pytest.mark.parametrize("name", HIDDEN)
def test_constant_features_and_a_degenerate_covariance_give_finite_scores(name, activations):
    clean = activations(120)
    clean[:, :, 3] = 5.0
    clean[:, :, 4] = 2 * clean[:, :, 5]
    assert np.isfinite(fitted(name, clean).score_samples(clean[:10] + 0.1)).all()


def test_every_name_makes_its_detector_and_others_list_them():
    for name in NAMES:
        assert make(name).name == name
    with pytest.raises(InputError, match="Choose from mahalanobis"):
        make("mahalanobis2")
    with pytest.raises(InputError, match="unexpected keyword argument 'shrink'"):
        make("mahalanobis", shrink=1)
    with pytest.raises(InputError, match="not fitted yet"):
        make("mahalanobis").state()
