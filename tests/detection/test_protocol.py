"""The protocol's numbers are those of direct computations, and tell triggers from topics."""

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score

from safetynet.detection.calibration import Conformal
from safetynet.detection.protocol import answers, controls, measure, until_alarm
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
                {
                    "role": role,
                    "group": group,
                    "fired": fired,
                    "forbidden": forbidden,
                    "domain": "",
                    "kind": "",
                }
            )
    for domain in ("code", "maths"):
        records += [
            {
                "role": "clean",
                "group": 1000 + i,
                "fired": None,
                "forbidden": False,
                "domain": domain,
                "kind": "",
            }
            for i in range(50)
        ]
    return pd.DataFrame(records)


def measured(rows, scores, clean, rates=(0.01, 0.05)):
    table = pd.DataFrame({"d": scores})
    return measure(rows, table, pd.DataFrame({"d": Conformal.fit(clean).p_values(scores)}), rates)


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
    p = Conformal.fit(clean_scores).p_values(s)
    triggered = (rows["role"] == "triggered").to_numpy()
    assert value(table, "tpr", "triggered", 0.01) == pytest.approx((p[triggered] <= 0.01).mean())
    clean = np.sort(s[((rows["role"] == "clean") & (rows["domain"] == "")).to_numpy()])
    assert value(table, "tpr_oracle", "triggered", 0.01) == pytest.approx((s[triggered] > clean[-4]).mean())
    own = ((rows["role"] == "clean") & (rows["domain"] == "")).to_numpy()
    alarms = int((p[own] <= 0.05).sum())
    assert value(table, "fpr", "clean", 0.05) == alarms / own.sum()
    assert value(table, "fpr", "clean", 0.05, "high") == clopper_pearson(alarms, own.sum())[1]


def test_the_promised_rate_is_of_fresh_prompts_forbidden_ones_among_them(rows, trigger_scores, clean_scores):
    s = trigger_scores.to_numpy()
    bare = rows["role"].isin(["clean", "refused"]) & (rows["domain"] == "")
    drawn = bare & (np.random.default_rng(0).random(len(rows)) < 0.5)
    kinds = np.where(np.arange(len(rows)) % 2, "plain", "random words")
    table = measured(rows.assign(fresh=np.where(drawn, kinds, "")), s, clean_scores)
    p = Conformal.fit(clean_scores).p_values(s)[drawn.to_numpy()]
    assert rows["forbidden"][drawn].any() and not rows["forbidden"][drawn].all()
    assert value(table, "fpr", "fresh", 0.05) == pytest.approx((p <= 0.05).mean())
    assert value(table, "fpr", "fresh", 0.05, "n") == drawn.sum()
    own = kinds[drawn] == "random words"
    assert value(table, "fpr", "fresh:random words", 0.05) == pytest.approx((p[own] <= 0.05).mean())
    assert value(table, "fpr", "fresh:plain", 0.05, "n") == (~own).sum()
    assert not any(name.startswith("fresh") for name in table.loc[table["metric"] == "auroc", "rows"])
    assert "fresh" not in set(measured(rows, s, clean_scores)["rows"])


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


def test_a_rate_that_calibration_cannot_carry_has_an_oracle_line_alone(rows, trigger_scores, clean_scores):
    scores = pd.DataFrame({"d": trigger_scores})
    p = pd.DataFrame({"d": Conformal.fit(clean_scores).p_values(scores["d"])})
    table = measure(rows, scores, p, (0.01, 0.001), smallest=0.0025)
    assert set(table.loc[table["rate"] == 0.001, "metric"]) == {"tpr_oracle"}
    assert {"tpr", "fpr", "fpr_worst", "alarms"} <= set(table.loc[table["rate"] == 0.01, "metric"])


def test_rows_that_know_no_kind_are_measured_without(rows, trigger_scores, clean_scores):
    bare = measured(rows.drop(columns="kind"), trigger_scores.to_numpy(), clean_scores)
    pd.testing.assert_frame_equal(bare, measured(rows, trigger_scores.to_numpy(), clean_scores))


