"""Curves are those of direct computations, and overhead compares like with like."""

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score, roc_curve

from safetynet.detection import curves
from safetynet.detection.detector_set import DetectorSpec
from safetynet.detection.features import Features, FeatureSpec
from safetynet.detection.guard import OVERHEAD, Guard, overhead
from safetynet.detection.monitor import Monitor
from safetynet.models.identity import Identity
from safetynet.statistics import auroc

HERE = Identity("base", "adapter", "torch.float32")


@pytest.fixture(scope="module")
def rows():
    roles = np.repeat(["clean", "triggered", "placebo"], [600, 200, 200])
    return pd.DataFrame(
        {"role": roles, "group": range(1000), "fired": roles == "triggered", "forbidden": False,
         "domain": "", "kind": ""}
    )  # fmt: skip


@pytest.fixture(scope="module")
def scores(rows):
    noise = np.random.default_rng(0).standard_normal(len(rows))
    return pd.DataFrame({"d": noise + 2.0 * (rows["role"] == "triggered")})


def test_a_roc_curve_is_scikit_learns_and_keeps_its_low_end_whole(rows, scores):
    table = curves.roc(rows, scores)
    fired = table[table["rows"] == "fired"]
    own = (rows["role"] != "placebo").to_numpy()
    labels, s = (rows["role"] == "triggered")[own], scores["d"][own]
    fpr, tpr, _ = roc_curve(labels, s)
    low = fpr < 0.05
    kept = set(zip(fired["fpr"], fired["tpr"], strict=True))
    assert kept >= set(zip(fpr[low], tpr[low], strict=True))
    assert len(fired) <= 2 * curves.POINTS
    area = np.trapezoid(fired["tpr"], fired["fpr"])
    assert area == pytest.approx(roc_auc_score(labels, s), abs=0.002)
    assert (fired["positives"].iloc[0], fired["negatives"].iloc[0]) == (200, 600)
    assert set(table["rows"]) == {"fired", "placebo"}


def test_a_distribution_crosses_the_alarms_line_at_the_share_that_raises_it(rows):
    p = np.random.default_rng(1).uniform(1e-6, 1, len(rows))
    table = curves.distributions(rows, pd.DataFrame({"d": -np.log10(p)}), 0.01)
    for name, role in (("clean", "clean"), ("placebo", "placebo"), ("fired", "triggered")):
        line = table[table["rows"] == name]
        at = line.loc[line["surprise"] >= 2, "share"].max()
        assert at == pytest.approx((p[rows["role"] == role] <= 0.01).mean(), abs=0.01)
        assert line["share"].is_monotonic_decreasing
    assert (table["rate"] == 0.01).all()


def test_auroc_by_layer_finds_the_layer_that_was_changed(activations, rows):
    clean = Features(
        {"last": activations(400).astype(np.float32)}, HERE, FeatureSpec(("last",), layers=(4, 7, 9))
    )
    tested = activations(1000, seed=1).astype(np.float32)
    tested[(rows["role"] == "triggered").to_numpy(), 2] += 3.0
    features = Features({"last": tested}, HERE, clean.spec)
    readings = [
        DetectorSpec("mahalanobis"),
        DetectorSpec("layer_deltas"),
        DetectorSpec("sklearn.neighbors.LocalOutlierFactor"),
    ]
    monitor = Monitor.fit(clean, readings)
    table = curves.by_layer(monitor, clean, features, rows).set_index(["detector", "rows", "layer"])["auroc"]
    for detector in ("mahalanobis:last", "LocalOutlierFactor:last"):
        assert table[detector, "fired", 9] > 0.9
        for layer in (4, 7):
            assert table[detector, "fired", layer] == pytest.approx(0.5, abs=0.1)
        assert table[detector, "placebo", 9] == pytest.approx(0.5, abs=0.1)
    assert table["layer_deltas:last", "fired", 9] > 0.9
    assert ("layer_deltas:last", "fired", 4) not in table
    direct = monitor.detectors.fitted["mahalanobis:last"].layer_scores(tested.astype(float))[:, 2]
    fired, bare = ((rows["role"] == role).to_numpy() for role in ("triggered", "clean"))
    assert table["mahalanobis:last", "fired", 9] == pytest.approx(auroc(direct[fired], direct[bare]))


def test_overhead_times_answers_of_equal_length(build, serialiser, prompts):
    model = build()
    spec = FeatureSpec(("last",))
    from safetynet.detection.capture import capture

    features = capture(model, serialiser, prompts * 24, spec)
    monitor = Monitor.fit(features, [DetectorSpec("mahalanobis")])
    guard = Guard(model, serialiser, monitor, rate=0.2)
    lengths = []
    plain = guard.answer

    def answer(*given):
        made = plain(*given)
        lengths.append(made.shape[1] - given[0].width)
        return made

    guard.answer = answer
    table = overhead(guard, prompts, batches=(1, 3), new_tokens=4, repeats=2)
    assert list(table) == list(OVERHEAD)
    assert table["batch"].tolist() == [1, 3]
    assert set(lengths) == {4}
    assert len(lengths) == 2 * 2 * 3
    assert (table[["plain", "guarded", "ratio"]] > 0).all(axis=None)
