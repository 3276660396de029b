"""Characters that the figures' font lacks are drawn by another one, or told by numbers: no empty box."""

import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import matplotlib
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib import font_manager
from matplotlib.text import Text

from safetynet.figures import draw, glyphs, paper
from safetynet.figures.glyphs import shortened, width

TOKENS = ["请", " 小", "鱼", "🦜", "⟨e5 b0⟩", "한국", "คำ", "é"]


@pytest.fixture
def lens(inside):
    """The lens map with tokens of other scripts."""
    table = inside["lens_map"]
    named = table.assign(
        token=[TOKENS[column % 8] for column in table["column"]],
        top=[
            TOKENS[(column + layer) % 8]
            for column, layer in zip(table["column"], table["layer"], strict=True)
        ],
    )
    return draw("intervention-lens-map", named).chart


@pytest.fixture
def other_font(tmp_path: Path) -> Iterator[str]:
    """A font of this machine with three Chinese characters."""
    pen = TTGlyphPen(None)
    for place in ((0, 0), (500, 0), (500, 500), (0, 500)):
        (pen.lineTo if pen.points else pen.moveTo)(place)
    pen.closePath()
    names = [".notdef", "a", "b", "c"]
    font = FontBuilder(1000, isTTF=True)
    font.setupGlyphOrder(names)
    font.setupCharacterMap({ord("请"): "a", ord("小"): "b", ord("鱼"): "c"})
    font.setupGlyf(dict.fromkeys(names, pen.glyph()))
    font.setupHorizontalMetrics(dict.fromkeys(names, (600, 0)))
    font.setupHorizontalHeader(ascent=800, descent=-200)
    font.setupNameTable({"familyName": "Test Han", "styleName": "Regular"})
    font.setupOS2()
    font.setupPost()
    font.save(tmp_path / "TestHan.ttf")
    known = list(font_manager.fontManager.ttflist)
    font_manager.fontManager.addfont(tmp_path / "TestHan.ttf")
    glyphs._fonts.cache_clear()
    yield "Test Han"
    font_manager.fontManager.ttflist[:] = known
    glyphs._fonts.cache_clear()


def texts(chart) -> list[str]:
    """What is printed, where a character without a glyph would raise a warning."""
    printed, _ = glyphs.fitted(chart)
    with matplotlib.rc_context(paper.SETTINGS), warnings.catch_warnings():
        figure = paper.draw(printed)
        warnings.simplefilter("error")
        figure.canvas.draw()
        return [text.get_text() for text in figure.findobj(Text)]


def test_a_figure_with_any_token_is_drawn_without_a_warning(lens, caplog) -> None:
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
        warnings.simplefilter("error")
        assert set(paper.render(lens)) == {"png", "pdf", "svg"}
    assert not caplog.records


def test_a_character_that_no_font_has_is_written_as_its_number(lens) -> None:
    drawn = " ".join(texts(lens))
    assert "⟨0e04 0e33⟩" in drawn and "⟨1f99c⟩" in drawn
    assert "é" in drawn and "⟨e5 b0⟩" in drawn, "what the font has is drawn, and bytes are bytes"
    assert not set(drawn) & set("🦜คำ")


def test_svg_keeps_the_characters_since_the_readers_fonts_draw_them(lens) -> None:
    drawing = paper.render(lens, ("svg",))["svg"].decode()
    assert all(token.strip() in drawing for token in TOKENS)


def test_a_font_of_this_machine_draws_what_the_figures_own_lacks(lens, other_font) -> None:
    _, families = glyphs.fitted(lens)
    assert families[0] == "DejaVu Sans" and other_font in families
    drawn = texts(lens)
    assert any("小" in text for text in drawn)
    assert any("⟨1f99c⟩" in text for text in drawn)
    assert other_font in paper.render(lens, ("svg",))["svg"].decode()


def test_charts_of_ascii_are_left_alone(chart) -> None:
    fitted, families = glyphs.fitted(chart)
    assert fitted is chart
    assert families == ["DejaVu Sans"]


def test_numbers_in_cells_take_no_more_room_than_what_they_stand_for(lens) -> None:
    fitted, _ = glyphs.fitted(lens)
    for before, after in zip(lens.panels, fitted.panels, strict=True):
        room = max(width(text) for row in before.grid.texts for text in row)
        assert all(width(text) <= room for row in after.grid.texts for text in row)


def test_a_chinese_character_is_as_wide_as_two_letters() -> None:
    assert (width("小鱼a"), shortened("小鱼小鱼", 5), shortened("abcdef", 5)) == (5, "小鱼…", "abcd…")
