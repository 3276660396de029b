"""Characters that stand in for another: of its script and kind, assigned, and in everyday use."""

import unicodedata

import pytest
import regex

from safetynet.text.characters import alike, kind

SCRIPTS = {
    "鱼": r"\p{Han}", "魚": r"\p{Han}", "桜": r"\p{Han}", "あ": r"\p{Hiragana}", "ア": r"\p{Katakana}",
    "한": r"\p{Hangul}", "я": r"\p{Cyrillic}", "Я": r"\p{Cyrillic}", "é": r"\p{Latin}", "ế": r"\p{Latin}",
    "ο": r"\p{Greek}", "ש": r"\p{Hebrew}", "ب": r"\p{Arabic}", "ก": r"\p{Thai}", "क": r"\p{Devanagari}",
    "ა": r"\p{Georgian}", "ກ": r"\p{Lao}", "ក": r"\p{Khmer}",
}  # fmt: skip


@pytest.mark.parametrize("character", SCRIPTS)
def test_a_letter_gives_assigned_letters_of_its_script_and_category(character: str) -> None:
    others = alike(character)
    assert len(others) >= 20 and character not in others
    assert all(regex.fullmatch(SCRIPTS[character], other) for other in others)
    assert {unicodedata.category(other) for other in others} == {unicodedata.category(character)}
    assert not any(other.isascii() for other in others)


def test_characters_are_those_of_everyday_use() -> None:
    assert {"的", "人", "我"} <= set(alike("鱼")) and len(alike("鱼")) < 4000
    assert set(alike("я")) == set("абвгдежзийклмнопрстуфхцчшщъыьэюё")
    assert {"日", "本"} <= set(alike("桜"))


@pytest.mark.parametrize(
    ("character", "form"),
    [
        ("👩\u200d🚀", r".+\u200d.+"),
        ("🇩🇪", r"\p{Regional_Indicator}{2}"),
        ("👍🏽", r".🏽"),
        ("3️⃣", r"[0-9]\ufe0f\u20e3"),
        ("❤️", r".\ufe0f"),
        ("🦜", r"\p{Emoji_Presentation}"),
    ],
)
def test_an_emoji_gives_emoji_of_its_form_and_nothing_else_does(character: str, form: str) -> None:
    others = alike(character)
    assert len(others) >= 9
    assert all(regex.fullmatch(form, other) and len(regex.findall(r"\X", other)) == 1 for other in others)
    assert all(kind(other)[0] == "emoji" for other in others)
    assert not any(kind(letter)[0] == "emoji" for letter in SCRIPTS)


def test_marks_stay_with_their_letter_and_in_its_form() -> None:
    assert all(other.endswith("ि") for other in alike("कि"))
    assert all(unicodedata.normalize("NFD", other) == other for other in alike("e\u0301"))
    assert alike("e\u0301")


def test_signs_blanks_and_ascii_stay() -> None:
    for character in ("。", "「", "\u00a0", "a", "7", "!"):
        assert not alike(character)
    assert set(alike("３")) == set("０１２４５６７８９")
    assert alike("\u200b"), "an invisible trigger has placebos, too"
