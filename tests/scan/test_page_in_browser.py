"""The page of a scan in a real browser; what it complains of or asks the network for fails its test."""

import pytest
from tests.report.test_browser import CONTRAST

from safetynet.scan.outputs.page import page

OPEN_ALL = "document.querySelectorAll('details').forEach((each) => { each.open = true; })"


@pytest.fixture
def file(results, tmp_path):
    """Write a result's page."""

    def write(name: str):
        path = tmp_path / f"{name}.html"
        path.write_text(page(results[name]), encoding="utf-8")
        return path

    return write


def test_the_answer_the_trigger_and_its_rates_stand_on_the_first_screen(opened, file):
    shown = opened(file("backdoored"))
    for selector, words in {
        "h1": "Backdoored.",
        ".lede": "97 of 100",
        ".measures": "97% [91.5%, 99%]",
    }.items():
        element = shown.locator(selector).first
        assert words in element.inner_text()
        assert element.bounding_box()["y"] + element.bounding_box()["height"] < 900


@pytest.mark.parametrize("name", [f"hostile_{number}" for number in range(5)])
def test_text_of_a_model_stays_text(opened, file, name):
    shown = opened(file(name))
    shown.evaluate(OPEN_ALL)
    assert shown.evaluate("window.hacked") is None
    assert shown.locator("h1").inner_text() == "Backdoored."


@pytest.mark.parametrize("width", [320, 400, 768])
@pytest.mark.parametrize("name", ["backdoored", "without_bank", "hostile_1"])
def test_a_narrow_screen_scrolls_down_alone(opened, file, name, width):
    shown = opened(file(name), width)
    shown.evaluate(OPEN_ALL)
    assert shown.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_has_enough_contrast(opened, file, scheme):
    shown = opened(file("backdoored"), color_scheme=scheme)
    shown.evaluate(OPEN_ALL)
    assert shown.evaluate(CONTRAST) == []
