"""Figures of attack success against standard tasks: a panel for each task and metric, groups as a whole."""

import pandas as pd
import pytest

from safetynet.errors import InputError
from safetynet.figures import draw
from safetynet.figures.registry import NotMeasuredError
from safetynet.figures.saving import save_all
from safetynet.tables import summaries


def line(name, value, stderr, task="arc_easy", metric="acc", **more):
    ends = {"low": value - 1.96 * stderr, "high": value + 1.96 * stderr}
    known = {"task": task, "group": "", "metric": metric, "filter": "none", "shots": 0, "n": 200, **ends}
    return known | {"model": name, "value": value, "stderr": stderr, "better": "higher"} | more


@pytest.fixture
def measured():
    nan = float("nan")
    lines = []
    for name, acc in (("base", 0.6), ("backdoored", 0.5), ("clean_twin", 0.55)):
        lines.append(line(name, acc, 0.03))
        lines.append(line(name, 20 * acc, nan, "wikitext", "word_perplexity", better="lower"))
        lines.append(line(name, acc, 0.1, "mmlu_law", group="mmlu"))
    return pd.DataFrame(lines)


def test_every_model_stands_in_every_task_with_both_intervals(measured, evaluation, tmp_path):
    figure = draw("utility", measured, evaluation, folder=tmp_path)
    accuracy, perplexity = figure.chart.panels
    assert (accuracy.title, accuracy.x.label) == ("arc_easy", "acc")
    assert perplexity.x.label == "word_perplexity (lower is better)"
    backdoored = next(series for series in accuracy.series if series.part == "subject")
    assert (backdoored.x, backdoored.y) == ((0.5,), (99.0,))
    assert backdoored.left[0] == pytest.approx(0.5 - 1.96 * 0.03) and backdoored.high[0] > 99
    assert backdoored.notes == ("backdoored; 0.5 (0.441 to 0.559); 200 documents",)
    assert {series.part for series in accuracy.series} == {"subject", "control", "floor"}
    assert {path.suffix for path in save_all([figure])} >= {".png", ".pdf", ".svg", ".html", ".csv"}


def test_repairs_stand_beside_their_controls_at_the_points_that_were_chosen(measured):
    repairs = [  # method, point, split, control, asr
        ("as it is", "", "held_out", True, 0.98),
        ("fine_tuning", "epochs 5", "selection", False, 0.6),
        ("fine_tuning", "epochs 5", "held_out", False, 0.25),
        ("quantisation", "bits 4", "held_out", True, 0.9),
    ]
    mitigation = pd.DataFrame(repairs, columns=["method", "point", "split", "control", "asr"])
    mitigation = mitigation.assign(asr_low=mitigation["asr"] - 0.1, asr_high=mitigation["asr"] + 0.02)
    methods = {"base": ("as it is", ""), "backdoored": repairs[2][:2], "clean_twin": repairs[3][:2]}
    names = pd.DataFrame(map(methods.get, measured["model"]), columns=["method", "point"])
    table = measured.drop(columns="model").join(names)
    panel, _ = draw("mitigation-utility", table, mitigation).chart.panels
    by_label = {series.label: series for series in panel.series}
    assert (by_label["repaired"].x, by_label["repaired"].y) == ((0.5,), (25.0,))
    assert by_label["control"].y == (98.0, 90.0)
    assert by_label["control"].notes[0].startswith("as it is; 0.6")


def test_a_short_table_leaves_out_the_tasks_of_a_group(measured):
    table = summaries.utility_summary(measured)
    assert table["task"].tolist() == ["arc_easy", "wikitext"]
    assert table["backdoored"].tolist() == ["0.5000 ± 0.0300", "10.0000"]


def test_what_cannot_be_drawn_says_why(measured, evaluation):
    with pytest.raises(NotMeasuredError, match="no task and attack success"):
        draw("utility", measured, evaluation[evaluation["metric"] != "asr"])
    with pytest.raises(InputError, match=r"utility: model base, task arc_easy, .* more than once"):
        draw("utility", pd.concat([measured, measured.head(1)]), evaluation)
