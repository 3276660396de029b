"""What single detectors promise beyond the common interface."""

import random

import numpy as np
import pytest
import torch
from sklearn.neighbors import LocalOutlierFactor, NearestNeighbors

from safetynet.detection.detectors import make, restore
from safetynet.detection.detectors.autoencoders import AutoEncoders
from safetynet.detection.detectors.extremes import Extremes, SequenceLock
from safetynet.detection.detectors.trajectories import LayerDeltas, _ranks
from safetynet.errors import InputError


def test_an_estimator_by_name_scores_as_scikit_learn_does(activations):
    clean, fresh = activations(100), activations(10, seed=1)
    found = make("sklearn.neighbors.LocalOutlierFactor", n_neighbors=15).fit(clean).score_samples(fresh)
    direct = LocalOutlierFactor(n_neighbors=15, novelty=True).fit(clean.reshape(100, -1))
    np.testing.assert_allclose(found, -direct.score_samples(fresh.reshape(10, -1)))


def test_an_estimator_of_pyod_scores_as_pyod_does_and_comes_back(activations):
    from pyod.models.knn import KNN

    clean, fresh = activations(100), activations(10, seed=1)
    detector = make("pyod.models.knn.KNN").fit(clean)
    direct = KNN().fit(clean.reshape(100, -1)).decision_function(fresh.reshape(10, -1))
    np.testing.assert_allclose(detector.score_samples(fresh), direct)
    np.testing.assert_allclose(restore(*detector.state()).score_samples(fresh), direct)


BATCH = "its score of a sample depends on the batch that it is scored in.* such as pyod.models.knn.KNN"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pyod.models.ecod.ECOD", BATCH),
        ("pyod.models.copod.COPOD", BATCH),
        ("pyod.models.lmdd.LMDD", BATCH),  # it draws random numbers while it scores
        ("pyod.models.cof.COF", r"it cannot score a single sample \(IndexError: .*\), as a guard must"),
        ("pyod.models.sos.SOS", "its scores of single samples are no numbers"),
        ("pyod.models.mad.MAD", r"it cannot be fitted to 60 clean samples .*just for univariate data"),
        ("pyod.models.deep_svdd.DeepSVDD", r"it cannot be fitted .*'n_features'\)\. Give its arguments"),
        ("sklearn.neural_network.BernoulliRBM", "it gives clean and strange samples one and the same score"),
    ],
)
def test_an_estimator_that_does_not_judge_a_sample_by_itself_is_refused(name, message, activations):
    with pytest.raises(InputError, match=rf"detector {name}: {message}"):
        make(name).fit(activations(60))


def test_an_estimator_that_looks_at_the_batch_is_found_out_among_thousands_of_clean_samples():
    with pytest.raises(InputError, match=BATCH):
        make("pyod.models.ecod.ECOD").fit(np.random.default_rng(0).standard_normal((4000, 64)))


def test_an_estimator_that_looks_at_the_batch_is_refused_when_it_comes_back(activations):
    from pyod.models.ecod import ECOD

    samples = activations(60).reshape(60, -1)
    arrays = {"samples_": samples, "remembered_": ECOD().fit(samples).decision_function(samples[:20])}
    with pytest.raises(InputError, match=BATCH):
        restore({"name": "pyod.models.ecod.ECOD", "settings": {}}, arrays)


def test_an_estimator_without_a_seed_of_its_own_comes_back_the_same(activations):
    def drawn():
        return random.random(), np.random.rand(), float(torch.rand(()))  # noqa: NPY002

    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    torch.manual_seed(1)
    expected = drawn()
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    torch.manual_seed(1)
    detector = make("pyod.models.loda.LODA").fit(activations(60))
    assert drawn() == expected, "the random numbers of others are left as they were"
    fresh = activations(10, seed=1)
    again = restore(*detector.state())
    np.testing.assert_allclose(again.score_samples(fresh), detector.score_samples(fresh), rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("os.system", "estimators come from sklearn or pyod"),
        ("sklearn.neighbors.Missing", "holds no Missing"),
        ("sklearn.nowhere.Thing", "cannot be imported"),
        ("sklearn.linear_model.LinearRegression", "is no outlier estimator"),
    ],
)
def test_names_that_are_no_estimator_are_refused(name, message):
    with pytest.raises(InputError, match=message):
        make(name)


def test_an_estimator_that_scores_otherwise_than_when_saved_is_refused(activations):
    about, arrays = make("sklearn.neighbors.LocalOutlierFactor").fit(activations(60)).state()
    with pytest.raises(InputError, match="The library's version is another"):
        restore(about, arrays | {"remembered_": arrays["remembered_"] + 1})
    with pytest.raises(InputError, match="there is no argument 'neighbours'"):
        make("sklearn.neighbors.LocalOutlierFactor", neighbours=5)


