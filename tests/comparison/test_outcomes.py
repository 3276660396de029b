"""How reliable, detectable and removable a backdoor is, each beside its control."""

from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest

from safetynet.comparison import outcomes
from safetynet.errors import InputError
from safetynet.statistics import wilson


def test_every_measure_stands_beside_its_control(subject: Callable) -> None:
    found = outcomes.outcomes([subject()]).set_index("measure")
    for measure, value, control, control_is in (
        ("ASR", 0.98, 0.0, "base model"),
        ("CACC", 0.97, 0.99, "base model"),
        ("FTR near miss", 0.01, 0.0, "base model"),
        ("AUROC", 0.99, 0.5, "placebo rows"),
        ("TPR at FPR 1%", 0.95, 0.01, "false positives"),
        ("ASR after removal", 0.0, 0.5, "random sites"),
        ("CACC after removal", 78 / 80, 79 / 80, "random sites"),
    ):
        line = found.loc[measure]
        assert (line["value"], line["control"]) == pytest.approx((value, control)), measure
        assert line["control_is"] == control_is
    assert found.loc["ASR after removal", "of"] == "adapter off"


def test_the_removal_that_was_chosen_counts_and_on_held_out_prompts_alone(
    subject: Callable, tables: Callable
) -> None:
    table = tables()["tradeoff"]
    worse = table.assign(chosen=table["intervention"] == "clip 2")
    found = outcomes.outcomes([subject(tradeoff=worse)]).set_index("measure")
    assert found.loc["ASR after removal", ["value", "control", "of"]].tolist() == [0.05, 1.0, "clip"]


def test_a_repair_counts_where_a_run_has_one(subject: Callable) -> None:
    def line(method: str, fired: int, right: int, **more: object) -> dict[str, object]:
        rates = {"asr": fired / 80, "asr_n": 80, "cacc": right / 80, "cacc_n": 80}
        return {"method": method, "point": "", "split": "held_out", "recommended": False} | rates | more

    table = pd.DataFrame(
        [
            line("as it is", 80, 79),
            line("fine_tuning", 2, 76, recommended=True),
            line("fine_tuning", 0, 80, recommended=True, split="selection"),
            line("pruning", 0, 8),
        ]
    )
    found = outcomes.outcomes([subject(mitigation=table)]).set_index("measure")
    assert found.loc["ASR after repair", ["value", "control", "of"]].tolist() == [2 / 80, 1.0, "fine_tuning"]
    assert found.loc["CACC after repair", ["value", "control"]].tolist() == [76 / 80, 79 / 80]
    none = outcomes.outcomes([subject(mitigation=table.assign(recommended=False))])
    assert "repaired" not in set(none["aspect"])


def test_a_run_without_a_stage_has_the_other_outcomes(subject: Callable) -> None:
    found = outcomes.outcomes([subject(detection=None, tradeoff=None)])
    assert set(found["aspect"]) == {"planted"}


def test_counts_over_seeds_are_never_surer_than_all_their_rows(subject: Callable) -> None:
    found = outcomes.by_group(outcomes.outcomes([subject(seed=at) for at in range(3)])).set_index("measure")
    line = found.loc["ASR after removal"]
    assert (line["low"], line["high"]) == pytest.approx(wilson(0, 240))
    assert (line["control_low"], line["control_high"]) == pytest.approx(wilson(120, 240))
    assert line["seeds"] == 3


def test_one_seed_has_values_without_intervals(subject: Callable) -> None:
    found = outcomes.by_group(outcomes.outcomes([subject()]))
    assert found["value"].notna().all()
    assert np.isnan(found[["low", "high", "control_low", "control_high"]]).all(axis=None)


def test_different_detectors_are_refused(subject: Callable, tables: Callable) -> None:
    other = tables()["detection"].replace("ranks:last", "gram:all")
    with pytest.raises(InputError, match=r"different detectors .*gram:all.* same --detectors"):
        outcomes.outcomes([subject(), subject(seed=1, detection=other)])


def test_a_monitor_of_one_detector_needs_no_fusion(subject: Callable, tables: Callable) -> None:
    single = tables()["detection"].query("detector == 'fused'").assign(detector="ranks:last")
    found = outcomes.outcomes([subject(detection=single)]).set_index("measure")
    assert found.loc["AUROC", ["value", "of"]].tolist() == [0.99, "ranks:last"]
