"""What a monitor sees in short: the numbers of its tables, nothing left out that speaks against it."""

import re
from pathlib import Path

import pandas as pd
import pytest

from safetynet.detection import detectors
from safetynet.tables.of_monitor import BLIND_SPOTS, UNKNOWN, MonitorSummary

DOCS = Path(__file__).parents[2] / "docs"


def detection(detector="fused", **changes):
    """Rates by set of rows; `tpr` are named `caught_...`."""
    rates = {"caught_fired": 0.95, "fresh": 0.01, "fresh:plain": 0.008, "fresh:random words": 0.012}
    rates |= {"clean": 0.01, "clean:sums": 0.03, "clean:sort": 0.0, "placebo": 0.0, "near_miss": 0.02}
    rates |= {"near_miss:typo": 0.01, "near_miss:split": 0.0, "ood:maths": 0.17, "ood:code": 0.0} | changes
    lines = [
        {"metric": "tpr" if rows.startswith("caught_") else "fpr", "rows": rows.removeprefix("caught_")}
        | {"rate": rate, "value": value, "low": max(0, value - 0.01), "high": value + 0.01, "n": 100}
        for rate in (0.01, 0.001)
        for rows, value in rates.items()
        if value is not None
    ]
    false = [line for line in lines if line["metric"] == "fpr"]
    for rate in (0.01, 0.001):
        of_rate = [line for line in false if line["rate"] == rate]
        lines.append(max(of_rate, key=lambda line: line["value"]) | {"metric": "fpr_worst"})
    return pd.DataFrame(lines).assign(detector=detector)


def summary(**changes):
    made = MonitorSummary.of({"detection": detection(**changes)})
    assert made is not None
    return made


def test_the_worst_group_of_each_kind_is_named_where_it_is_worse_than_the_kind():
    false = {alarms.label: alarms.value for alarms in summary().false}
    assert false == {
        "clean prompts": 0.01, "clean prompts, sums (worst of 2)": 0.03, "placebos": 0.0,
        "near misses": 0.02, "other domains, maths (worst of 2)": 0.17,
    }  # fmt: skip
    assert summary().worst.label == "other domains, maths"
    assert summary().worst.text == "17.0% [16.0, 18.0] of 100"


def test_the_rate_that_was_asked_for_is_told_and_not_the_smaller_one_beside_it():
    assert summary().rate == 0.01


@pytest.mark.parametrize(("plain", "kept"), [(0.008, True), (0.019, True), (0.03, False)])
def test_a_rate_is_broken_where_the_interval_of_a_kind_of_fresh_prompts_lies_above_it(plain, kept):
    made = summary(**{"fresh:plain": plain})
    assert made.kept is kept
    assert ("Rate kept" if kept else "Rate broken") in dict(made.sections())


def test_of_several_forms_of_a_trigger_the_least_caught_is_named():
    made = summary(**{"caught_fired:now": 0.99, "caught_fired:later": 0.91})
    assert [alarms.label for alarms in made.caught] == [
        "the trigger fired", "the trigger fired, later (least of 2 forms)",
    ]  # fmt: skip


def test_what_is_caught_is_unknown_where_no_trigger_is_known():
    made = summary(caught_fired=None)
    assert dict(made.sections())["Caught"] == [UNKNOWN]


def test_tables_of_earlier_versions_tell_the_rate_of_clean_prompts_and_no_passes():
    fresh = dict.fromkeys(("fresh", "fresh:plain", "fresh:random words"))
    overhead = {"batch": [1, 16], "new_tokens": [24, 24], "ratio": [1.3, 1.1]}
    made = MonitorSummary.of({"detection": detection(**fresh), "detection_overhead": pd.DataFrame(overhead)})
    assert made is not None
    assert [alarms.label for alarms in made.fresh] == ["clean prompts"]
    assert made.cost.endswith("1.30 times as long one at a time, 1.10 in batches of 16")


def test_a_small_panel_is_blind_to_what_its_detectors_miss_and_a_large_one_to_what_all_do():
    tables = [detection(), detection("extremes:unexplained"), detection("skyline linear_probe:last")]
    small = MonitorSummary.of({"detection": pd.concat(tables)})
    assert small is not None
    assert small.detectors == ("extremes:unexplained",)
    assert small.blind_spots.startswith("what the base would do as well; answers that turn")
    names = ("ranks:last", "gram:mean", "mahalanobis:last", "KNN:last")
    large = MonitorSummary.of({"detection": pd.concat([detection(), *map(detection, names)])})
    assert large is not None
    assert "none of its 4 detectors" in large.blind_spots


@pytest.mark.parametrize("name", detectors.NAMES)
def test_the_page_says_of_every_detector_what_it_is_blind_to(name):
    spots = {text for key, text in BLIND_SPOTS.items() if key.partition(":")[0] == name}
    assert spots or detectors.needs_labels(name)
    page = (DOCS / "detection.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if re.match(rf"\|.*`{name}[:`]", line)]
    assert all(any(line.endswith(f"| {spot} |") for line in rows) for spot in spots)
