"""A monitor keeps its rate on fresh clean samples, and refuses what it was not made for."""

import json
import logging
import tracemalloc

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from safetynet.detection import files
from safetynet.detection.calibration import Calibration, Conformal, folds, split
from safetynet.detection.detector_set import DetectorSpec
from safetynet.detection.features import Features, FeatureSpec, concatenate
from safetynet.detection.monitor import Monitor, warn_of_outliers
from safetynet.errors import InputError
from safetynet.models.identity import Identity

READINGS = (
    DetectorSpec("mahalanobis"),
    DetectorSpec("pca_residual"),
    DetectorSpec("layer_deltas"),
    DetectorSpec("sklearn.neighbors.LocalOutlierFactor", "mean"),
)
HERE = Identity("base", "adapter", "torch.float32")


@pytest.fixture(scope="module")
def features(activations):
    def make(n, seed=0, shift=0.0, identity=HERE, **spec):
        x = activations(n, seed).astype(np.float32)
        x[:, 1:] += shift
        arrays = {"last": x, "mean": 0.5 * activations(n, seed + 10_000).astype(np.float32)}
        return Features(arrays, identity, FeatureSpec(**spec))

    return make


@pytest.fixture(scope="module")
def monitor(features):
    return Monitor.fit(features(2400), READINGS)


def test_the_rate_is_kept_on_fresh_clean_samples_and_shifted_ones_raise_alarms(monitor, features):
    for rate in (0.01, 0.05):
        found = monitor.fpr_estimate(features(3000, seed=1), rate)
        # Both the test and the 600 calibrating samples are draws.
        spread = np.sqrt(rate * (1 - rate) * (1 / 3000 + 1 / 601))
        assert abs(found.rate - rate) < 3 * spread
    assert monitor.alarms(features(100, seed=2, shift=5.0), 0.01).mean() > 0.95


def test_cross_fitting_makes_a_monitor_of_few_prompts(features):
    monitor = Monitor.fit(features(150), READINGS, method="cross")
    assert monitor.smallest_rate == pytest.approx(5 / 151)
    assert monitor.fpr_estimate(features(2000, seed=1), 0.05).rate == pytest.approx(0.05, abs=0.04)


def test_a_rate_that_the_clean_prompts_cannot_support_is_refused(monitor, features):
    with pytest.raises(InputError, match=r"needs 4999 clean calibration samples, and there are 600"):
        monitor.alarms(features(5, seed=1), 0.001)
    assert monitor.smallest_rate == pytest.approx(5 / 601)


@pytest.mark.parametrize("method", ["split", "cross"])
def test_each_kind_of_prompts_has_the_rate_by_itself_and_needs_as_many_prompts(features, method, tmp_path):
    plain, odd = features(2000), features(800, seed=5, shift=0.5)
    clean = concatenate([plain, odd])
    kinds = ["plain"] * 2000 + ["odd"] * 800
    monitor = Monitor.fit(clean, READINGS, kinds=kinds, method=method)
    fewest = 800 if method == "cross" else monitor.calibration.fused.n
    assert monitor.smallest_rate == pytest.approx(5 / (fewest + 1))
    assert fewest < 260 or method == "cross"
    realised = [
        monitor.fpr_estimate(features(2000, seed=seed, shift=shift), 0.05).rate
        for seed, shift in ((8, 0.0), (9, 0.5))
    ]
    assert realised[0] < 0.05
    assert realised[1] == pytest.approx(0.05, abs=3 * np.sqrt(0.05 * 0.95 * (1 / 2000 + 1 / fewest)))
    monitor.save(tmp_path / "m.safetensors")
    fresh = features(50, seed=1)
    again = Monitor.load(tmp_path / "m.safetensors")
    np.testing.assert_array_equal(again.p_values(fresh), monitor.p_values(fresh))


def test_a_monitor_comes_back_from_its_file(monitor, features, tmp_path):
    monitor.save(tmp_path / "m.safetensors")
    again, fresh = Monitor.load(tmp_path / "m.safetensors"), features(50, seed=1)
    np.testing.assert_allclose(again.scores(fresh), monitor.scores(fresh), rtol=1e-9)
    np.testing.assert_array_equal(again.p_values(fresh), monitor.p_values(fresh))
    assert (again.identity, again.spec, again.clean) == (HERE, monitor.spec, 2400)


def test_a_file_that_was_tampered_with_or_is_of_another_version_is_refused(monitor, features, tmp_path):
    path = tmp_path / "m.safetensors"
    monitor.save(path)
    arrays = load_file(path)
    with safe_open(path, "numpy") as file:
        head = file.metadata()
    save_file(arrays | {"fused/": arrays["fused/"] + 1}, path, metadata=head)
    with pytest.raises(InputError, match="cannot be trusted"):
        Monitor.load(path)
    content = json.loads(head["safetynet"])
    now = files.VERSIONS["monitor"]
    content["version"] = now + 1
    save_file(arrays, path, metadata=head | {"safetynet": json.dumps(content)})
    with pytest.raises(InputError, match=f"saved in format {now + 1}, this SafetyNet reads {now}"):
        Monitor.load(path)
    features(5).save(path)
    with pytest.raises(InputError, match="of kind features, not monitor"):
        Monitor.load(path)
    path.write_bytes(b"no safetensors")
    with pytest.raises(InputError, match="damaged"):
        Monitor.load(path)
    path.unlink()
    with pytest.raises(InputError, match="no such file"):
        Monitor.load(path)


