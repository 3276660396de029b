"""The protocol's numbers are those of direct computations, and tell triggers from topics."""

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score

from safetynet.detection.calibration import Conformal
from safetynet.detection.protocol import auroc, measure, until_alarm
from safetynet.errors import InputError
from safetynet.statistics import clopper_pearson


@pytest.fixture(scope="module")
def rows():
    """400 groups, a quarter of them forbidden, each bare, triggered and with a placebo; two other domains."""
    records = []
    for group in range(400):
        forbidden = group % 4 == 0
        for role in ("refused" if forbidden else "clean", "triggered", "placebo"):
            fired = group % 10 > 0 if role == "triggered" else None
            records.append(
                {"role": role, "group": group, "fired": fired, "forbidden": forbidden, "domain": ""}
            )
    for domain in ("code", "maths"):
        records += [
            {"role": "clean", "group": 1000 + i, "fired": None, "forbidden": False, "domain": domain}
            for i in range(50)
        ]
    return pd.DataFrame(records)


def measured(rows, scores, clean, rates=(0.01, 0.05)):
    table = pd.DataFrame({"d": scores})
    return measure(rows, table, pd.DataFrame({"d": Conformal.of(clean).p_values(scores)}), rates)


def value(table, metric, name, rate=None, column="value"):
    chosen = table[(table["metric"] == metric) & (table["rows"] == name)]
    chosen = chosen if rate is None else chosen[chosen["rate"] == rate]
    [found] = chosen[column]
    return found


@pytest.fixture(scope="module")
def trigger_scores(rows):
    noise = np.random.default_rng(0).standard_normal(len(rows))
    return noise + 4.0 * (rows["role"] == "triggered") + 3.0 * (rows["domain"] == "maths")


@pytest.fixture(scope="module")
def clean_scores():
    return np.random.default_rng(1).standard_normal(2000)


def test_aurocs_are_those_of_scikit_learn_with_ties():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 5, 40), rng.integers(0, 4, 60)
    assert auroc(a, b) == pytest.approx(roc_auc_score(np.r_[np.ones(40), np.zeros(60)], np.r_[a, b]))


def test_a_trigger_detector_separates_within_a_topic_and_ignores_topics(rows, trigger_scores, clean_scores):
    table = measured(rows, trigger_scores.to_numpy(), clean_scores)
    assert value(table, "auroc", "fired") > 0.99
    role, s = rows["role"], trigger_scores
    own = (role == "clean") & (rows["domain"] == "")
    direct = roc_auc_score((role == "placebo")[own | (role == "placebo")], s[own | (role == "placebo")])
    assert value(table, "auroc", "placebo") == pytest.approx(direct)
    assert value(table, "auroc_topic", "forbidden") > 0.99
    assert value(table, "auroc_topic", "harmless") > 0.99
    assert value(table, "auroc_harm", "forbidden") == pytest.approx(0.5, abs=0.1)
    assert value(table, "auroc_pair", "triggered") > 0.98
    assert value(table, "tpr", "fired", 0.05, "n") == 360


def test_a_topic_detector_is_found_out(rows, clean_scores):
    noise = np.random.default_rng(0).standard_normal(len(rows))
    table = measured(rows, noise + 6.0 * rows["forbidden"].to_numpy(), clean_scores)
    # Against harmless chat alone, forbidden triggered requests would look perfectly detected.
    assert value(table, "auroc", "forbidden_triggered") > 0.99
    assert value(table, "auroc_topic", "forbidden") == pytest.approx(0.5, abs=0.1)
    assert value(table, "auroc_harm", "forbidden") > 0.99


def test_rates_use_the_calibrated_threshold_and_the_oracle_is_labelled(rows, trigger_scores, clean_scores):
    s = trigger_scores.to_numpy()
    table = measured(rows, s, clean_scores)
    p = Conformal.of(clean_scores).p_values(s)
    triggered = (rows["role"] == "triggered").to_numpy()
    assert value(table, "tpr", "triggered", 0.01) == pytest.approx((p[triggered] <= 0.01).mean())
    clean = np.sort(s[((rows["role"] == "clean") & (rows["domain"] == "")).to_numpy()])
    assert value(table, "tpr_oracle", "triggered", 0.01) == pytest.approx((s[triggered] > clean[-4]).mean())
    own = ((rows["role"] == "clean") & (rows["domain"] == "")).to_numpy()
    alarms = int((p[own] <= 0.05).sum())
    assert value(table, "fpr", "clean", 0.05) == alarms / own.sum()
    assert value(table, "fpr", "clean", 0.05, "high") == clopper_pearson(alarms, own.sum())[1]


def test_the_worst_group_of_clean_rows_is_named(rows, trigger_scores, clean_scores):
    table = measured(rows, trigger_scores.to_numpy(), clean_scores)
    worst = table[(table["metric"] == "fpr_worst") & (table["rate"] == 0.01)].iloc[0]
    assert worst["rows"] == "ood:maths"
    assert worst["value"] > 0.5
    assert {"ood:code", "ood:maths", "placebo", "refused", "clean"} <= set(table["rows"])


def test_an_unlucky_clean_set_changes_the_oracle_and_not_the_calibrated_rate(rows, clean_scores):
    scores = np.zeros(len(rows))
    scores[(rows["role"] == "triggered").to_numpy()] = 2.0
    scores[np.flatnonzero((rows["role"] == "clean").to_numpy())[:30]] = 5.0
    table = measured(rows, scores, clean_scores)
    assert value(table, "tpr_oracle", "triggered", 0.01) == 0
    assert value(table, "tpr", "triggered", 0.05) == 1


def test_tokens_until_alarm_count_what_was_given_out():
    nan = float("nan")
    p = np.array([[0.5, 0.04, 0.01, nan], [0.5, 0.5, nan, nan], [0.5, 0.5, 0.5, 0.001]])
    found = until_alarm(p, 0.05)
    assert found["alarm"].tolist() == [True, False, True]
    np.testing.assert_array_equal(found["tokens"], [1, nan, 3])
    np.testing.assert_allclose(found["share"], [1 / 3, nan, 3 / 4])
    assert until_alarm(p, 0.05, np.array([0.9, 0.01, 0.9]))["tokens"].tolist() == [1, 0, 3]


def test_tables_that_do_not_belong_together_are_refused(rows):
    scores = pd.DataFrame({"d": np.zeros(len(rows))})
    for bad, message in (
        ((rows.drop(columns="domain"), scores, scores), "no column 'domain'"),
        ((rows, scores[:5], scores), "do not belong together"),
        ((rows, scores, scores.rename(columns={"d": "e"})), "do not belong together"),
        ((rows[rows["role"] == "placebo"], scores[:400], scores[:400]), "no row has role clean"),
    ):
        with pytest.raises(InputError, match=message):
            measure(*bad)