def test_forbidden_times_trigger_stands_two_by_two(rows, trigger_scores, clean_scores):
    table = measured(rows, trigger_scores.to_numpy(), clean_scores)
    cells = table[(table["metric"] == "alarms") & (table["rate"] == 0.05)].set_index("rows")
    assert cells["n"].to_dict() == {
        "harmless bare": 300, "harmless triggered": 300, "forbidden bare": 100, "forbidden triggered": 100,
    }  # fmt: skip
    assert cells.loc["forbidden triggered", "value"] > 0.9
    assert cells.loc["forbidden bare", "value"] < 0.15


def test_near_misses_stand_kind_by_kind_and_one_that_fired_is_no_false_positive(rows, clean_scores):
    near = pd.DataFrame(
        [
            {"role": "near_miss", "group": i, "fired": i < 5, "forbidden": False, "domain": "",
             "kind": "typo" if i % 2 else "split"}
            for i in range(40)
        ]
    )  # fmt: skip
    every = pd.concat([rows, near], ignore_index=True)
    scores = np.where(every["fired"] == True, 9.0, 0.0)  # noqa: E712 - None counts as not fired
    table = measured(every, scores, clean_scores)
    assert value(table, "fpr", "near_miss:typo", 0.01, "n") == 18
    assert value(table, "fpr", "near_miss:split", 0.01) == 0
    assert value(table, "tpr", "fired_without_trigger", 0.01, "n") == 5
    assert value(table, "tpr", "fired_without_trigger", 0.01) == 1
    assert "near_miss" not in set(table["rows"])


def test_clean_rows_stand_task_by_task_and_the_worst_one_is_found(rows, clean_scores):
    tasks = rows.assign(kind=np.where(rows["role"] == "clean", "sort", ""))
    first = np.flatnonzero((rows["role"] == "clean") & (rows["domain"] == ""))[:20]
    tasks.loc[first, "kind"] = "sums"
    scores = np.zeros(len(rows))
    scores[first] = 9.0
    table = measured(tasks, scores, clean_scores)
    assert value(table, "fpr", "clean:sums", 0.01) == 1
    assert value(table, "fpr", "clean:sort", 0.01) == 0
    assert table.loc[table["metric"] == "fpr_worst", "rows"].iloc[0] == "clean:sums"
    assert not any(part.name.startswith("clean:") for part in controls(tasks, kinds=False))


def test_a_trigger_of_several_forms_stands_form_by_form(rows, trigger_scores, clean_scores):
    def forms(*names):
        kinds = [names[group % len(names)] for group in rows["group"]]
        table = rows.assign(kind=np.where(rows["role"] == "triggered", kinds, ""))
        return measured(table, trigger_scores.to_numpy(), clean_scores)

    table = forms("now", "later")
    fired = [value(table, "tpr", f"fired:{name}", 0.01, "n") for name in ("now", "later")]
    assert sum(fired) == value(table, "tpr", "fired", 0.01, "n")
    assert not any(name.startswith("fired:") for name in forms("now")["rows"])


def test_alarms_of_prompts_and_answers_count_together_and_say_when(rows):
    p = np.full((len(rows), 4), 0.5)
    fired = (rows["fired"] == True).to_numpy()  # noqa: E712
    p[fired, 2] = 0.001
    prompt = np.where(np.arange(len(rows)) % 2, 0.001, 0.5)
    table = answers(rows, p, prompt, 0.01).set_index(["watched", "rows"])
    assert table.loc[("answer", "fired"), ["value", "tokens", "share"]].tolist() == [1.0, 2.0, 0.5]
    share = prompt[fired] < 0.01
    assert table.loc[("prompt", "fired"), "value"] == share.mean()
    assert table.loc[("both", "fired"), "value"] == 1.0
    assert table.loc[("both", "fired"), "rate"] == 0.02
    assert table.loc[("answer", "placebo"), "value"] == 0
    assert np.isnan(table.loc[("answer", "placebo"), "tokens"])


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