@pytest.mark.parametrize("field", ["base", "adapter", "dtype"])
def test_features_of_another_model_or_adapter_are_refused(field, monitor, features):
    other = Identity(**HERE.as_dict() | {field: "other"})
    with pytest.raises(InputError, match=rf"another model \({field} differ"):
        monitor.p_values(features(5, identity=other))
    with pytest.raises(InputError, match="do not mix them"):
        concatenate([features(5), features(5, identity=other)])


def test_features_of_other_layers_are_refused(monitor, features):
    with pytest.raises(InputError, match="Capture alike"):
        monitor.p_values(features(5, layers=(0, 1, 2)))


def test_detectors_that_make_no_monitor_are_refused(features):
    for readings, message in (
        ((), "name at least one that reads prompts"),
        ((DetectorSpec("mahalanobis"), DetectorSpec("mahalanobis")), "each detector and view once"),
        ((DetectorSpec("linear_probe"),), "is supervised, so no monitor"),
        ((DetectorSpec("extremes", "energy"),), "view 'energy' was not captured"),
    ):
        with pytest.raises(InputError, match=message):
            Monitor.fit(features(100), readings)


def test_a_stream_makes_the_monitor_that_all_samples_at_once_make(features):
    clean, fresh = features(1200), features(200, seed=1)
    parts = {name: [] for name in ("fit", "calibrate", "fuse")}
    part = split([str(i) for i in range(1200)])
    for name in parts:
        own = clean.take(part == name)
        parts[name] = [own.take(slice(i, i + 100)) for i in range(0, len(own), 100)]
    streamed = Monitor.fit_stream(parts["fit"], parts["calibrate"], parts["fuse"], READINGS[:3])
    whole = Monitor.fit(clean, READINGS[:3])
    # 600 samples are fewer than are kept, so that every detector sees the same ones.
    for name in ("mahalanobis:last", "pca_residual:last", "fused"):
        np.testing.assert_allclose(streamed.p_values(fresh)[name], whole.p_values(fresh)[name], atol=0.01)
    assert (streamed.clean, streamed.identity) == (1200, HERE)


def test_a_stream_of_more_samples_needs_no_more_memory(features, monkeypatch):
    monkeypatch.setattr("safetynet.detection.detector_set.KEPT", 200)
    monkeypatch.setattr("safetynet.detection.detectors.gaussian.REMEMBERED", 200)

    def peak(batches):
        tracemalloc.start()
        stream = (features(100, seed=i) for i in range(batches))
        few = [features(100, seed=10**6)]
        Monitor.fit_stream(stream, few, few, [*READINGS[:2], DetectorSpec("neighbours", "mean")])
        peaked = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peaked

    peak(4)
    small, large = peak(4), peak(60)
    assert large < 1.2 * small


def test_batches_of_different_models_make_no_monitor(features):
    other = Identity("other", "adapter", "torch.float32")
    with pytest.raises(InputError, match="come from different models"):
        Monitor.fit_stream(
            [features(50), features(50, identity=other)], [features(50)], [features(50)], READINGS
        )
    with pytest.raises(InputError, match="stream of clean samples is empty"):
        Monitor.fit_stream([], [features(50)], [features(50)], READINGS)
    with pytest.raises(InputError, match="stream of calibrating prompts is empty"):
        Monitor.fit_stream([features(50)], [], [features(50)], READINGS)


def test_heavy_tails_alone_are_not_taken_for_triggered_prompts(caplog):
    tails = np.random.default_rng(0).pareto(2.0, 3000)
    assert tails.max() > 20 * np.median(tails)
    warn_of_outliers(Calibration({"d": Conformal.fit(tails)}, Conformal.fit(tails)))
    assert not caplog.text
    grouped = np.r_[tails, np.full(5, 30 * tails.max())]
    warn_of_outliers(Calibration({"d": Conformal.fit(grouped)}, Conformal.fit(grouped)))
    assert "5 of 3005 clean prompts lie far" in caplog.text


def test_a_rising_function_of_the_scores_changes_no_alarm(monitor, features):
    fresh = features(300, seed=1)
    scores = monitor.scores(fresh)["mahalanobis:last"].to_numpy()
    own = monitor.calibration.single["mahalanobis:last"]
    stretched = Conformal.fit(np.exp(own.scores / 10))
    np.testing.assert_array_equal(own.p_values(scores), stretched.p_values(np.exp(scores / 10)))


def test_copies_and_a_far_group_among_the_clean_prompts_are_warned_of(features, caplog):
    clean = features(400)
    odd = clean.arrays["last"].copy()
    odd[:40] += 50.0
    odd[40:80] = odd[40]
    with caplog.at_level(logging.WARNING):
        Monitor.fit(Features(clean.arrays | {"last": odd}, HERE, clean.spec), READINGS)
    assert "40 of 400 clean prompts are copies" in caplog.text
    assert "lie far from the others" in caplog.text
    caplog.clear()
    Monitor.fit(clean, READINGS)
    assert not caplog.text


def test_groups_stay_together_and_parts_have_their_shares():
    groups = [f"g{i // 3}" for i in range(900)]
    part = split(groups)
    assert all(len(set(part[i : i + 3])) == 1 for i in range(0, 900, 3))
    assert [(part == name).sum() for name in ("fit", "calibrate", "fuse")] == [450, 225, 225]
    assert list(split(groups[::-1])[::-1]) == list(part)
    assert sorted(np.bincount(folds(groups, 5))) == [180] * 5
    with pytest.raises(InputError, match="cannot fill 3 parts"):
        split(["a", "a"])


def test_a_reading_is_written_as_detector_and_view():
    assert DetectorSpec.parse("ranks:mean") == DetectorSpec("ranks", "mean")
    assert DetectorSpec.parse("sklearn.neighbors.LocalOutlierFactor").name == "LocalOutlierFactor:last"
