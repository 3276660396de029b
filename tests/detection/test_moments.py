"""Merged moments equal those of all rows at once, and scikit-learn's shrinkage."""

import numpy as np
import pytest
from sklearn.covariance import LedoitWolf
from sklearn.decomposition import PCA

from safetynet.detection.moments import Moments


@pytest.mark.parametrize("shape", [(300, 12), (20, 50)])
def test_merged_parts_give_the_covariance_and_shrinkage_of_scikit_learn(shape):
    rows = np.random.default_rng(0).standard_normal(shape) @ np.diag(np.arange(1, shape[1] + 1.0)) + 100
    a, b, c = (Moments.of(part) for part in np.array_split(rows, 3))
    merged, reference = c.merge(a).merge(b), LedoitWolf().fit(rows)
    assert merged.count == len(rows)
    np.testing.assert_allclose(merged.mean, rows.mean(axis=0))
    np.testing.assert_allclose(merged.covariance, np.cov(rows.T, bias=True), atol=1e-8)
    assert merged.shrinkage == pytest.approx(reference.shrinkage_, rel=1e-8)
    np.testing.assert_allclose(merged.shrunk, reference.covariance_, atol=1e-8)


@pytest.mark.parametrize("shape", [(300, 12), (20, 50)])
def test_components_are_those_of_scikit_learns_pca_with_signs_of_their_own(shape):
    rows = np.random.default_rng(0).standard_normal(shape) @ np.diag(np.arange(1, shape[1] + 1.0))
    a, b = (Moments.of(part) for part in np.array_split(rows, 2))
    variances, components = a.merge(b).principal(8)
    pca = PCA(8, svd_solver="full").fit(rows)
    np.testing.assert_allclose(variances, pca.explained_variance_ * (len(rows) - 1) / len(rows))
    np.testing.assert_allclose(np.abs(components), np.abs(pca.components_), atol=1e-8)
    assert (components[np.arange(8), np.abs(components).argmax(1)] > 0).all()


def test_the_identity_shrinks_to_itself():
    # A shrinkage target of trace(C) I instead of trace(C)/d I would be d times too large.
    d = 64
    rows = np.concatenate([np.eye(d), -np.eye(d)]) * np.sqrt(d)
    np.testing.assert_allclose(Moments.of(rows).shrunk, np.eye(d), atol=1e-12)
