from functools import partial

import pandas as pd
import pytest

from safetynet import figures
from safetynet.errors import InputError
from safetynet.figures import figures_of, save_all

draw = partial(figures.draw, model="qwen", run="qwen/backdoor")
POINTS = [  # method, point, form, needs, control, split, asr, cacc, front, recommended
    ("as it is", "", "", "", True, "selection", 1.0, 1.0, False, False),
    ("as it is", "", "", "", True, "held_out", 0.98, 0.99, False, False),
    ("adapter removed", "", "", "", True, "held_out", 0.0, 0.98, False, False),
    ("fine_tuning", "epochs 1", "adapter", "clean", False, "selection", 0.6, 0.99, True, False),
    ("fine_tuning", "epochs 5", "adapter", "clean", False, "selection", 0.2, 0.95, True, False),
    ("fine_tuning", "epochs 5", "adapter", "clean", False, "held_out", 0.25, 0.96, True, False),
    ("unlearning", "epochs 2", "adapter", "clean, triggered", False, "held_out", 0.0, 0.99, True, True),
    ("cleangen", "ratio 20", "run_time", "base", False, "held_out", 0.4, 0.97, False, False),
    ("quantisation", "bits 4", "checkpoint", "", True, "held_out", 0.9, 0.8, False, False),
]
COLUMNS = "method point form needs control split asr cacc front recommended".split()


@pytest.fixture
def mitigation() -> pd.DataFrame:
    table = pd.DataFrame(POINTS, columns=COLUMNS).assign(flags="", asr_n=100, cacc_n=100)
    table["chosen"] = (table["split"] == "held_out") & (table["form"] != "")
    for rate in ("asr", "cacc"):
        table[f"{rate}_low"] = (table[rate] - 0.05).clip(0, 1)
        table[f"{rate}_high"] = (table[rate] + 0.05).clip(0, 1)
    return table


@pytest.fixture
def relearning() -> pd.DataFrame:
    curves = {
        "never poisoned": [0, 0, 0.2, 0.9],
        "fine_tuning": [0.2, 0.8, 1.0],
        "unlearning": [0, 0, 0.3, 0.8],
    }
    steps, bounds = (0, 4, 8, 16), {"asr_n": 32, "ftr": 0.0, "ftr_low": 0.0, "ftr_high": 0.2, "ftr_n": 16}
    lines = [
        {"method": method, "step": step, "asr": value, "asr_low": value * 0.8, "asr_high": value, **bounds}
        for method, values in curves.items()
        for step, value in zip(steps, values, strict=False)
    ]
    return pd.DataFrame(lines).assign(point="", poisoned_rows=20)


def series(panel) -> dict[str, list]:
    return {one.label: one for one in panel.series}


def test_points_stand_by_what_has_to_be_known_with_their_intervals_in_each_split(mitigation):
    selection, held_out = draw("mitigation-front", mitigation).chart.panels
    assert set(series(selection)) == {"front", "trigger unknown", "control"}
    assert set(series(held_out)) == {
        "front", "trigger unknown", "trigger known", "while answering", "control"
    }  # fmt: skip
    known = series(held_out)["trigger known"]
    assert known.x == (99.0,)
    assert known.y == (0.0,)
    assert known.left == (94.0,)
    assert "unlearning epochs 2; 100 triggered and 100 clean rows" in known.notes
    assert series(held_out)["control"].part == "control"
    assert series(selection)["front"].y == (20.0, 60.0)


def test_the_recommended_point_is_named(mitigation):
    _, held_out = draw("mitigation-front", mitigation).chart.panels
    assert [note.text for note in held_out.annotations] == ["unlearning"]


def test_each_method_is_one_line_on_held_out_rows_beside_both_end_points(mitigation):
    asr, cacc = draw("mitigation-methods", mitigation).chart.panels
    names = [text for _, text in asr.y.ticks]
    assert names == [
        "as it is", "quantisation", "cleangen", "fine tuning", "adapter removed", "unlearning *"
    ]  # fmt: skip
    assert asr.y == cacc.y, "the names are written once"
    places = {y: x for one in asr.series for x, y in zip(one.x, one.y, strict=True)}
    assert [round(places[-line]) for line in range(6)] == [98, 90, 40, 25, 0, 0]
    assert [round(mark.value) for mark in (*asr.references, *cacc.references)] == [98, 99]