@pytest.mark.parametrize("name", ["autoencoders", "variational"])
def test_the_gradient_of_a_score_reaches_the_activations(name, activations):
    detector = make(name, steps=40, members=2).fit(activations(80))
    x = torch.from_numpy(activations(4, seed=1)).requires_grad_()
    detector.score_tensor(x).sum().backward()
    assert (x.grad.abs().sum(dim=(1, 2)) > 0).all()


def test_members_of_an_ensemble_differ_and_a_fit_repeats_itself(activations):
    first, again = (AutoEncoders(steps=20, members=2).fit(activations(60)) for _ in range(2))
    np.testing.assert_array_equal(getattr(first, "net0.0.weight_"), getattr(again, "net0.0.weight_"))
    assert not np.allclose(getattr(first, "net0.0.weight_"), getattr(first, "net1.0.weight_"))


def test_extremes_raise_no_more_alarms_with_more_clean_samples():
    # A bound at the smallest and largest clean value widens with every sample.
    rng = np.random.default_rng(0)
    thresholds = []
    for n in (200, 2000, 20000):
        detector = Extremes(two_sided=True).fit(rng.standard_normal((n, 20)))
        thresholds.append(np.quantile(detector.score_samples(rng.standard_normal((4000, 20))), 0.95))
    assert max(thresholds) - min(thresholds) < 0.2


def test_readings_that_never_change_count_nothing():
    clean = np.c_[np.random.default_rng(0).standard_normal(50), np.zeros(50)]
    detector = Extremes().fit(clean)
    assert detector.score_samples(np.array([[0.0, 9.0]])) == detector.score_samples(np.array([[0.0, 0.0]]))
    with pytest.raises(InputError, match="1 readings, it was fitted on 2"):
        detector.score_samples(np.zeros((1, 1)))


def test_a_locked_sequence_stands_out_though_clean_answers_end_locked():
    rng = np.random.default_rng(0)
    # Clean answers grow certain towards their end, so certainty late in an answer says nothing.
    clean = np.arange(8.0)[None, :, None] + rng.standard_normal((200, 8, 2))
    clean[:50, 5:] = np.nan
    detector = SequenceLock().fit(clean)
    locked = clean[100:101].copy()
    locked[0, :4, 0] = 7.0
    assert detector.score_samples(locked) > np.quantile(detector.score_samples(clean), 0.99)
    short = np.full((1, 8, 2), np.nan)
    short[0, 0] = 0.0
    assert np.isfinite(detector.score_samples(short)).all()


def test_a_beginning_of_an_answer_is_judged_as_that_answer_cut_off():
    rng = np.random.default_rng(0)
    detector = SequenceLock().fit(rng.standard_normal((100, 6, 2)))
    answer = rng.standard_normal((1, 6, 2))
    steps = detector.score_steps(answer)
    assert detector.score_samples(answer)[0] == steps.max()
    for end in range(1, 7):
        assert detector.score_steps(answer[:, :end])[0, -1] == pytest.approx(steps[0, end - 1])


def test_neighbours_are_as_far_as_scikit_learn_says(activations):
    clean, fresh = activations(200), activations(10, seed=1)
    detector = make("neighbours").fit(clean)
    for layer in range(3):
        inside = detector._inside(fresh, layer)
        direct = NearestNeighbors(n_neighbors=10).fit(detector.bank_[:, layer]).kneighbors(inside)[0][:, -1]
        np.testing.assert_allclose(detector.layer_scores(fresh)[:, layer], direct, rtol=1e-8)


def test_ranks_are_those_of_a_full_sorting(activations):
    clean, fresh = activations(120), activations(6, seed=1)
    detector = make("ranks", neighbours=4).fit(clean)
    points = (fresh @ detector.projection_).astype(np.float32)
    for sample, found in zip(points, _ranks(points, detector.bank_, 4), strict=True):
        distances = ((detector.bank_ - sample) ** 2).sum(axis=2)
        order = distances.argsort(axis=0)
        ranks = order.argsort(axis=0)
        direct = [ranks[order[:4, i], i + 1].mean() for i in range(2)]
        np.testing.assert_allclose(found, np.log1p(np.array(direct) / 120 * 1000), rtol=1e-6)


def test_trajectories_need_two_layers(activations):
    for name in ("layer_deltas", "ranks"):
        with pytest.raises(InputError, match="Capture at least two"):
            make(name).fit(activations(100)[:, :1])


def test_cross_fitted_layer_deltas_expect_of_fresh_prompts_what_they_see(activations):
    # Fitted once on its own distances, the second stage flags fresh clean prompts several times too often.
    rng = np.random.default_rng(0)
    clean, fresh = rng.standard_normal((100, 6, 40)), rng.standard_normal((2000, 6, 40))
    detector = LayerDeltas().fit(clean)
    assert np.median(detector.score_samples(fresh)) < 1.5 * np.median(detector.score_samples(clean))


@pytest.mark.parametrize("name", ["linear_probe", "mlp_probe", "contrast_probe"])
def test_skylines_say_that_they_are_supervised(name, activations):
    detector = make(name)
    assert detector.supervised
    with pytest.raises(InputError, match="is supervised: give a label"):
        detector.fit(activations(50))
