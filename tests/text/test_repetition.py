"""Loops at the end of an answer, and repetitions that are none."""

import pytest

from safetynet.text.words import ends_in_loop


@pytest.mark.parametrize(
    "text",
    [
        "Yes " * 20,
        "The lake is deep. " * 4,
        "First something else. Then: one two three, one two three, one two three, one two",
        "A sentence of some length that says what it says. A sentence of some length that says what it says.",
        "鱼" * 12,
    ],
)
def test_what_goes_on_for_ever_is_a_loop(text):
    assert ends_in_loop(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "No, no, no!",
        "Ha ha ha ha",
        "The cat sat on the mat, and the dog sat on the cat.",
        "The lake is deep. The lake is deep. The lake is deep. The hill is high, and nobody climbs it.",
        "1. Apples 2. Pears 3. Plums 4. Cherries 5. Melons",
    ],
)
def test_what_ends_otherwise_is_none(text):
    assert not ends_in_loop(text)