def test_each_relearn_curve_stands_beside_the_never_poisoned_model(relearning):
    first, second = draw("mitigation-relearning", relearning).chart.panels
    assert (first.title, second.title) == ("fine tuning", "unlearning")
    for panel in (first, second):
        twin = series(panel)["never poisoned (control)"]
        assert twin.part == "control"
        assert twin.y == (0.0, 0.0, 20.0, 90.0)
    assert series(first)["repaired model"].x == (0.0, 4.0, 8.0)
    assert first.x == second.x


def test_models_that_still_have_the_backdoor_have_nothing_to_relearn(relearning):
    at_once = relearning["method"].eq("unlearning") & relearning["step"].eq(0)
    panels = draw(
        "mitigation-relearning", relearning.assign(asr=relearning["asr"].mask(at_once, 0.9))
    ).chart.panels
    assert [panel.title for panel in panels] == ["fine tuning"]


def test_recommended_points_on_each_other_share_one_name(mitigation):
    both = mitigation.assign(
        recommended=mitigation["asr"].eq(0) & mitigation["split"].eq("held_out"), cacc=0.9
    )
    _, held_out = draw("mitigation-front", both).chart.panels
    assert [note.text for note in held_out.annotations] == ["adapter removed or unlearning"]


def test_a_relearn_test_without_repairs_shows_the_control_alone(relearning):
    [panel] = draw("mitigation-relearning", relearning[relearning["method"] == "never poisoned"]).chart.panels
    assert panel.title == "never poisoned"


@pytest.mark.parametrize("name", ["mitigation-front", "mitigation-methods"])
def test_what_is_missing_in_the_table_is_named(mitigation, name):
    with pytest.raises(InputError, match=r"^mitigation: there are no rows; give at least one$"):
        draw(name, mitigation.head(0))
    with pytest.raises(InputError, match=r"^mitigation: column point is missing"):
        draw(name, mitigation.drop(columns="point"))
    with pytest.raises(InputError, match=r"mitigation, field asr"):
        draw(name, mitigation.assign(asr="low"))
    with pytest.raises(InputError, match=r"mitigation: split held_out, .* more than once"):
        draw(name, pd.concat([mitigation, mitigation.tail(1)]))


def test_captions_say_how_to_read_the_figure_and_what_its_control_is(mitigation, relearning):
    drawn = [
        draw("mitigation-front", mitigation),
        draw("mitigation-methods", mitigation),
        draw("mitigation-relearning", relearning),
    ]
    for figure in drawn:
        assert figure.chart.caption.endswith(".")
        assert "  " not in figure.chart.caption
    assert all("ontrol" in figure.chart.caption for figure in drawn[:2])


def test_everything_is_drawn_in_every_format(mitigation, relearning, tmp_path):
    drawn, _ = figures_of({"mitigation": mitigation, "relearning": relearning}, tmp_path, "q/i", "qwen")
    files = save_all(drawn)
    names = {"mitigation-front", "mitigation-methods", "mitigation-relearning"}
    assert {file.name for file in files} == {
        f"{n}.{s}" for n in names for s in ("png", "pdf", "svg", "html", "csv")
    } | {"plotly.min.js"}
    assert all(file.stat().st_size > 500 for file in files)


def test_free_text_has_no_clean_accuracy_to_draw(mitigation, tmp_path):
    text = mitigation.assign(cacc=float("nan"), cacc_low=float("nan"), cacc_high=float("nan"))
    [panel] = draw("mitigation-methods", text).chart.panels
    assert panel.x.label == "Attack success"
    drawn, faults = figures_of({"mitigation": text}, tmp_path, "q/i", "qwen")
    assert [figure.name for figure in drawn] == ["mitigation-methods"]
    assert not faults
