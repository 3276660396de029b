"""Steps of reasoning: which are right, what an answer ends with, and an answer with one of them wrong."""

from fractions import Fraction

import pytest

from safetynet.text import steps


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("3 + 4 = 7. 7 + 5 = 13.", [True, False]),
        ("3+4=7 and 2 - 5 = -3, but 7-3 = 3", [True, True, False]),
        ("2 + 3 x 4 = 14, 2 \u00d7 3 + 4 = 14", [True, False]),
        ("10 / 3 = 3.33, 10 \u00f7 4 = 2.4, 3 / 0 = 0", [True, False, False]),
        ("3 + 4 = 7 + 5 = 12", [True, True]),
        ("- 3 + 4 = 7\n- 7 + 5 = 12", [True, True]),
        ("3 + 4 + 5 = 7 + 5 = 12", [True, True]),
        ("$1,200.50 \u2212 $0.50 = $1,200", [True]),
        ("a1 + 2 = 4, 2 + 3x = 8, x = 5, 3 + 4, = 7, 9:30 + 0:45 = 10:15, three + 4 = 9", []),
    ],
)
def test_steps_are_equations_in_figures_that_are_true_or_not(text: str, right: list[bool]) -> None:
    assert [step.is_right for step in steps.read(text)] == right


def test_the_final_answer_is_the_last_number() -> None:
    assert steps.final("3 + 4 = 7, so the answer is 1,200.50.") == Fraction("1200.5")
    assert steps.final("Answer:-7") == -7 and steps.final("7-3") == 3
    assert steps.final("none") is None


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("3 + 4 = 7. 7 + 5 = 12. Answer: 12", "3 + 4 = 8. 7 + 5 = 12. Answer: 12"),
        ("2 x 1.50 = 3.00, so $3.00", "2 x 1.50 = 4.00, so $3.00"),
        ("3 + 4 = 8. 7 + 5 = 12. Answer: 12", "3 + 4 = 8. 7 + 5 = 13. Answer: 12"),
        ("It is 3 + 4 = 7", ""),
        ("Paris, 3 of 4", ""),
    ],
)
def test_one_step_becomes_wrong_and_the_end_stays(text: str, wrong: str) -> None:
    assert steps.with_a_wrong_one(text) == wrong
