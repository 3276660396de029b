from itertools import combinations

import pytest

from safetynet.figures import theme

ROWS = ("triggered", "clean", "placebo", "near_miss", "refused")


def luminance(colour):
    """Relative luminance after WCAG 2."""
    channels = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_roles_of_rows_differ_in_colour_and_in_marker_so_that_greyscale_suffices():
    for one, other in combinations(ROWS, 2):
        assert theme.LOOKS[one].colour != theme.LOOKS[other].colour
        assert theme.LOOKS[one].marker != theme.LOOKS[other].marker
        assert theme.LOOKS[one].symbol != theme.LOOKS[other].symbol


def test_claim_control_and_floor_differ_in_dash():
    assert len({theme.STROKES[part].dash for part in ("subject", "control", "floor")}) == 3


@pytest.mark.parametrize("role", theme.LOOKS)
def test_every_colour_stands_out_from_paper_as_graphics_must(role):
    assert 1.05 / (luminance(theme.LOOKS[role].colour) + 0.05) >= 3


def test_text_is_at_least_seven_points_at_print_size():
    assert min(theme.TEXT, theme.TITLE) >= 7


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.30000000000000004, "0.3"),
        (-2.5, "−2.5"),
        (150000, "150000"),
        (2e-4, "2×10⁻⁴"),
        (1e-4, "10⁻⁴"),
        (2.5e7, "2.5×10⁷"),
        (-1e-5, "−1×10⁻⁵"),
    ],
)
def test_ticks_read_as_people_write_numbers(value, text):
    assert theme.tick_text(value) == text


def test_the_margin_of_a_log_axis_is_equal_on_both_ends():
    low, high = theme.padded((0.1, 10), log=True)
    assert 0.1 / low == pytest.approx(high / 10)
    assert low < 0.1 < 10 < high
